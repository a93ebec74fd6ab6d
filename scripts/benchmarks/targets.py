"""The targets of the CPU benchmark, and a table for each instruction set that says which are met: pass or MISS."""

from collections.abc import Callable, Iterator

from .rows import Row, Rows

RATES = (1.0, 0.5, 0.25)
# (cell, mode, batch): nn.LSTM's or nn.GRU's time over ours at RATES, on one thread; T 784, I 1, H 110.
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
MASKED = {"inference": (5.0, 10.0, 20.0), "training": (2.0, 4.0, 8.0)}  # the masked loop's time over ours, B 256
SHARE_OF_PEAK = 0.75  # smallest share of the peak for wide shapes
TWO_THREADS = 1.7  # smallest speed-up of two threads over one, B >= 16

WORKLOAD = ("level", "cell", "mode", "batch", "steps", "inputs", "units", "layers", "sequence", "rate", "spread")


def report(rows: Rows) -> None:
    """Print every target beside what was measured, one block for each instruction set."""
    for isa in sorted({row["instruction_set"] for row in rows}):
        measured = [row for row in rows if row["instruction_set"] == isa]
        print(f"\n== {isa} ==")
        for title, table in TABLES.items():
            if lines := list(table(measured)):
                print("\n" + "\n".join((title, *lines)))


def _find(rows: Rows, **wanted: object) -> Row | None:
    """Return the last row with these values; defaults: our engine, a single layer, one thread."""
    wanted = {"level": "layer", "threads": 1, "name": "ours", "spread": "constant", "sequence": False} | wanted
    found = [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]
    return found[-1] if found else None


def _find_narrow(rows: Rows, cell: str, mode: str, batch: int, rate: float, **wanted: object) -> Row | None:
    """Return the row of (batch, 784, 1, 110)."""
    wanted |= {"cell": cell, "mode": mode, "batch": batch, "rate": rate}
    return _find(rows, steps=784, inputs=1, units=110, **wanted)


def _verdict(met: bool) -> str:
    return "pass" if met else "MISS"


def _cell(rate: float, value: float, target: float) -> str:
    return f"{rate:4.0%}: {value:6.2f} ({target:g}) {_verdict(value >= target)}"


def _workload(row: Row) -> str:
    shape = f"({row['batch']}, {row['steps']}, {row['inputs']}, {row['units']})"
    return f"{row['cell']:5}{row['mode']:10}{shape:22}{float(row['rate']):4.0%}"


def _against_native(rows: Rows) -> Iterator[str]:
    for (cell, mode, batch), targets in NATIVE.items():
        cells = []
        for rate, target in zip(RATES, targets, strict=True):
            if row := _find_narrow(rows, cell, mode, batch, rate):
                cells.append(_cell(rate, float(row["native_over_this"]), target))
        if cells:
            yield f"  {cell:5}{mode:10} B {batch:<4}" + "   ".join(cells)


def _against_the_masked_loop(rows: Rows) -> Iterator[str]:
    for cell in ("lstm", "gru"):
        for mode, targets in MASKED.items():
            cells = []
            for rate, target in zip(RATES, targets, strict=True):
                ours = _find_narrow(rows, cell, mode, 256, rate)
                loop = _find_narrow(rows, cell, mode, 256, rate, name="masked_loop")
                if ours and loop:
                    cells.append(_cell(rate, float(loop["p50_ms"]) / float(ours["p50_ms"]), target))
            if cells:
                yield f"  {cell:5}{mode:10} masked loop over ours  " + "   ".join(cells)


def _wide(rows: Rows) -> Iterator[str]:
    for row in rows:
        if row["name"] != "ours" or row["level"] != "layer" or row["threads"] != "1" or int(row["inputs"]) < 300:
            continue
        share, ratio = float(row["share_of_peak"]), float(row["native_over_this"])
        verdict = _verdict(share >= SHARE_OF_PEAK and ratio >= 1)
        yield f"  {_workload(row)}: {share:.0%} of peak ({SHARE_OF_PEAK:.0%}), {ratio:.2f} (1) {verdict}"


def _two_threads(rows: Rows) -> Iterator[str]:
    for row in rows:
        if row["name"] != "ours" or row["threads"] != "2" or int(row["batch"]) < 16:
            continue
        if one := _find(rows, **{name: row[name] for name in WORKLOAD}):
            gain = float(one["p50_ms"]) / float(row["p50_ms"])
            yield f"  {_workload(row)}: {gain:.2f} ({TWO_THREADS:g}) {_verdict(gain >= TWO_THREADS)}"


TABLES: dict[str, Callable[[Rows], Iterator[str]]] = {
    "nn.LSTM's or nn.GRU's time over ours, one thread (target)": _against_native,
    "the masked loop's time over ours, one thread (target)": _against_the_masked_loop,
    "wide shapes: share of the measured peak, and the native layer's time over ours (targets)": _wide,
    "two threads over one (target)": _two_threads,
}
