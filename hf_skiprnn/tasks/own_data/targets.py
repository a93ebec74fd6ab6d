"""The kinds of label columns: one class, several classes, a class at every step, or numbers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Value
from torch import Tensor
from transformers import EvalPrediction

from hf_skiprnn.evaluation.metrics import (
    accuracy,
    balanced_accuracy,
    explained_variance,
    mean_squared_error,
    micro_f1,
)
from hf_skiprnn.model.losses_skip_rnn import IGNORED
from hf_skiprnn.tasks.base import label_names

from .columns import is_list, present

NUMBERS = ("float16", "float32", "float64")
CLASSES = ("int", "uint", "bool", "string", "large_string")
MOST_CLASSES = 0.5  # a column with more different values than this share of its rows does not hold classes


def are_per_step(labels: Sequence[Any], lengths: Sequence[int]) -> bool:
    """Whether lists of labels hold one label for each step, rather than several labels of a sequence.

    They do if every list is as long as its sequence and, in addition, lengths differ or a list holds a class twice.
    """
    known = [(label, length) for label, length in zip(labels, lengths, strict=True) if label is not None]
    if not known or any(len(label) != length for label, length in known):
        return False
    return len({length for _, length in known}) > 1 or any(len(set(label)) < len(label) for label, _ in known)


class Target:
    """A label column: its classes or numbers, and their metrics.

    Args:
        feature: its `datasets` feature.
        column: name of the column.
        per_step: lists hold one class for each step, not several classes of a sequence.

    Raises:
        ValueError: the column cannot be a label.
    """

    def __init__(self, feature: Any, column: str, per_step: bool = False) -> None:
        self.column, self.per_step = column, per_step
        self.is_list = is_list(feature)
        inner = feature.feature if self.is_list else feature
        self.names = list(inner.names) if isinstance(inner, ClassLabel) else None
        dtype = inner.dtype if isinstance(inner, Value) else ""
        self.is_number = dtype in NUMBERS
        if self.names is None and not self.is_number and not dtype.startswith(CLASSES):
            raise ValueError(
                f"Column {column!r} cannot be the label: it holds {feature}. A label is a class (integer, string, "
                "class label), a number, or a list of either. Choose another with --label_column."
            )
        if self.is_number and per_step:
            raise ValueError(
                f"Column {column!r} holds a float for each step, but only classes can be predicted at every step. "
                "Write classes as integers or strings, or choose another column with --label_column."
            )
        self.counts: Counter[int] = Counter()  # number of rows of each class
        self.width = 1  # number of numbers in a row's label

    @property
    def kind(self) -> str:
        """The kind of the label, in words."""
        if self.is_number:
            return f"{self.width} number{'s' if self.width > 1 else ''} to be predicted"
        kind = "a class at every step" if self.per_step else "several classes" if self.is_list else "a class"
        return f"{kind}, of {len(self.labels)}"

    def fit(self, labels: Iterable[Any]) -> None:
        """Find the classes in the training labels and count their rows; for numbers, find how many a row has.

        Raises:
            ValueError: a row has no label; there are too many classes; or all rows have the same class.
        """
        values = [(value, f"train row {row}, column {self.column!r}") for row, value in enumerate(labels)]
        if self.is_number:
            self.width = len(present(*values[0])) if self.is_list else 1
            return
        if self.names is None:
            self.values = sorted({one for value, name in values for one in self._each(value, name)})
            if len(values) > 20 and len(self.values) > MOST_CLASSES * len(values) and not self.per_step:
                raise ValueError(
                    f"Column {self.column!r} holds {len(self.values)} different values in {len(values)} rows, which is "
                    "too many for classes. Choose the label with --label_column; numbers to predict must be floats."
                )
        self._ids = {value: i for i, value in enumerate(self.classes)}
        self.counts = Counter(self._id(one, name) for value, name in values for one in self._each(value, name))
        if len(self.counts) < 2 and not (self.is_list and not self.per_step):
            (only,) = self.counts or (None,)
            raise ValueError(
                f"All {len(values)} training labels in column {self.column!r} are "
                f"{'missing' if only is None else repr(self.classes[only])}: there is nothing to learn from one class. "
                "Choose the label with --label_column."
            )

    @property
    def classes(self) -> list[Any]:
        """The values of the classes in the data, in the order of their ids."""
        return list(range(len(self.names))) if self.names is not None else self.values

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, or of the numbers to predict."""
        if self.is_number:
            return tuple(f"{self.column}_{i}" for i in range(self.width))
        return tuple(self.names if self.names is not None else map(str, self.values))

    def model_defaults(self) -> dict[str, Any]:
        """Return the fields of SkipRNNConfig: number and names of the outputs, and the problem type."""
        if self.is_number:
            return {"num_labels": self.width, "problem_type": "regression"}
        is_multi_label = self.is_list and not self.per_step
        kind = "multi_label_classification" if is_multi_label else "single_label_classification"
        return {"problem_type": kind, **label_names(self.labels)}

    def encode(self, cells: Iterable[tuple[Any, str]]) -> Tensor:
        """Encode the labels in cells (content, name) as a tensor.

        Returns:
            [B] integers for one class, [B, C] of 0 and 1 for several classes, [B] or [B, width] for numbers.
        """
        if self.is_number:
            return torch.tensor([self._numbers(value, name) for value, name in cells], dtype=torch.float32)
        if not self.is_list:
            return torch.tensor([self._id(present(value, name), name) for value, name in cells])
        rows = [[self._id(one, name) for one in self._each(value, name)] for value, name in cells]
        several = torch.zeros(len(rows), len(self.classes))
        for row, ids in zip(several, rows, strict=True):
            row[ids] = 1.0
        return several

    def encode_steps(self, cells: Iterable[tuple[Any, str]], mask: Tensor, max_length: int | None) -> Tensor:
        """Return the classes of every step, [B, T] integer, -100 at padding.

        Args:
            cells: (content, name) of each row.
            mask: [B, T], the attention_mask of the inputs.
            max_length: keep only the first max_length steps, as for the inputs.

        Raises:
            ValueError: a row has more or fewer labels than steps.
        """
        found = torch.full(mask.shape, IGNORED)
        for labels, real, (value, name) in zip(found, mask != 0, cells, strict=True):
            ids = [self._id(one, name) for one in self._each(value, name)][:max_length]
            if len(ids) != int(real.sum()):
                raise ValueError(f"{name} must hold a label for each of {int(real.sum())} steps; it holds {len(ids)}.")
            labels[real] = torch.tensor(ids)
        return found

    def _each(self, value: Any, name: str) -> list[Any]:
        """Return the classes of a row as a list."""
        return list(present(value, name)) if self.is_list else [present(value, name)]

    def _id(self, value: Any, name: str) -> int:
        if value not in self._ids:
            some = ", ".join(map(repr, self.classes[:10]))
            raise ValueError(
                f"{name} holds {value!r}, which is not one of the {len(self.classes)} training classes: {some}."
            )
        return self._ids[value]

    def _numbers(self, value: Any, name: str) -> Any:
        numbers = np.asarray(present(value, name), np.float64)
        if numbers.shape != ((self.width,) if self.is_list else ()) or not np.isfinite(numbers).all():
            wanted = f"{self.width} finite numbers" if self.is_list else "one finite number"
            raise ValueError(f"{name} must hold {wanted}; got {value!r}.")
        return numbers.tolist()

    def class_weights(self) -> Tensor:
        """Return weights [C] that make all classes count equally and have mean 1 over rows; 0 for an absent class."""
        counts = torch.tensor([self.counts[i] for i in range(len(self.classes))], dtype=torch.float32)
        return torch.where(counts > 0, counts.sum() / ((counts > 0).sum() * counts.clamp(min=1)), 0.0)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics for the kind of the label.

        One class: accuracy and balanced accuracy (mean recall of the classes); with a class at every step, over all
        real steps. Several classes: micro-averaged F1. Numbers: mean squared error and R2.
        """
        outputs, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if self.is_number:
            found = {"mse": mean_squared_error(outputs, labels)}
            return found | ({"r2": explained_variance(outputs, labels)} if len(labels) > 1 else {})
        if self.is_list and not self.per_step:
            return {"f1": micro_f1(outputs, labels)}
        if self.per_step:
            outputs, labels = outputs[labels != IGNORED], labels[labels != IGNORED]
        return {"accuracy": accuracy(outputs, labels), "balanced_accuracy": balanced_accuracy(outputs, labels)}

    def shown(self, outputs: np.ndarray) -> list[str]:
        """Describe predictions in words, for figures, from logits or numbers [B, C] or logits [B, T, C]."""
        if self.per_step:
            return [_most_common([self.labels[i] for i in row.argmax(axis=1)]) for row in outputs]
        if self.is_number:
            return [" ".join(f"{x:.3g}" for x in np.atleast_1d(row)) for row in outputs.reshape(len(outputs), -1)]
        if self.is_list:
            return [", ".join(self.labels[i] for i in np.flatnonzero(row > 0)) or "none" for row in outputs]
        return [self.labels[i] for i in outputs.argmax(axis=1)]

    def truth(self, labels: np.ndarray) -> list[str]:
        """Describe labels in words, for figures."""
        if self.per_step:
            return [_most_common([self.labels[i] for i in row[row != IGNORED]]) for row in labels]
        if self.is_number or self.is_list:
            return self.shown(labels)
        return [self.labels[i] for i in labels]


def _most_common(names: Sequence[str]) -> str:
    """Return the three most common classes of a row's steps."""
    return ", ".join(name for name, _ in Counter(names).most_common(3))
