"""The labels of a batch: names become numbers of classes, several classes 0 and 1, and steps may have their own."""

import difflib
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_skiprnn.model.losses_skip_rnn import IGNORED

from .cells import Cells, plain, present, same_shape

UNNAMED = re.compile(r"LABEL_\d+")  # names that transformers gives to classes without names


class Targets:
    """The labels of a model: names and numbers of its classes, or numbers to predict.

    Args:
        config: the model's config.
        per_step: a label belongs to each step.
    """

    def __init__(self, config: Any, per_step: bool) -> None:
        self.config, self.per_step = config, per_step
        self._read_config()

    def _read_config(self) -> None:
        """Read the kind and the number of labels, and the classes' numbers by name ({}: transformers made names up)."""
        config = self.config
        names = {str(name): int(i) for i, name in config.id2label.items()}
        self.ids = {} if all(map(UNNAMED.fullmatch, names)) else names
        self.kind, self.count = config.problem_type, config.num_labels

    def encode(self, cells: Cells, mask: Tensor, max_length: int | None) -> Tensor:
        """Return labels for a batch with this mask [B, T]; shapes as in SkipRNNDataCollator.__call__."""
        self._read_config()  # once a batch, because reading a config takes long
        names = [name for _, name in cells]
        values = [present(plain(cell), name) for cell, name in cells]
        if not self.per_step:
            return same_shape([self._label(*cell) for cell in zip(values, names, strict=True)], names)
        rows = zip(values, names, mask != 0, strict=True)
        return same_shape([self._of_steps(steps, name, real, max_length) for steps, name, real in rows], names)

    def _of_steps(self, steps: Any, name: str, real: Tensor, max_length: int | None) -> Tensor:
        """Return the labels of a row's steps, [T] or [T, C], from a label for each real step; real: [T] bool."""
        if not isinstance(steps, list) or len(steps[:max_length]) != int(real.sum()) or not steps:
            held = len(steps) if isinstance(steps, list) else repr(steps)
            raise ValueError(f"{name} must hold a list of labels, one for each of {int(real.sum())} steps; got {held}.")
        labels = [self._label(step, f"{name} step {number},") for number, step in enumerate(steps[:max_length])]
        found = torch.full((len(real), *labels[0].shape), IGNORED, dtype=labels[0].dtype)
        found[real] = same_shape(labels, [name] * len(labels))
        return found

    def _label(self, value: Any, name: str) -> Tensor:
        """Return one class, several classes or numbers as a tensor: [] int64, [C] float32, [] or [C] float32."""
        kind = self.kind
        if not self.per_step and (kind == "regression" or self.count == 1):
            return self._numbers(value, name)
        if not isinstance(value, list):
            if kind == "multi_label_classification":
                raise ValueError(f"{name} must hold a list, because a row may have several classes; got {value!r}.")
            return torch.tensor(self._id(value, name))
        if kind == "single_label_classification" and not self.per_step:
            raise ValueError(
                f"{name} holds a list, {value!r}, but a row has one class. For several classes set "
                'problem_type="multi_label_classification" in the config; for a class at every step, use a '
                "SkipRNNForFrameClassification."
            )
        return self._several(value, name)

    def _numbers(self, value: Any, name: str) -> Tensor:
        width = self.count
        shapes = ((), (1,)) if width == 1 else ((width,),)
        try:
            numbers = np.asarray(value, np.float32)
        except (ValueError, TypeError):
            numbers = np.full(len(value), np.nan, np.float32)
        if numbers.shape not in shapes or not np.isfinite(numbers).all() or isinstance(value, str):
            wanted = "one finite number" if width == 1 else f"{width} finite numbers"
            raise ValueError(f"{name} must hold {wanted}, because the model predicts numbers; got {value!r}.")
        return torch.from_numpy(numbers.reshape(shapes[0]))

    def _several(self, values: list[Any], name: str) -> Tensor:
        """Return [C] of 0 and 1, from names or numbers of classes, or from floats of 0 and 1."""
        width = self.count
        if values and all(isinstance(value, float) for value in values):
            if len(values) != width or not {0.0, 1.0, float(IGNORED)}.issuperset(values):
                raise ValueError(f"{name} holds floats, which must be {width} of 0 and 1, a class each; got {values}.")
            return torch.tensor(values)
        if len(values) == width and all(value in (0, 1) for value in values):
            raise ValueError(
                f"{name} holds {values}: numbers of classes, or a 0 or 1 for each class? Write classes by name, or 0 "
                "and 1 as floats."
            )
        found = torch.zeros(width)
        found[[self._id(value, name) for value in values]] = 1.0
        return found

    def _id(self, value: Any, name: str) -> int:
        """Return the number of a class.

        Raises:
            ValueError: it is not one of the model's classes.
        """
        ids, count = self.ids, self.count
        if isinstance(value, str):
            if not ids:
                raise ValueError(
                    f"{name} holds {value!r}, but the model's config has no names of classes. Make the model with "
                    "SkipRNNConfig(..., label2id={name: i for i, name in enumerate(names)}), where names lists the "
                    "classes, such as sorted(set(data['label']))."
                )
            if value not in ids:
                near = difflib.get_close_matches(value, ids, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                some = ", ".join(map(repr, list(ids)[:10]))
                raise ValueError(f"{name} holds {value!r}, none of the model's {count} classes: {some}.{hint}")
            return ids[value]
        if not isinstance(value, int):
            raise ValueError(
                f"{name} must hold a class, as integer or name; got {value!r}. To predict numbers, set num_labels=1 or "
                'problem_type="regression" in the config.'
            )
        if value != IGNORED and not 0 <= value < count:
            raise ValueError(f"{name} holds class {value}; the model has num_labels = {count}: 0 to {count - 1}.")
        if ids.get(str(value), value) != value:
            raise ValueError(
                f"{name} holds {value}, the number of one class and the name of class {ids[str(value)]}. Write names "
                "as text, or name the classes otherwise."
            )
        return int(value)
