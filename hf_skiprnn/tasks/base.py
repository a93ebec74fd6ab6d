"""The interface of a task: it loads rows, makes batches of them, and computes metrics and figures."""

import glob
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from datasets import Array2D, Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import EvalPrediction, PreTrainedModel

from hf_skiprnn.evaluation.metrics import accuracy
from hf_skiprnn.model.image_processing_skip_rnn import SkipRNNImageProcessor, unit_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an extra: only pictures need matplotlib

Row = dict[str, Any]
Batch = dict[str, Tensor]

LARGEST_MEMORY = 1 << 31  # bytes of inputs that a PreparedRows keeps
NUM_STREAMS = 64  # endless streams of training rows; each process or worker reads its own
BLOCK_ROWS = 256  # rows drawn at once; even, because the labels of generated rows may alternate in pairs
TRAIN, VALIDATION, TEST = range(3)


class Splits:
    """The rows of a task: splits `train`, `validation` and `test`, in this order.

    `train` may be endless (an IterableDataset) or a map-style data set of PyTorch; the other two have a length.

    Args:
        train, validation, test: the rows, or a function that returns them. The function is called when the split is
            first read, so that an evaluation does not wait for training rows.
    """

    def __init__(self, train: Any, validation: Any, test: Any) -> None:
        self._given = (train, validation, test)

    def _rows(self, split: int) -> Any:
        given = self._given[split]
        return given() if callable(given) else given

    @cached_property
    def train(self) -> Any:
        return self._rows(TRAIN)

    @cached_property
    def validation(self) -> Dataset:
        return self._rows(VALIDATION)

    @cached_property
    def test(self) -> Dataset:
        return self._rows(TEST)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.train, self.validation, self.test))


@dataclass
class Task(ABC):
    """A data set and what to predict from it. The fields of a subclass become options of the command line."""

    name: ClassVar[str]

    @abstractmethod
    def load(self, seed: int) -> Splits:
        """Return the rows. `seed` decides the random training rows; validation and test rows do not depend on it."""

    @abstractmethod
    def collate(self, rows: list[Row]) -> Batch:
        """Return the model's inputs and labels for a batch of rows."""

    @abstractmethod
    def model_defaults(self) -> dict[str, Any]:
        """Return the fields of SkipRNNConfig that the task decides: input_size, num_labels, problem_type, labels."""

    @abstractmethod
    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics from logits and labels; passed to Trainer as compute_metrics."""

    @abstractmethod
    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        """Draw which steps of a batch were read; gates [B, T] bool, logits [B, C]."""

    def processor(self) -> Any:
        """Return the processor, which turns raw inputs into model inputs and is saved with the model; None without."""
        return None

    @property
    def per_frame(self) -> bool:
        """Whether there is a label at every step, so that the model is a SkipRNNForFrameClassification."""
        return False

    def prepared(self, rows: Any) -> Any:
        """Return training rows for a trainer, with inputs that are costly to make kept in memory."""
        return rows

    def initialise(self, model: PreTrainedModel) -> None:  # noqa: B027 - optional: most tasks do nothing here
        """Initialise parameters of a new model from the data, for example with word vectors."""

    def use_processor(self, checkpoint: str) -> None:  # noqa: B027 - optional: most processors are not fitted
        """Use the processor of a checkpoint (a folder or Hub id) instead of fitting one to the training split."""

    def loss(self) -> Callable[..., Tensor] | None:
        """Return a loss function for Trainer's compute_loss_func; None to use the model's own loss."""
        return None

    def page(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> str | None:
        """Return the figure as an HTML page; None for tasks that only have a picture."""
        return None


def load_splits(dataset_name: str, *columns: str) -> DatasetDict:
    """Load a data set from the Hub or a local folder.

    Raises:
        ValueError: it lacks the splits train and test, or one of these columns; or see `refuse_pattern`.
    """
    refuse_pattern(dataset_name)
    data = load_dataset(dataset_name)
    if not isinstance(data, DatasetDict) or not {"train", "test"} <= set(data):
        raise ValueError(f"{dataset_name} must have splits train and test; got {data}.")
    if not set(columns) <= set(data["train"].column_names):
        raise ValueError(f"{dataset_name} must have columns {' and '.join(columns)}; got {data['train'].column_names}.")
    return data


def refuse_pattern(dataset_name: str) -> None:
    """Raise ValueError if `datasets` would take a folder's path for a pattern, and load no file or other files."""
    if not Path(dataset_name).is_dir():
        return
    for path in (str(Path(dataset_name).absolute()), str(Path(dataset_name).resolve())):
        if glob.escape(path) != path:
            raise ValueError(f"{path}: datasets takes [, * and ? in a path for a pattern. Rename the folder.")


