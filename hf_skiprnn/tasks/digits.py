"""Digits: the class of a handwritten digit of 8 x 8 pixels, read pixel by pixel. Real data that needs no network.

Source: scikit-learn's `load_digits`, the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak 1998; licence CC BY 4.0): 1797 images by 13 people with 17 gray levels 0..16. They are converted to 8-bit images:
round(level * 255 / 16). A sequence has 64 steps of one value in [0, 1]. The split is stratified, by seed: 1077 images
for training, 360 for validation, 360 for test.

    {"image": <PIL image 8x8, mode L>, "label": 5}
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from .base import ImageTask, Splits

HELD_OUT_ROWS = 360  # rows of the validation split, and of the test split


@dataclass
class Digits(ImageTask):
    """The task to classify digits of 8 x 8 pixels."""

    name = "digits"
    size = (8, 8)
    labels = tuple("0123456789")
    split_seed: int = field(default=0, metadata={"help": "Decides which images are for validation and for test."})

    def load(self, seed: int) -> Splits:
        """Return the splits. `seed` is not used, because the trainer shuffles the rows."""
        from sklearn.datasets import load_digits  # an extra: only this task needs scikit-learn

        bundle = load_digits()
        levels = np.rint(bundle.images * 255 / 16).astype(np.uint8)
        rows = {"image": [PILImage.fromarray(image) for image in levels], "label": bundle.target.tolist()}
        data = Dataset.from_dict(
            rows, features=Features({"image": Image(), "label": ClassLabel(names=list(self.labels))})
        )
        test = self._hold_out(data)
        validation = self._hold_out(test["train"])
        return Splits(partial(self.training_rows, validation["train"]), validation["test"], test["test"])

    def _hold_out(self, data: Dataset) -> dict[str, Dataset]:
        return data.train_test_split(test_size=HELD_OUT_ROWS, seed=self.split_seed, stratify_by_column="label")
