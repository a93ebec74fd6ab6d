"""The table of the task `own_data`: its input and label columns, and the rows of its three splits."""

import hashlib
from functools import cached_property, partial
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import (
    Array2D,
    Audio,
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    load_from_disk,
)
from transformers.utils import logging

from hf_skiprnn.tasks.base import Row, Splits, refuse_pattern
from hf_skiprnn.tasks.readers.sounds import SoundFile, load_undecoded

from .columns import (
    PEEK,
    ROW,
    doubt,
    is_list,
    is_number,
    is_series,
    is_text,
    join_row,
    joined,
    present,
    sequences,
    shortened,
    with_first_labels,
)
from .inputs import Input, input_of
from .targets import Target, are_per_step

if TYPE_CHECKING:
    from .task import OwnData

logger = logging.get_logger(__name__)

LABEL_NAMES = ("label", "labels", "target", "class", "y")
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
EMPTY = "Fill it, or leave it out: rows of train are held out for a missing split."
SPLIT = "split_name"  # added column: the name of a row's split, for error messages


class Table:
    """The data set of the task `own_data`; every property is computed at its first use.

    Args:
        options: the task.
    """

    def __init__(self, options: "OwnData") -> None:
        self.options = options

    @cached_property
    def _raw(self) -> dict[str, Any]:
        """The splits with their original columns."""
        try:
            splits = self._loaded()
        except (ValueError, IndexError) as error:
            if not isinstance(error, IndexError) and "no data" not in str(error):
                raise
            raise ValueError(f"A split of {self.options.dataset_name} has no rows ({error}). {EMPTY}") from error
        if "train" not in splits:
            raise ValueError(f"{self.options.dataset_name} has no split named train; it has {', '.join(splits)}.")
        return splits

    def _loaded(self) -> dict[str, Any]:
        name, streaming = self.options.dataset_name, self.options.streaming
        if not any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json")):
            refuse_pattern(name)
            return _as_splits(load_undecoded(name, self.options.dataset_config, streaming))
        splits = _as_splits(load_from_disk(name))
        return {split: part.to_iterable_dataset() for split, part in splits.items()} if streaming else splits

    @cached_property
    def columns(self) -> Features:
        """The features of all columns."""
        return _features_of(self._raw["train"])

    @cached_property
    def label_column(self) -> str:
        """The name of the label column."""
        if self.options.label_column is not None:
            return self._existing("label_column", self.options.label_column)
        named = [name for name in LABEL_NAMES if name in self.columns]
        classes = [name for name, feature in self.columns.items() if isinstance(feature, ClassLabel)]
        found = named[:1] or (classes if len(classes) == 1 else [])
        if not found:
            raise ValueError(
                f"{self.options.dataset_name} has columns {', '.join(self.columns)}: which one is the label? Choose it "
                "with --label_column."
            )
        return found[0]

    @cached_property
    def chosen(self) -> list[str]:
        """The names of the input columns; usually there is one."""
        if self.options.input_column is not None:
            return [self._existing("input_column", name) for name in self.options.input_column]
        fitting = self._fitting
        if len(fitting) != 1:
            numbers = [n for n, f in self.columns.items() if is_number(f) and n != self.label_column]
            hint = f" Columns of numbers ({shortened(numbers)}) can be chosen together." if len(numbers) > 1 else ""
            raise ValueError(
                f"{self.options.dataset_name} has {len(fitting)} columns that could be the input "
                f"({', '.join(fitting)}), among {', '.join(self.columns)}. Choose one with --input_column.{hint}"
            )
        return fitting

    @property
    def _fitting(self) -> list[str]:
        """The columns that can be the only input."""
        return [n for n in self.columns if n != self.label_column and self._kind_of(self.columns[n]) is not None]

    def _existing(self, option: str, name: str) -> str:
        if name not in self.columns:
            raise ValueError(f"{option}={name!r}: no such column. There are: {', '.join(self.columns)}.")
        return name

    def _kind_of(self, feature: Any) -> Input | None:
        chosen = self.options
        return input_of(
            feature, chosen.input_kind, chosen.max_length, chosen.sound_features, chosen.normalize_sequences
        )

    @cached_property
    def data(self) -> dict[str, Any]:
        """The splits with the input column, the label column, and each row's split and number."""
        chosen, label, name = self.chosen, self.label_column, self.input_column
        if self.options.sequence_id is not None:
            column = self._existing("sequence_id", self.options.sequence_id)
            parts = {split: sequences(part, chosen, label, column, name) for split, part in self._raw.items()}
            constant = [len(set(labels)) == 1 for part in parts.values() for labels in part[label][:]]
            if all(constant):  # one label for each sequence
                parts = {split: with_first_labels(part, label, self.columns[label]) for split, part in parts.items()}
            return {split: part.add_column(SPLIT, [split] * len(part)) for split, part in parts.items()}
        numbered = {split: self._numbered(part, split) for split, part in self._raw.items()}
        if len(chosen) == 1:
            return numbered
        inner = List(Value("float64"))
        kinds = {name: inner if joined(chosen, self.columns) == "steps" else List(inner), label: self.columns[label]}
        return {
            split: part.map(
                join_row,
                fn_kwargs={"columns": chosen, "name": name},
                remove_columns=chosen,
                features=Features({**kinds, ROW: Value("int64"), SPLIT: Value("string")}),
            )
            for split, part in numbered.items()
        }

    @property
    def input_column(self) -> str:
        """The name of the input column; several input columns are joined into one."""
        return "+".join(self.chosen)

    def _numbered(self, data: Any, split: str) -> Any:
        """Keep the input and label columns, do not decode sounds, and add each row's split and number."""
        data = data.select_columns([*self.chosen, self.label_column])
        for name in self.chosen:
            if isinstance(self.columns[name], Audio):
                data = data.cast_column(name, SoundFile(decode=False))
        if not self.options.streaming:
            return data.add_column(ROW, np.arange(len(data))).add_column(SPLIT, [split] * len(data))
        return data.map(number_row, fn_kwargs={"split": split}, with_indices=True)

    @cached_property
    def kind(self) -> Input:
        """The Input of the input column, not yet fitted.

        Raises:
            ValueError: the column cannot be the input, or its kind is ambiguous.
        """
        name = self.input_column
        feature = self.columns.get(name) or _features_of(self.data["train"])[name]
        if (kind := self._kind_of(feature)) is None:
            as_kind = "" if self.options.input_kind == "auto" else f" as {self.options.input_kind}"
            raise ValueError(
                f"Column {name!r} cannot be the input{as_kind}: it holds {feature}. A sequence is text, image, audio, "
                f"or a list of numbers. Fitting columns: {', '.join(self._fitting) or 'none'}."
            )
        is_given = self.options.input_kind != "auto" or len(self.chosen) > 1 or self.options.sequence_id is not None
        if not is_given and (is_text(feature) or is_series(feature) or isinstance(feature, Array2D)):
            reason = doubt(name, feature, [row[name] for row in self.first(PEEK, name)])
            if reason:
                raise ValueError(f"Column {name!r} holds {reason}. Say which with --input_kind.")
        return kind

    def first(self, count: int, *columns: str) -> list[Row]:
        """Return the first `count` training rows with only these columns."""
        return list(islice(self.data["train"].select_columns(list(columns)), count))

    @cached_property
    def target(self) -> Target:
        """The Target of the label column, not yet fitted."""
        label, name = self.label_column, self.input_column
        feature = self.columns[label] if self.options.sequence_id is None else _features_of(self.data["train"])[label]
        per_step = False
        if is_list(feature) and self.kind.can_label_steps:
            rows = [row for row in self.first(PEEK, label, name) if row[name] is not None]
            per_step = are_per_step([row[label] for row in rows], [self.kind.length(row[name]) for row in rows])
        return Target(feature, label, per_step)

    @cached_property
    def splits(self) -> Splits:
        """Train, validation and test. Rows of train are held out for splits that are missing or have no labels.

        Raises:
            ValueError: a split has no rows.
        """
        parts, label = self.data, self.label_column
        for name in ("train", "test", *VALIDATION_NAMES):
            if name in parts and next(iter(parts[name].select_columns(label)), None) is None:
                raise ValueError(f"Split {name!r} of {self.options.dataset_name} has no rows. {EMPTY}")
        train = parts["train"]
        validation = next((parts[name] for name in VALIDATION_NAMES if name in parts), None)
        shares = {"validation": (1, validation), "test": (2, parts.get("test"))}
        found: dict[str, Any] = {}
        for name, (number, part) in shares.items():
            seed = self.options.split_seed + 1000 * number
            if part is not None and self._is_labelled(part):
                found[name] = self._stored(part, seed) if self.options.streaming else part
                continue
            logger.warning("%s has no labelled %s split: rows of train are held out.", self.options.dataset_name, name)
            train, found[name] = self._hold_out(train, seed)
        return Splits(train, found["validation"], found["test"])

    def _is_labelled(self, data: Any) -> bool:
        """Whether a row (of a stream: one of the first) has a label: neither None nor a -1 that hides the class."""
        column = data.select_columns(self.label_column)
        rows = islice(column, PEEK) if self.options.streaming else column
        hidden = (None,) if self._has_class_minus_1 else (None, -1)
        return any(row[self.label_column] not in hidden for row in rows)

    @cached_property
    def _has_class_minus_1(self) -> bool:
        """Whether -1 is a class of the training rows (of a stream: of the first ones), as in the UCR archive."""
        if isinstance(self.columns.get(self.label_column), ClassLabel):
            return False
        column = self.data["train"].select_columns(self.label_column)
        rows = islice(column, PEEK) if self.options.streaming else column
        return any(row[self.label_column] == -1 for row in rows)

    def _hold_out(self, data: Any, seed: int) -> tuple[Any, Dataset]:
        """Return (rows that stay, rows that are held out)."""
        if self.options.streaming:
            limits = {"seed": seed, "share": self.options.held_out_share}
            held = data.filter(is_held_out, fn_kwargs={**limits, "held": True})
            return data.filter(is_held_out, fn_kwargs={**limits, "held": False}), self._stored(held, seed)
        from sklearn.model_selection import train_test_split

        if len(data) < 2:
            raise ValueError(
                f"{self.options.dataset_name}: train has too few rows to hold some out for validation and test: at "
                "least 3 are needed."
            )
        rows, labels = np.arange(len(data)), None if self.target.is_list else data[self.label_column][:]
        if labels is not None and None in labels:
            present(None, f"train row {labels.index(None)}, column {self.label_column!r}")
        options = {"test_size": self.options.held_out_share, "random_state": seed}
        try:
            stay, held = train_test_split(rows, stratify=None if self.target.is_number else labels, **options)
        except ValueError as error:  # a class has one row, or there are more classes than rows to hold out
            logger.warning(
                "%s: rows are held out at random, not in the proportions of the classes: %s",
                self.options.dataset_name,
                error,
            )
            stay, held = train_test_split(rows, **options)
        return data.select(np.sort(stay)), data.select(np.sort(held))

    def _stored(self, stream: IterableDataset, seed: int) -> Dataset:
        """Store a random sample of a stream's rows as a data set: the first rows may all be of one class."""
        rows = nsmallest(self.options.eval_rows, stream, key=partial(place, seed=seed))
        if not rows:
            raise ValueError(
                f"{self.options.dataset_name}: too few different rows to evaluate on. Raise held_out_share."
            )
        return Dataset.from_list(rows, features=stream.features)


