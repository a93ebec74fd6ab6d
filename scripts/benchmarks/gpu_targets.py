"""The targets of the GPU benchmark, and the table that says which are met: pass or MISS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from scripts.benchmarks.rows import Rows


class Target(NamedTuple):
    """The smallest ratio of cuDNN's time to ours at an update rate, for inference and training."""

    batch: int
    steps: int
    inputs: int
    units: int
    rate: float
    at_least: float


NARROW = ((256, 784, 1, 110), (256, 784, 1, 128))
TARGETS = [
    *(Target(*shape, rate, least) for shape in NARROW for rate, least in ((0.5, 1.5), (0.25, 3.0), (1.0, 1.0))),
    *(Target(64, 250, 2048, 512, rate, least) for rate, least in ((0.5, 1.5), (0.25, 3.0))),
]
MEMORY_RATE, MEMORY = 0.25, 1 / 3  # at this update rate, training takes at most this share of cuDNN's memory
FIXED = {"cell": "lstm", "layers": "1", "sequence": "False", "spread": "constant"}


def find(rows: Rows, name: str, target: Target, mode: str, precision: str) -> dict[str, str] | None:
    """Return the newest row of a measurement without an error; None if there is none."""
    where = {name: str(value) for name, value in target._asdict().items() if name != "at_least"}
    where |= FIXED | {"name": name, "mode": mode, "precision": precision}
    found = [row for row in rows if not row["error"] and all(row[key] == value for key, value in where.items())]
    return found[-1] if found else None


def verdict(holds: bool, row: dict[str, str]) -> str:
    """Return pass or MISS; results of an engine that failed its equality checks are not judged."""
    if row["equality"] != "passed":
        return f"not judged, equality: {row['equality']}"
    return "pass" if holds else "MISS"


def operations(row: dict[str, str]) -> float:
    """Return the floating-point operations of the updates: two per multiply-add, times three in training."""
    units, inputs, updates = int(row["units"]), int(row["inputs"]), int(row["slowest_row_updates"])
    factor = (units + inputs) if row["mode"] == "inference" else (3 * units + 2 * inputs)
    return 2.0 * 4 * units * factor * updates * int(row["batch"])


def lines(rows: Rows) -> Iterator[str]:
    """Yield one line for each target, mode and precision; it says so if there is no measurement."""
    for target in TARGETS:
        for precision in ("bfloat16", "tf32"):
            for mode in ("inference", "training"):
                ours = find(rows, "ours", target, mode, precision)
                native = find(rows, "native", target, mode, precision)
                shape = f"({target.batch}, {target.steps}, {target.inputs}, {target.units})"
                where = f"  {mode:10}{shape:22}{precision:9}{target.rate:5.0%}: "
                if ours is None or native is None:
                    yield where + "not measured"
                    continue
                ours_ms, native_ms = float(ours["p50_ms"]), float(native["p50_ms"])
                ratio = native_ms / ours_ms
                yield where + f"{ratio:5.2f} ({target.at_least:g}) {verdict(ratio >= target.at_least, ours)}"
                yield (
                    f"      {1e3 * ours_ms / int(ours['slowest_row_updates']):.2f} us an update, one after the other; "
                    f"{operations(ours) / ours_ms / 1e9:.2f} TFLOP/s; "
                    f"cuDNN {1e3 * native_ms / target.steps:.2f} us a step"
                )
                if mode == "training" and target.rate == MEMORY_RATE:
                    share = float(ours["peak_mib"]) / max(float(native["peak_mib"]), 1e-9)
                    yield where + f"{share:5.2f} of the memory ({MEMORY:.2f}) {verdict(share <= MEMORY, ours)}"


def report(rows: Rows) -> None:
    """Print the targets beside the measurements."""
    print("\n" + "\n".join(("cuDNN's LSTM over ours, same precision (target)", *lines(rows))))
