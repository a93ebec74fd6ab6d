"""The cells of a batch's rows, with names for errors; what types they have, and what numbers they hold."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Row = Mapping[str, Any]
Cells = list[tuple[Any, str]]  # (content, name for errors)

KEEP_COLUMNS = (
    "transformers' Trainer removes columns that the model does not take: set remove_unused_columns=False in "
    "TrainingArguments."
)


def cells_of(rows: Iterable[Row], column: str) -> Cells:
    """Return the cells of a column with their names for errors."""
    found = []
    for number, row in enumerate(rows):
        if column not in row:
            near = difflib.get_close_matches(column, list(row), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Row {number} of the batch has no column {column!r}.{hint} It has: {', '.join(row)}. {KEEP_COLUMNS}"
            )
        found.append((row[column], f"Row {number} of the batch, column {column!r},"))
    return found


def plain(value: Any) -> Any:
    """Return tensors, arrays and NumPy numbers as Python's numbers and lists."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def present(cell: Any, name: str) -> Any:
    """Return a cell; raise ValueError if it is None."""
    if cell is None:
        raise ValueError(f"{name} is empty (None). Fill it, or leave such rows out.")
    return cell


def ids_of(cell: Any, name: str) -> Tensor:
    """Return token ids or a mask [T] as int64."""
    cell = present(cell, name)
    try:
        ids = np.asarray(cell.cpu() if isinstance(cell, Tensor) else cell)
    except (ValueError, TypeError):  # lists of different lengths, or of tensors on a device
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.dtype.kind not in "biu" and ids.size):
        raise ValueError(f"{name} must hold a list of integers; got {str(cell)[:60]}.")
    return torch.from_numpy(ids.astype(np.int64))


def is_sound(cell: Any) -> bool:
    """Whether a cell is a sound of `datasets.Audio`, decoded or not."""
    return hasattr(cell, "get_all_samples") or (isinstance(cell, Mapping) and ("array" in cell or "path" in cell))


def samples(cell: Any, name: str, sampling_rate: int | None) -> Any:
    """Return the samples [T] of a sound; a file is read and resampled."""
    if sampling_rate is None:
        raise ValueError(f"{name} is a sound: give the feature extractor a sampling_rate.")
    if isinstance(cell, Mapping) and "array" not in cell:
        from hf_skiprnn.tasks.readers.sounds import read_sound

        return read_sound(cell, name, sampling_rate)[0]
    if (rate := cell["sampling_rate"]) != sampling_rate:
        raise ValueError(
            f"{name} has {rate} samples per second; the feature extractor reads {sampling_rate}. Cast the column: "
            f"data.cast_column(..., Audio(sampling_rate={sampling_rate}))."
        )
    return cell["array"]


def axes(cell: Any) -> int:
    """Return the number of axes of an array or of nested lists."""
    if isinstance(cell, (list, tuple)):
        return 1 + (axes(cell[0]) if cell else 0)
    return getattr(cell, "ndim", 0)


def same_shape(parts: list[Tensor], names: list[str]) -> Tensor:
    """Return the parts of a batch as one tensor; a row of another shape or type than the first is named."""
    first = parts[0]
    for part, name in zip(parts, names, strict=True):
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            got, wanted = (f"{tuple(x.shape)} of {x.dtype}" for x in (part, first))
            raise ValueError(f"{name} gives {got}, but the first one {wanted}. All rows must be alike.")
    return torch.stack(parts)