def label_names(names: tuple[str, ...]) -> dict[str, Any]:
    """Return num_labels and the two label maps of a config."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
    }


class Ready(NamedTuple):
    """The content of a column that needs no further work before rows are joined to a batch."""

    value: Any


class PreparedRows(TorchDataset[Row]):
    """The rows of a data set, each read and prepared once; a `datasets.Dataset` would read it again in every epoch.

    Rows are kept until their arrays and token ids fill LARGEST_MEMORY; what does not fit is prepared anew each time.

    Args:
        data: a data set of known length.
        column: the column that is replaced by Ready.
        prepare: makes the values of Ready from some rows.
    """

    def __init__(self, data: Any, column: str, prepare: Callable[[list[Row]], Sequence[np.ndarray]]) -> None:
        self.data, self.column, self.prepare = data, column, prepare
        self.rows: dict[int, Row] = {}
        self.held = 0  # bytes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Row]:
        """Return the rows of a batch."""
        new: dict[int, Row] = {}
        if absent := [index for index in indices if index not in self.rows]:
            rows = self.data.__getitems__(absent)
            values = self.prepare(rows)
            for index, row, value in zip(absent, rows, values, strict=True):
                new[index] = row | {self.column: Ready(value)}
            size = sum(value.nbytes for value in values)
            if self.held + size <= LARGEST_MEMORY:
                self.rows |= new
                self.held += size
        return [new[index] if index in new else self.rows[index] for index in indices]


class DecodedImages(TorchDataset[Row]):
    """The rows of a data set of small images, decoded once; a `datasets.Dataset` would decode them in every epoch."""

    def __init__(self, data: Iterable[Row]) -> None:
        self.rows: list[Row] = list(data)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> list[Row]:
        """Return the rows of a batch."""
        return [self.rows[index] for index in indices]


class ShiftedImages(TorchDataset[Row]):
    """Every image, shifted by every whole number of pixels up to `shift` in both directions; the new pixels are black.

    This gives (2 * shift + 1)^2 times as many rows. They are a fixed set, not drawn at random during training, so that
    a resumed run reads the same rows as an uninterrupted one.
    """

    def __init__(self, data: DecodedImages, shift: int) -> None:
        self.data, steps = data, range(-shift, shift + 1)
        self.moves = [(dx, dy) for dy in steps for dx in steps]

    def __len__(self) -> int:
        return len(self.data) * len(self.moves)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Row]:
        """Return the rows of a batch."""
        sources, moves = zip(*(divmod(index, len(self.moves)) for index in indices), strict=True)
        rows = self.data.__getitems__(list(sources))
        return [self._moved(row, *self.moves[move]) for row, move in zip(rows, moves, strict=True)]

    @staticmethod
    def _moved(row: Row, dx: int, dy: int) -> Row:
        image = row["image"]
        return row | {"image": image.transform(image.size, PILImage.Transform.AFFINE, (1, 0, -dx, 0, 1, -dy))}


@dataclass
class ImageTask(Task):
    """The base class of tasks that read images pixel by pixel, row by row. Columns: `image` (PIL), `label` (class)."""

    size: ClassVar[tuple[int, int]]  # height, width
    labels: ClassVar[tuple[str, ...]]
    shift: int = field(
        default=0, metadata={"help": "Also train on every image shifted by up to so many pixels in both directions."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.shift < min(self.image_size()):
            raise ValueError(f"shift must be at least 0 and below {min(self.image_size())} pixels; got {self.shift}.")

    def image_size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return self.size

    def training_rows(self, data: Iterable[Row]) -> DecodedImages | ShiftedImages:
        """Return the training split, decoded; with `shift` above 0, together with the shifted images."""
        decoded = DecodedImages(data)
        return ShiftedImages(decoded, self.shift) if self.shift else decoded

    def processor(self) -> SkipRNNImageProcessor:
        height, width = self.image_size()
        return SkipRNNImageProcessor(num_channels=1, size={"height": height, "width": width})

    def prepared(self, rows: Any) -> PreparedRows:
        """Return the rows with their pixels as arrays."""
        return PreparedRows(rows, "image", self._pixels)

    def _pixels(self, rows: list[Row]) -> list[np.ndarray]:
        processor = self.processor()
        return [processor.pixels(row["image"]) for row in rows]

    def collate(self, rows: list[Row]) -> Batch:
        """Return pixel_values [B, 1, H, W] in [0, 1] and labels [B] integer."""
        is_ready = isinstance(rows[0]["image"], Ready)
        pixels = np.stack([row["image"].value for row in rows] if is_ready else self._pixels(rows))
        return {
            "pixel_values": torch.from_numpy(unit_range(pixels)),
            "labels": torch.tensor([row["label"] for row in rows]),
        }

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
    """The base class of tasks whose rows are random numbers from a seed: endless for training, fixed otherwise."""

    eval_rows: int = field(default=10_000, metadata={"help": "Rows of the validation set, and of the test set."})

    @abstractmethod
    def draw(self, rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
        """Draw `input_values` [rows, T, I] float32 and `labels` [rows]."""

    def load(self, seed: int) -> Splits:
        """Return endless training rows in NUM_STREAMS independent streams, and fixed validation and test rows."""
        train = IterableDataset.from_generator(
            endless_rows, gen_kwargs={"task": self, "seed": seed, "streams": list(range(NUM_STREAMS))}
        )
        return Splits(train, partial(self._fixed, VALIDATION), partial(self._fixed, TEST))

    def _fixed(self, split: int) -> Dataset:
        columns = self.draw(np.random.default_rng([split]), self.eval_rows)
        inputs, labels = columns["input_values"], columns["labels"]
        features = Features(
            {"input_values": Array2D(inputs.shape[1:], str(inputs.dtype)), "labels": Value(str(labels.dtype))}
        )
        return Dataset.from_dict(columns, features=features).with_format("numpy")

    def collate(self, rows: list[Row]) -> Batch:
        """Return input_values [B, T, I] float32 and labels [B]."""
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("input_values", "labels")}


def endless_rows(task: GeneratedTask, seed: int, streams: list[int]) -> Iterator[Row]:
    """Yield rows of the first of `streams`, without end. The same seed and stream give the same rows."""
    block = 0
    while True:
        columns = task.draw(np.random.default_rng([TRAIN, seed, streams[0], block]), BLOCK_ROWS)
        for i in range(BLOCK_ROWS):
            yield {name: column[i] for name, column in columns.items()}
        block += 1
