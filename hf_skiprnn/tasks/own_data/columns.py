"""Find out which columns of a table can be the input, and whether their kind is ambiguous.

An ambiguous column is refused, not guessed. Otherwise training on the words of "[0.1, 0.2]", or on a series whose
channels were taken for steps, would run without an error and learn little.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, LargeList, List, Value

PEEK = 100  # number of first rows that are examined
TOKEN_NAMES = ("input_ids", "token_ids", "tokens", "ids")
LARGEST_PIXEL = 255  # integers of 0 to 255 may well be measurements; larger ones may be token ids
ROW = "row_number"  # added column: number of a row in its split, for error messages


def present(cell: Any, name: str) -> Any:
    """Return a cell; raise ValueError if it is None. `name` is its row and column."""
    if cell is None:
        raise ValueError(f"{name} is empty (None). Fill it, or leave such rows out.")
    return cell


def is_list(feature: Any) -> bool:
    """Whether a column holds lists."""
    return isinstance(feature, (List, LargeList))


def is_number(feature: Any) -> bool:
    """Whether a column holds one number a row."""
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float", "bool"))


def is_series(feature: Any) -> bool:
    """Whether a column holds [T] or [T][C] numbers."""
    if not is_list(feature):
        return False
    inner = feature.feature
    return is_number(inner.feature if is_list(inner) else inner)


def is_text(feature: Any) -> bool:
    """Whether a column holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def numbers_in(text: str) -> Any:
    """Parse a text that holds a list of numbers, in brackets or separated by commas, semicolons or spaces.

    Raises:
        ValueError: the text is not a list of numbers.
    """
    if text.strip().startswith("[["):
        return json.loads(text)
    bare = text.strip().strip("[]()")
    numbers = [float(part) for part in re.split(r"[,;\s]+", bare.strip()) if part]
    if len(numbers) < 2 and bare == text.strip():
        raise ValueError(f"expected at least two numbers: {text[:40]!r}")
    return numbers


def looks_like_numbers(text: Any) -> bool:
    """Whether a cell is a text that holds a list of numbers, as in CSV files."""
    try:
        numbers_in(text)
    except (ValueError, AttributeError):
        return False
    return True


def doubt(column: str, feature: Any, cells: Sequence[Any]) -> str | None:
    """Return why the kind of an input column is ambiguous and which kinds are possible; None if it is clear.

    Args:
        column: name of the column.
        feature: its `datasets` feature.
        cells: its cells in the first rows.
    """
    cells = [cell for cell in cells if cell is not None and len(cell)]
    if not cells:
        return None
    if is_text(feature):
        if all(map(looks_like_numbers, cells)):
            return f"text that looks like lists of numbers ({cells[0][:40]!r}): series (numbers), or words (as it is)"
        return None
    if is_list(feature) and not is_list(feature.feature):
        if not feature.feature.dtype.startswith(("int", "uint")):
            return None
        low, high = min(map(min, cells)), max(map(max, cells))
        if low >= 0 and (column in TOKEN_NAMES or high > LARGEST_PIXEL):
            return f"integers from {low} to {high}: tokens (ids that are embedded), or series (numbers)"
        return None
    outer, inner = {len(cell) for cell in cells}, {len(cell[0]) for cell in cells if cell[0] is not None}
    if len(outer) == 1 and len(cells) > 1 and (len(inner) > 1 or max(inner) > max(outer)):
        widths = f"{min(inner)} to {max(inner)}" if len(inner) > 1 else f"{max(inner)}"
        return (
            f"{max(outer)} lists of {widths} numbers in every row: series ({max(outer)} steps), or channels_first "
            f"({max(outer)} channels)"
        )
    return None


def joined(columns: Sequence[str], features: Features) -> str:
    """Return whether several input columns are the "steps" of one series or its "channels".

    Raises:
        ValueError: a column holds neither numbers nor lists of numbers, or the columns are of both kinds.
    """
    if all(is_number(features[column]) for column in columns):
        return "steps"
    if all(is_series(features[column]) and not is_list(features[column].feature) for column in columns):
        return "channels"
    held = ", ".join(f"{column}: {features[column]}" for column in columns)
    raise ValueError(
        f"Several input columns must all hold one number a row, or all lists of numbers; they hold {held}."
    )


def join_row(row: dict[str, Any], columns: list[str], name: str) -> dict[str, Any]:
    """Join the input columns of a row to one series: [number of columns], or [T][number of columns] for lists."""
    cells = [row[column] for column in columns]
    if any(cell is None for cell in cells):
        return {name: None}
    if not isinstance(cells[0], (list, np.ndarray)):
        return {name: cells}
    lengths = {column: len(cell) for column, cell in zip(columns, cells, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{row.get(ROW, 'a row')}: input columns must have the same number of steps; got {lengths}.")
    return {name: [list(step) for step in zip(*cells, strict=True)]}


def sequences(data: Dataset, columns: list[str], label: str, sequence_id: str, name: str) -> Dataset:
    """Turn a table with one row for each step into a table with one row for each sequence.

    Args:
        data: the table.
        columns: columns of numbers, which become the channels.
        label: label column. A sequence gets one label, or one for each step if the label changes within a sequence.
        sequence_id: column that has the same value in all rows of a sequence. The rows keep their order.
        name: name of the new column, which holds series [T][number of columns].

    Returns:
        Columns `name`, `label` (a list if there is one for each step) and ROW, the number of a sequence's first row.
    """
    wrong = [column for column in columns if not is_number(data.features[column])]
    if wrong:
        raise ValueError(f"With sequence_id the input columns hold numbers; {', '.join(wrong)} do not.")
    ids = data[sequence_id][:]
    if None in ids:
        raise ValueError(f"Row {ids.index(None)}, column {sequence_id!r} is empty (None). Fill it.")
    rows: dict[Any, list[int]] = {}
    for number, value in enumerate(ids):
        rows.setdefault(value, []).append(number)
    steps = np.stack([np.array(data[column][:], np.float64) for column in columns], axis=1)  # None becomes NaN
    labels = data[label][:]
    of_sequences = [[labels[number] for number in numbers] for numbers in rows.values()]
    content = {
        name: [steps[numbers].tolist() for numbers in rows.values()],
        label: of_sequences,
        ROW: [numbers[0] for numbers in rows.values()],
    }
    kinds = {name: List(List(Value("float64"))), label: List(data.features[label]), ROW: Value("int64")}
    return Dataset.from_dict(content, features=Features(kinds))


def with_first_labels(data: Dataset, label: str, feature: Any) -> Dataset:
    """Replace the list of labels of each sequence by the first label."""
    first = [labels[0] for labels in data[label][:]]
    return data.remove_columns(label).add_column(label, first).cast_column(label, feature)


def shortened(value: Any) -> str:
    """Return an example as text of at most 60 characters; for a sound, its path."""
    if isinstance(value, dict):
        value = value.get("path") or sorted(value)
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
