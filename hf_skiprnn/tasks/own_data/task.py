"""Own data: any data set of texts, pictures, sounds or series of numbers, from the Hub or a local folder.

Source and licence: the user's. What is not said on the command line is inferred from the columns' features:

- input: text (words), image (pixels in row order), audio (log-mel frames, or samples), or lists of numbers ([T] or
  [T][C], any lengths), standardised per channel over the training rows. The processor that does it is saved;
- label: integers, strings or class labels (one class), lists of them (several classes), floats (regression);
- splits: where validation or test is missing, or its labels are hidden (-1), rows of train are held out by seed, in
  the proportions of the classes. With --streaming true nothing is stored but `eval_rows` rows of each of these two.

    python scripts/train.py --dataset_name my_folder --label_column activity

    {"acceleration": [[0.1, 9.8, 0.3], [0.2, 9.7, 0.1], ...], "activity": "walking"}
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from datasets import Audio, ClassLabel, Dataset, IterableDataset, load_dataset, load_from_disk
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction
from transformers.utils import logging

from hf_skiprnn.tasks.base import Batch, Row, Splits, Task

from .inputs import Input, input_of
from .targets import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)

LABEL_NAMES = ("label", "labels", "target", "class", "y")
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
ROW, SPLIT = "row_number", "split_name"  # columns that say in errors where a row stands
FIT_ROWS = 10_000  # training rows that the processor is made from
BUFFER = 1000  # rows of a stream that are shuffled at a time


@dataclass
class OwnData(Task):
    """A label of a sequence, on anybody's data."""

    name = "own_data"
    dataset_name: str = field(default="", metadata={"help": "Hub id, or local folder."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, if it has several."}
    )
    input_column: str | None = field(default=None, metadata={"help": "The sequence; default: the only fitting column."})
    label_column: str | None = field(
        default=None, metadata={"help": "What to predict; default: a column named label, labels, target, class or y."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data as it comes; store none. Needs --max_steps."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Crop sequences to so many steps, from their start."}
    )
    vocabulary: int = field(default=20_000, metadata={"help": "Words that a tokenizer of texts knows."})
    sound_features: Literal["log_mel", "values"] = field(
        default="log_mel",
        metadata={"help": "What a step of a sound is: a frame of 32 mel bands every 10 ms, or one sample."},
    )
    balance_classes: bool = field(
        default=False, metadata={"help": "Let every class weigh as much as any other in the loss."}
    )
    held_out_share: float = field(
        default=0.1, metadata={"help": "Share of train for a missing validation or test split."}
    )
    eval_rows: int = field(default=1000, metadata={"help": "With streaming: rows of validation, and of test, at most."})
    split_seed: int = field(default=0, metadata={"help": "Decides which rows are held out."})

    def __post_init__(self) -> None:
        if not self.dataset_name:
            raise ValueError("Name the data: --dataset_name HUB_ID_OR_FOLDER.")
        if not 0 < self.held_out_share < 0.5:
            raise ValueError(f"held_out_share must be above 0 and below 0.5; got {self.held_out_share}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {self.max_length}.")

    def load(self, seed: int) -> Splits:
        """`seed` orders a stream; other rows are put in order by the trainer."""
        train, validation, test = self._splits
        return Splits(train.shuffle(seed, buffer_size=BUFFER) if self.streaming else train, validation, test)

    @cached_property
    def _raw(self) -> dict[str, Any]:
        """The splits as they are."""
        folder = Path(self.dataset_name)
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            data = load_from_disk(self.dataset_name)
            if self.streaming:
                data = {name: part.to_iterable_dataset() for name, part in _as_splits(data).items()}
        else:
            data = load_dataset(self.dataset_name, self.dataset_config, streaming=self.streaming)
        splits = _as_splits(data)
        if "train" not in splits:
            raise ValueError(f"{self.dataset_name} has no split named train; it has {', '.join(splits)}.")
        return splits

    @cached_property
    def _features(self) -> Any:
        train = self._raw["train"]
        return train.features if train.features is not None else train._resolve_features().features

    @cached_property
    def _target(self) -> Target:
        column = self._label_column
        return Target(self._features[column], column)

    @cached_property
    def _label_column(self) -> str:
        if self.label_column is not None:
            return self._existing("label_column", self.label_column)
        named = [name for name in LABEL_NAMES if name in self._features]
        classes = [name for name, feature in self._features.items() if isinstance(feature, ClassLabel)]
        found = named[:1] or (classes if len(classes) == 1 else [])
        if not found:
            raise ValueError(
                f"{self.dataset_name} has columns {', '.join(self._features)}: which one is the label? Say so with "
                "--label_column."
            )
        return found[0]

    @cached_property
    def _input_column(self) -> str:
        fitting = [name for name in self._features if name != self._label_column and self._kind(name) is not None]
        if self.input_column is not None:
            name = self._existing("input_column", self.input_column)
            if name not in fitting:
                raise ValueError(
                    f"Column {name!r} cannot be the input: it holds {self._features[name]}. A sequence is text, image, "
                    f"audio, or a list of numbers. Fitting columns: {', '.join(fitting) or 'none'}."
                )
            return name
        if len(fitting) != 1:
            raise ValueError(
                f"{self.dataset_name} has {len(fitting)} columns that could be the input ({', '.join(fitting)}), among "
                f"{', '.join(self._features)}. Choose one with --input_column."
            )
        return fitting[0]

    def _existing(self, option: str, name: str) -> str:
        if name not in self._features:
            raise ValueError(f"{option}={name!r}: no such column. There are: {', '.join(self._features)}.")
        return name

    def _kind(self, column: str) -> Input | None:
        return input_of(self._features[column], self.max_length, self.vocabulary, self.sound_features)

    @cached_property
    def _splits(self) -> Splits:
        parts = {name: self._numbered(part, name) for name, part in self._raw.items()}
        train = parts["train"]
        validation = next((parts[name] for name in VALIDATION_NAMES if name in parts), None)
        test = parts.get("test")
        shares = {"validation": (1, validation), "test": (2, test)}
        found: dict[str, Any] = {}
        for name, (number, part) in shares.items():
            if part is not None and self._is_labelled(part):
                found[name] = self._stored(part) if self.streaming else part
                continue
            logger.warning("%s has no labelled %s split: rows of train are held out.", self.dataset_name, name)
            train, found[name] = self._hold_out(train, self.split_seed + 1000 * number)
        return Splits(train, found["validation"], found["test"])

    def _numbered(self, data: Any, split: str) -> Any:
        """Only input and label, undecoded sounds, and where each row stands."""
        data = data.select_columns([self._input_column, self._label_column])
        if isinstance(self._features[self._input_column], Audio):
            data = data.cast_column(self._input_column, Audio(decode=False))
        if not self.streaming:
            return data.add_column(ROW, np.arange(len(data))).add_column(SPLIT, [split] * len(data))
        return data.map(number_row, fn_kwargs={"split": split}, with_indices=True)

    def _is_labelled(self, data: Any) -> bool:
        """Whether some label of the first rows is not hidden behind None or -1."""
        labels = [row[self._label_column] for row in islice(data.select_columns(self._label_column), 100)]
        return any(label is not None and label != -1 for label in labels)

    def _hold_out(self, data: Any, seed: int) -> tuple[Any, Dataset]:
        """(what stays, what is held out)."""
        if self.streaming:
            options = {"seed": seed, "share": self.held_out_share}
            held = data.filter(is_held_out, fn_kwargs={**options, "held": True})
            return data.filter(is_held_out, fn_kwargs={**options, "held": False}), self._stored(held)
        from sklearn.model_selection import train_test_split

        rows, labels = np.arange(len(data)), None if self._target.is_list else data[self._label_column][:]
        options = {"test_size": self.held_out_share, "random_state": seed}
        try:
            stay, held = train_test_split(rows, stratify=None if self._target.is_number else labels, **options)
        except ValueError as error:  # a class of one row, or more classes than rows held out
            logger.warning("%s: rows are held out without regard to their class: %s", self.dataset_name, error)
            stay, held = train_test_split(rows, **options)
        return data.select(np.sort(stay)), data.select(np.sort(held))

    def _stored(self, stream: IterableDataset) -> Dataset:
        """The first rows of a stream."""
        rows = list(islice(stream, self.eval_rows))
        if not rows:
            raise ValueError(f"{self.dataset_name}: too few rows to evaluate on. Raise held_out_share.")
        return Dataset.from_list(rows, features=stream.features)

    def _rows(self, data: Any) -> Iterator[Row]:
        return islice(data, FIT_ROWS)

    @cached_property
    def _input(self) -> Input:
        """The input column's kind, fitted on training rows."""
        kind = cast(Input, self._kind(self._input_column))
        kind.fit(self._cells(self._rows(self._splits.train), self._input_column))
        return kind

    @cached_property
    def _labels(self) -> Target:
        """The label column, with the classes of the training split (in streaming: of one pass over its labels)."""
        labels = self._raw["train"].select_columns(self._label_column)
        self._target.fit(
            labels[self._label_column][:] if not self.streaming else (r[self._label_column] for r in labels)
        )
        return self._target

    def _cells(self, rows: Iterable[Row], column: str) -> Iterator[tuple[Any, str]]:
        """(content, name for errors)."""
        return ((row[column], f"{row[SPLIT]} row {row[ROW]}, column {column!r}") for row in rows)

    def processor(self) -> Any:
        """The tokenizer, image processor or feature extractor."""
        return self._input.processor

    def use_processor(self, checkpoint: str) -> None:
        """The checkpoint's tokenizer, image processor or feature extractor."""
        kind = cast(Input, self._kind(self._input_column))
        kind.load(checkpoint)
        self._input = kind

    def collate(self, rows: list[Row]) -> Batch:
        """-> the model's inputs and labels."""
        inputs = self._input.batch(self._cells(rows, self._input_column))
        return {**inputs, "labels": self._labels.encode(self._cells(rows, self._label_column))}

    def model_defaults(self) -> dict[str, Any]:
        return self._input.model_defaults() | self._labels.model_defaults()

    def loss(self) -> Callable[..., Tensor] | None:
        """Cross-entropy with classes balanced, if asked for."""
        if not self.balance_classes:
            return None
        if self._labels.is_number or self._labels.is_list:
            raise ValueError(f"balance_classes needs one class per row; column {self._label_column!r} has none.")
        weights = self._labels.class_weights()

        def balanced(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            total = F.cross_entropy(outputs["logits"].float(), labels, weights.to(labels.device), reduction="sum")
            return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

        return balanced

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return self._labels.metrics(prediction)

    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        shown = self._labels.shown(logits), self._labels.truth(batch["labels"].numpy())
        return self._input.figure(batch, gates, *shown)

    def page(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> str | None:
        shown = self._labels.shown(logits), self._labels.truth(batch["labels"].numpy())
        return self._input.page(batch, gates, *shown)


def _as_splits(data: Any) -> dict[str, Any]:
    """A data set without splits is all train."""
    return {"train": data} if isinstance(data, (Dataset, IterableDataset)) else dict(data)


def number_row(row: Row, index: int, split: str) -> Row:
    """Where a row stands, as two more columns."""
    return {**row, ROW: index, SPLIT: split}


def is_held_out(row: Row, seed: int, share: float, held: bool) -> bool:
    """Whether a row of a stream is (held=True) or is not held out: decided by its number, in every epoch alike."""
    return (zlib.crc32(f"{seed} {row[ROW]}".encode()) < share * 2**32) is held
