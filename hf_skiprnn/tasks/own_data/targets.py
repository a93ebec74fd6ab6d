"""What a label column can ask: one class, several classes, or numbers; strings, integers and class labels alike."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, LargeList, List, Value
from torch import Tensor
from transformers import EvalPrediction

from hf_skiprnn.evaluation.metrics import accuracy, mean_squared_error
from hf_skiprnn.tasks.base import label_names

NUMBERS = ("float16", "float32", "float64")
CLASSES = ("int", "uint", "bool", "string", "large_string")
MOST_CLASSES = 0.5  # of the rows: with more, a column holds no classes


class Target:
    """A label column, known by its feature and by the training labels."""

    def __init__(self, feature: Any, column: str) -> None:
        self.column = column
        self.is_list = isinstance(feature, (List, LargeList))
        inner = feature.feature if self.is_list else feature
        self.names = list(inner.names) if isinstance(inner, ClassLabel) else None
        dtype = inner.dtype if isinstance(inner, Value) else ""
        self.is_number = dtype in NUMBERS
        if self.names is None and not self.is_number and not dtype.startswith(CLASSES):
            raise ValueError(
                f"Column {column!r} cannot be the label: it holds {feature}. A label is a class (integer, string, "
                "class label), a number, or a list of either. Choose another with --label_column."
            )
        self.counts: Counter[int] = Counter()  # rows of each class
        self.width = 1  # numbers per row

    def fit(self, labels: Iterable[Any]) -> None:
        """See the classes and how often each comes; of numbers, how many a row has."""
        values = [(value, f"train row {row}, column {self.column!r}") for row, value in enumerate(labels)]
        if self.is_number:
            self.width = len(_present(*values[0])) if self.is_list else 1
            return
        if self.names is None:
            self.values = sorted({one for value, name in values for one in self._each(value, name)})
            if len(values) > 20 and len(self.values) > MOST_CLASSES * len(values):
                raise ValueError(
                    f"Column {self.column!r} holds {len(self.values)} different values in {len(values)} rows: these "
                    "are no classes. Choose the label with --label_column; numbers to be predicted must be floats."
                )
        self._ids = {value: i for i, value in enumerate(self.classes)}
        self.counts = Counter(self._id(one, name) for value, name in values for one in self._each(value, name))

    @property
    def classes(self) -> list[Any]:
        """The values that stand for classes, as they are in the data."""
        return list(range(len(self.names))) if self.names is not None else self.values

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; of a regression's outputs."""
        if self.is_number:
            return tuple(f"{self.column}_{i}" for i in range(self.width))
        return tuple(self.names if self.names is not None else map(str, self.values))

    def model_defaults(self) -> dict[str, Any]:
        """Number and names of outputs, and the kind of problem."""
        if self.is_number:
            return {"num_labels": self.width, "problem_type": "regression"}
        kind = "multi_label_classification" if self.is_list else "single_label_classification"
        return {"problem_type": kind, **label_names(self.labels)}

    def encode(self, cells: Iterable[tuple[Any, str]]) -> Tensor:
        """(label, name of its cell) -> [B] classes, or [B, C] of 0 and 1, or [B] or [B, C] numbers."""
        if self.is_number:
            return torch.tensor([self._numbers(value, name) for value, name in cells], dtype=torch.float32)
        if not self.is_list:
            return torch.tensor([self._id(_present(value, name), name) for value, name in cells])
        rows = [[self._id(one, name) for one in self._each(value, name)] for value, name in cells]
        several = torch.zeros(len(rows), len(self.classes))
        for row, ids in zip(several, rows, strict=True):
            row[ids] = 1.0
        return several

    def _each(self, value: Any, name: str) -> list[Any]:
        """The classes of a row."""
        return list(_present(value, name)) if self.is_list else [_present(value, name)]

    def _id(self, value: Any, name: str) -> int:
        if value not in self._ids:
            some = ", ".join(map(repr, self.classes[:10]))
            raise ValueError(
                f"{name} holds {value!r}, which is none of the {len(self.classes)} training classes: {some}."
            )
        return self._ids[value]

    def _numbers(self, value: Any, name: str) -> Any:
        numbers = np.asarray(_present(value, name), np.float64)
        if numbers.shape != ((self.width,) if self.is_list else ()) or not np.isfinite(numbers).all():
            wanted = f"{self.width} finite numbers" if self.is_list else "one finite number"
            raise ValueError(f"{name} must hold {wanted}; got {value!r}.")
        return numbers.tolist()

    def class_weights(self) -> Tensor:
        """[C]: every class weighs as much as any other, a row 1 on average; a class without rows weighs nothing."""
        counts = torch.tensor([self.counts[i] for i in range(len(self.classes))], dtype=torch.float32)
        return torch.where(counts > 0, counts.sum() / ((counts > 0).sum() * counts.clamp(min=1)), 0.0)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy and the mean of the classes' recalls; F1 of several labels; squared error and explained variance."""
        outputs, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if self.is_number:
            mse = mean_squared_error(outputs.reshape(-1), labels.reshape(-1))
            return {"mse": mse, "r2": 1 - mse / max(float(labels.reshape(outputs.shape).var(axis=0).mean()), 1e-30)}
        if self.is_list:
            hits = float(((outputs > 0) & (labels > 0)).sum())
            return {"f1": 2 * hits / max(float((outputs > 0).sum() + (labels > 0).sum()), 1.0)}
        right = outputs.argmax(axis=1) == labels
        recalls = [right[labels == c].mean() for c in np.unique(labels)]
        return {"accuracy": accuracy(outputs, labels), "balanced_accuracy": float(np.mean(recalls))}

    def shown(self, outputs: np.ndarray) -> list[str]:
        """Predictions in words, for pictures: outputs [B, C] are logits."""
        if self.is_number:
            return [" ".join(f"{x:.3g}" for x in np.atleast_1d(row)) for row in outputs.reshape(len(outputs), -1)]
        if self.is_list:
            return [", ".join(self.labels[i] for i in np.flatnonzero(row > 0)) or "none" for row in outputs]
        return [self.labels[i] for i in outputs.argmax(axis=1)]

    def truth(self, labels: np.ndarray) -> list[str]:
        """Labels in words."""
        if self.is_number or self.is_list:
            return self.shown(labels)
        return [self.labels[i] for i in labels]


def _present(value: Any, name: str) -> Any:
    if value is None:
        raise ValueError(f"{name} has no label (None). Fill it, or leave such rows out.")
    return value
