"""What a task is: rows in; a batch, metrics and a picture out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, IterableDataset, Value
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import EvalPrediction, PreTrainedModel

from hf_skiprnn.evaluation.metrics import accuracy
from hf_skiprnn.model.image_processing_skip_rnn import SkipRNNImageProcessor

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an extra: only pictures need matplotlib

Row = dict[str, Any]
Batch = dict[str, Tensor]

NUM_STREAMS = 64  # so many processes or workers can each read an endless stream of their own
BLOCK_ROWS = 256  # rows drawn at once; even, so that stratified rows stay paired across blocks
TRAIN, VALIDATION, TEST = range(3)


class Splits(NamedTuple):
    """A task's rows. `train` may be endless (an IterableDataset); the other two have a length."""

    train: Dataset | IterableDataset
    validation: Dataset
    test: Dataset


@dataclass
class Task(ABC):
    """A data set and what is asked of it. The fields of a subclass are its options."""

    name: ClassVar[str]

    @abstractmethod
    def load(self, seed: int) -> Splits:
        """The rows. `seed` decides what is drawn for training; validation and test never depend on it."""

    @abstractmethod
    def collate(self, rows: list[Row]) -> Batch:
        """Rows -> the model's inputs and labels."""

    @abstractmethod
    def model_defaults(self) -> dict[str, Any]:
        """What the task asks of SkipRNNConfig: input_size, num_labels, problem_type, names of the labels."""

    @abstractmethod
    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of logits and labels, as Trainer's compute_metrics."""

    @abstractmethod
    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        """Which steps were read: gates [B, T] bool, logits [B, C], for the rows of a batch."""

    def processor(self) -> Any:
        """What turns raw inputs into the model's, to be saved beside it; None where there is nothing to do."""
        return None

    # What only some tasks need.

    @property
    def per_frame(self) -> bool:
        """Whether there is a label at every step, so that the model is a SkipRNNForFrameClassification."""
        return False

    def initialise(self, model: PreTrainedModel) -> None:  # noqa: B027 - most tasks have nothing to do
        """Put what is known beforehand (word vectors) into a new model."""

    def use_processor(self, checkpoint: str) -> None:  # noqa: B027
        """Take a checkpoint's processor (a folder or Hub id) in place of one made from the training split."""

    def loss(self) -> Callable[..., Tensor] | None:
        """Trainer's compute_loss_func, where the model's own loss is not the one to train by."""
        return None

    def page(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> str | None:
        """`figure` as an HTML page, where that reads better."""
        return None


def label_names(names: tuple[str, ...]) -> dict[str, Any]:
    """num_labels and both label maps of a config."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
    }


class ShiftedImages(TorchDataset[Row]):
    """Every row at every shift of its image by up to `shift` pixels: (2 * shift + 1)^2 as many rows, black moving in.

    A fixed set of rows, unlike shifts drawn on the way: a resumed run sees what an uninterrupted one sees.
    """

    def __init__(self, data: Dataset, shift: int) -> None:
        self.data, steps = data, range(-shift, shift + 1)
        self.moves = [(dx, dy) for dy in steps for dx in steps]

    def __len__(self) -> int:
        return len(self.data) * len(self.moves)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Row]:
        """The rows of a batch."""
        sources, moves = zip(*(divmod(index, len(self.moves)) for index in indices), strict=True)
        rows = self.data.__getitems__(list(sources))
        return [self._moved(row, *self.moves[move]) for row, move in zip(rows, moves, strict=True)]

    @staticmethod
    def _moved(row: Row, dx: int, dy: int) -> Row:
        image = row["image"]
        return row | {"image": image.transform(image.size, PILImage.Transform.AFFINE, (1, 0, -dx, 0, 1, -dy))}


@dataclass
class ImageTask(Task):
    """Images read pixel by pixel in row order: columns `image` (PIL) and `label` (class)."""

    size: ClassVar[tuple[int, int]]  # height, width
    labels: ClassVar[tuple[str, ...]]
    shift: int = field(
        default=0, metadata={"help": "Train on every shift of an image by up to so many pixels: more rows an epoch."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.shift < min(self.size):
            raise ValueError(f"shift must be at least 0 and below {min(self.size)} pixels; got {self.shift}.")

    def training_rows(self, data: Dataset) -> Dataset | ShiftedImages:
        """The training split, with the shifts that were asked for."""
        return ShiftedImages(data, self.shift) if self.shift else data

    def processor(self) -> SkipRNNImageProcessor:
        return SkipRNNImageProcessor(num_channels=1, size={"height": self.size[0], "width": self.size[1]})

    def collate(self, rows: list[Row]) -> Batch:
        """-> pixel_values [B, 1, H, W] in [0, 1], labels [B] integer."""
        pixels = self.processor()([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}

    def model_defaults(self) -> dict[str, Any]:
        return {"input_size": 1, "problem_type": "single_label_classification", **label_names(self.labels)}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": accuracy(prediction.predictions, prediction.label_ids)}

    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        from hf_skiprnn.evaluation.figures import pixels_read

        return pixels_read(
            batch["pixel_values"][:, 0].numpy(),
            gates,
            [self.labels[i] for i in logits.argmax(axis=1)],
            [self.labels[i] for i in batch["labels"].tolist()],
        )


@dataclass
class GeneratedTask(Task):
    """Rows drawn by seed: endless for training, fixed for validation and test."""

    eval_rows: int = field(default=10_000, metadata={"help": "Rows of the validation set, and of the test set."})

    @abstractmethod
    def draw(self, rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
        """`input_values` [rows, T, I] float32 and `labels` [rows]."""

    def load(self, seed: int) -> Splits:
        """Train is NUM_STREAMS independent endless streams: a worker reads one of its own, a lone reader the first."""
        train = IterableDataset.from_generator(
            endless_rows, gen_kwargs={"task": self, "seed": seed, "streams": list(range(NUM_STREAMS))}
        )
        return Splits(train, self._fixed(VALIDATION), self._fixed(TEST))

    def _fixed(self, split: int) -> Dataset:
        columns = self.draw(np.random.default_rng([split]), self.eval_rows)
        inputs, labels = columns["input_values"], columns["labels"]
        features = Features(
            {"input_values": Array2D(inputs.shape[1:], str(inputs.dtype)), "labels": Value(str(labels.dtype))}
        )
        return Dataset.from_dict(columns, features=features).with_format("numpy")

    def collate(self, rows: list[Row]) -> Batch:
        """-> input_values [B, T, I] float32, labels [B]."""
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("input_values", "labels")}


def endless_rows(task: GeneratedTask, seed: int, streams: list[int]) -> Iterator[Row]:
    """The rows of the first of `streams`, without end. The same seed and stream give the same rows, block by block."""
    block = 0
    while True:
        columns = task.draw(np.random.default_rng([TRAIN, seed, streams[0], block]), BLOCK_ROWS)
        for i in range(BLOCK_ROWS):
            yield {name: column[i] for name, column in columns.items()}
        block += 1