def _as_splits(data: Any) -> dict[str, Any]:
    """Return the splits by name; a data set without splits becomes train."""
    return {"train": data} if isinstance(data, (Dataset, IterableDataset)) else dict(data)


def _features_of(data: Any) -> Features:
    """Return the features of a data set or stream."""
    return data.features if data.features is not None else data._resolve_features().features


def number_row(row: Row, index: int, split: str) -> Row:
    """Add a row's split and number as two columns."""
    return {**row, ROW: index, SPLIT: split}


def place(row: Row, seed: int) -> float:
    """Return a number from 0 to 1 that depends on the row's content and the seed only.

    Not on the row's number: that changes when the files are shuffled, or shared among the workers of a loader.
    """
    cells = sorted((name, cell) for name, cell in row.items() if name not in (ROW, SPLIT))
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for _, cell in cells:
        digest.update(_bytes_of(cell))
    return int.from_bytes(digest.digest()) / 2**64


def _bytes_of(cell: Any) -> bytes:
    """Return bytes that differ where the content of a cell differs."""
    if isinstance(cell, dict) and cell.get("bytes"):  # an undecoded sound
        return bytes(cell["bytes"])
    if isinstance(cell, dict) and cell.get("path"):
        return Path(cell["path"]).name.encode()
    if hasattr(cell, "tobytes"):  # an image or array
        return bytes(cell.tobytes())
    return repr(cell).encode()  # lists, text, numbers


def is_held_out(row: Row, seed: int, share: float, held: bool) -> bool:
    """Whether a row of a stream belongs to the rows held out (held=True) or to the others; its content decides."""
    return (place(row, seed) < share) is held
