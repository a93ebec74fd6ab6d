"""What benchmark.py's numbers are asked to be, and the table that says pass or miss."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

Rows = list[dict[str, str]]
RATES = (1.0, 0.5, 0.25)
# nn.LSTM's or nn.GRU's time over ours, one thread, at these rates of updates; T 784, I 1, H 110.
NATIVE: dict[tuple[str, str, int], tuple[float, float, float]] = {
    ("lstm", "inference", 1): (2, 4, 8),
    ("lstm", "inference", 16): (1.2, 2.4, 4.8),
    ("lstm", "inference", 64): (1.5, 3, 6),
    ("lstm", "inference", 256): (1.8, 3.6, 7.2),
    ("lstm", "training", 16): (1.8, 3.6, 7),
    ("lstm", "training", 64): (2, 4, 8),
    ("lstm", "training", 256): (2, 4, 8),
    ("gru", "inference", 1): (8, 16, 32),
    ("gru", "inference", 16): (3, 6, 12),
    ("gru", "inference", 64): (3, 6, 12),
    ("gru", "inference", 256): (3, 6, 12),
    ("gru", "training", 16): (2, 3.5, 6),
    ("gru", "training", 64): (2, 3.5, 6),
    ("gru", "training", 256): (2, 3.5, 6),
}
# The masked loop's time over ours, B 256.
MASKED = {"inference": (5.0, 10.0, 20.0), "training": (2.0, 4.0, 8.0)}
SHARE_OF_PEAK = 0.75  # of wide shapes
TWO_THREADS = 1.7  # times faster than one, B >= 16


def read(path: Path) -> Rows:
    """The rows of a CSV file; none where it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _find(rows: Rows, **wanted: object) -> dict[str, str] | None:
    """The row with these values."""
    wanted = {"level": "layer", "threads": 1, "name": "ours", "spread": "constant", "sequence": False} | wanted
    found = [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]
    return found[-1] if found else None


def _cell(rate: float, value: float, target: float) -> str:
    return f"{rate:4.0%}: {value:6.2f} ({target:g}) {'pass' if value >= target else 'MISS'}"


def _where(row: Mapping[str, str]) -> str:
    shape = f"({row['batch']}, {row['steps']}, {row['inputs']}, {row['units']})"
    return f"{row['cell']:5}{row['mode']:10}{shape:22}{float(row['rate']):4.0%}"


def _narrow(cell: str, mode: str, batch: int) -> Iterator[tuple[int, dict[str, object]]]:
    """Index of the rate, and how its row is found."""
    for index, rate in enumerate(RATES):
        yield index, {"cell": cell, "mode": mode, "batch": batch, "steps": 784, "inputs": 1, "units": 110, "rate": rate}


def _against_native(rows: Rows) -> Iterator[str]:
    for (cell, mode, batch), targets in NATIVE.items():
        cells = []
        for index, where in _narrow(cell, mode, batch):
            if row := _find(rows, **where):
                cells.append(_cell(RATES[index], float(row["native_over_this"]), targets[index]))
        if cells:
            yield f"  {cell:5}{mode:10} B {batch:<4}" + "   ".join(cells)


def _against_the_masked_loop(rows: Rows) -> Iterator[str]:
    for cell in ("lstm", "gru"):
        for mode, targets in MASKED.items():
            cells = []
            for index, where in _narrow(cell, mode, 256):
                ours, loop = _find(rows, **where), _find(rows, name="masked_loop", **where)
                if ours and loop:
                    cells.append(_cell(RATES[index], float(loop["p50_ms"]) / float(ours["p50_ms"]), targets[index]))
            if cells:
                yield f"  {cell:5}{mode:10} masked loop over ours  " + "   ".join(cells)


def _wide(rows: Rows) -> Iterator[str]:
    for row in rows:
        if row["name"] != "ours" or row["level"] != "layer" or row["threads"] != "1" or int(row["inputs"]) < 300:
            continue
        share, ratio = float(row["share_of_peak"]), float(row["native_over_this"])
        verdict = "pass" if share >= SHARE_OF_PEAK and ratio >= 1 else "MISS"
        yield f"  {_where(row)}: {share:.0%} of peak ({SHARE_OF_PEAK:.0%}), {ratio:.2f} (1) {verdict}"


def _two_threads(rows: Rows) -> Iterator[str]:
    for row in rows:
        if row["name"] != "ours" or row["threads"] != "2" or int(row["batch"]) < 16:
            continue
        same = {
            key: value
            for key, value in row.items()
            if key
            in ("level", "cell", "mode", "batch", "steps", "inputs", "units", "layers", "sequence", "rate", "spread")
        }
        if one := _find(rows, **same):
            gain = float(one["p50_ms"]) / float(row["p50_ms"])
            verdict = "pass" if gain >= TWO_THREADS else "MISS"
            yield f"  {_where(row)}: {gain:.2f} ({TWO_THREADS:g}) {verdict}"


TABLES: Mapping[str, object] = {
    "nn.LSTM's or nn.GRU's time over ours, one thread (target)": _against_native,
    "the masked loop's time over ours, one thread (target)": _against_the_masked_loop,
    "wide shapes: share of the measured peak, and the native layer's time over ours (targets)": _wide,
    "two threads over one (target)": _two_threads,
}


def report(rows: Rows) -> None:
    """Print what was asked for beside what was measured, with pass or MISS."""
    for title, table in TABLES.items():
        lines = list(table(rows))  # type: ignore[operator]
        if lines:
            print("\n" + "\n".join((title, *lines)))
