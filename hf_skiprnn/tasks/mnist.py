"""Sequential MNIST: the class of a handwritten digit, read pixel by pixel (Campos et al. 2018, Table 2).

Source: LeCun, Cortes and Burges, 28 x 28 grayscale images, 60000 for training and 10000 for test; `ylecun/mnist` on the
Hub (licence according to its page: MIT), or a local folder in the same layout. A sequence has 784 steps of one value in
[0, 1]. As in the paper, 5000 training images are held out for validation, here by seed.

    {"image": <PIL image 28x28, mode L>, "label": 5}
"""

from dataclasses import dataclass, field
from functools import partial

from .base import ImageTask, Splits, load_splits


@dataclass
class MNIST(ImageTask):
    """The task to classify digits of 28 x 28 pixels."""

    name = "mnist"
    size = (28, 28)
    labels = tuple("0123456789")
    dataset_name: str = field(
        default="ylecun/mnist", metadata={"help": "Hub id, or local folder in the same layout: columns image, label."}
    )
    validation_rows: int = field(default=5000, metadata={"help": "Training images held out for validation."})
    split_seed: int = field(default=0, metadata={"help": "Decides which training images are held out."})

    def load(self, seed: int) -> Splits:
        """Return the splits. `seed` is not used, because the trainer shuffles the rows."""
        data = load_splits(self.dataset_name, "image", "label")
        held_out = data["train"].train_test_split(test_size=self.validation_rows, seed=self.split_seed)
        return Splits(partial(self.training_rows, held_out["train"]), held_out["test"], data["test"])
