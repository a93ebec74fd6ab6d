"""The targets of the CPU benchmark, and a table for each instruction set that says which are met: pass or MISS."""

import itertools
from collections.abc import Callable, Iterable, Iterator

from .rows import Row, Rows

RATES = (1.0, 0.5, 0.25)
Targets = tuple[float, float, float]  # one for each of RATES
# (cell, mode, batch): nn.LSTM's or nn.GRU's time over ours at RATES, on one thread; T 784, I 1, H 110.
NATIVE: dict[tuple[str, str, int], Targets] = {
    ("lstm", "inference", 1): (2, 4, 8),
    ("lstm", "inference", 16): (1.5, 3, 6),
    ("lstm", "inference", 64): (1.8, 3.5, 7),
    ("lstm", "inference", 256): (2, 4, 8),
    ("lstm", "training", 16): (2, 4, 7),
    ("lstm", "training", 64): (2, 4, 8),
    ("lstm", "training", 256): (2, 4, 8),
    ("gru", "inference", 1): (8, 16, 32),
    ("gru", "inference", 16): (4, 8, 16),
    ("gru", "inference", 64): (4, 8, 16),
    ("gru", "inference", 256): (3.5, 7, 14),
    ("gru", "training", 16): (2.5, 5, 10),
    ("gru", "training", 64): (2.5, 5, 10),
    ("gru", "training", 256): (2.5, 5, 10),
}
# (batch, steps, inputs, units, layers) of the wide shapes; both cells and modes have the same targets.
WIDE = ((32, 400, 300, 128, 1), (16, 250, 2048, 512, 1), (8, 250, 4096, 256, 2))
WIDE_NATIVE: Targets = (1.2, 2.2, 4)
WIDE_SHARE: Targets = (0.75, 0.75, 0.7)  # smallest share of the core's measured peak
MASKED: dict[str, Targets] = {
    "inference": (5, 10, 20),
    "training": (2, 4, 8),
}  # the masked loop's time over ours, B 256
BF16 = 1.4  # smallest speed-up of bfloat16 weights over float32 ones, LSTM and GRU of batch 1
OURS = ("ours", "ours_bf16")
TWO_THREADS = 1.7  # smallest speed-up of two threads over one, B >= 16

PASS, MISS, UNKNOWN = "pass", "MISS", "unmeasured"  # verdicts

WORKLOAD = ("level", "cell", "mode", "batch", "steps", "inputs", "units", "layers", "sequence", "rate", "spread")


def report(rows: Rows) -> None:
    """Print every target beside what was measured, and how many are met; one block for each instruction set.

    Times of two machines are never compared: each machine has its own block.
    """
    for isa, device in sorted({(row["instruction_set"], row["device"]) for row in rows}):
        measured = [row for row in rows if (row["instruction_set"], row["device"]) == (isa, device)]
        print(f"\n== {isa}, {device} ==")
        words: list[str] = []
        for title, table in TABLES.items():
            if lines := list(table(measured)):
                print("\n" + "\n".join((title, *lines)))
                words += " ".join(lines).split()
        print(f"\n{isa}: " + ", ".join(f"{words.count(verdict)} {verdict}" for verdict in (PASS, MISS, UNKNOWN)))


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
    return PASS if met else MISS


def _cell(rate: float, value: float | None, target: float) -> str:
    if value is None:
        return f"{rate:4.0%}:      - ({target:g}) {UNKNOWN}"
    return f"{rate:4.0%}: {value:6.2f} ({target:g}) {_verdict(value >= target)}"


def _cells(targets: Targets, values: Iterable[float | None]) -> str:
    """Return the cells of a line: the value at each of RATES, its target and the verdict."""
    return "   ".join(itertools.starmap(_cell, zip(RATES, values, targets, strict=True)))


def _workload(row: Row) -> str:
    shape = f"({row['batch']}, {row['steps']}, {row['inputs']}, {row['units']})"
    return f"{row['cell']:5}{row['mode']:10}{shape:22}{float(row['rate']):4.0%}"


def _value(row: Row | None, column: str) -> float | None:
    return float(row[column]) if row else None


def _against_native(rows: Rows) -> Iterator[str]:
    for (cell, mode, batch), targets in NATIVE.items():
        values = [_value(_find_narrow(rows, cell, mode, batch, rate), "native_over_this") for rate in RATES]
        yield f"  {cell:5}{mode:10} B {batch:<4}{_cells(targets, values)}"


def _against_the_masked_loop(rows: Rows) -> Iterator[str]:
    for cell in ("lstm", "gru"):
        for mode, targets in MASKED.items():
            values: list[float | None] = []
            for rate in RATES:
                ours = _find_narrow(rows, cell, mode, 256, rate)
                loop = _find_narrow(rows, cell, mode, 256, rate, name="masked_loop")
                values.append(float(loop["p50_ms"]) / float(ours["p50_ms"]) if ours and loop else None)
            yield f"  {cell:5}{mode:10} masked loop over ours  {_cells(targets, values)}"


def _wide(column: str, targets: Targets) -> Callable[[Rows], Iterator[str]]:
    """Return a table of the wide shapes: `column` of our rows beside the targets."""

    def table(rows: Rows) -> Iterator[str]:
        for size in WIDE:
            shape = dict(zip(("batch", "steps", "inputs", "units", "layers"), size, strict=True))
            for cell, mode in itertools.product(("lstm", "gru"), ("inference", "training")):
                found = [_find(rows, cell=cell, mode=mode, rate=rate, **shape) for rate in RATES]
                values = _cells(targets, [_value(row, column) for row in found])
                yield f"  {cell:5}{mode:10}{size!s:26}{values}"

    return table


def _two_threads(rows: Rows) -> Iterator[str]:
    for row in rows:
        if row["name"] != "ours" or row["threads"] != "2" or int(row["batch"]) < 16:
            continue
        if one := _find(rows, **{name: row[name] for name in WORKLOAD}):
            gain = float(one["p50_ms"]) / float(row["p50_ms"])
            yield f"  {_workload(row)}: {gain:.2f} ({TWO_THREADS:g}) {_verdict(gain >= TWO_THREADS)}"


def _bf16(rows: Rows) -> Iterator[str]:
    """Yield our float32's time over our time with bfloat16 weights; only batch 1 has a target."""
    for row in rows:
        if row["name"] != "ours_bf16" or row["mode"] != "inference":
            continue
        if whole := _find(rows, **{name: row[name] for name in WORKLOAD}):
            gain = float(whole["p50_ms"]) / float(row["p50_ms"])
            verdict = f" ({BF16:g}) {_verdict(gain >= BF16)}" if row["batch"] == "1" else ""
            yield f"  {_workload(row)}: {gain:.2f}{verdict}"


def _against_every_peer(rows: Rows) -> Iterator[str]:
    """Yield a line for each peer that is faster than ours somewhere, and one that sums up."""
    compared = slower = 0
    for row in rows:
        if row["name"] in OURS:
            continue
        same = {name: row[name] for name in WORKLOAD} | {"threads": row["threads"]}
        in_bf16 = _find(rows, name="ours_bf16", **same) if row["name"] == "native_bf16" else None
        if ours := in_bf16 or _find(rows, **same):
            compared += 1
            ratio = float(row["p50_ms"]) / float(ours["p50_ms"])
            if ratio < 1:
                slower += 1
                yield f"  {_workload(row)}  {row['threads']} thr  {row['name']}: {ratio:.2f} (1) {MISS}"
    if compared:
        yield f"  {compared - slower} of {compared} measurements of others are slower than ours"


TABLES: dict[str, Callable[[Rows], Iterator[str]]] = {
    "nn.LSTM's or nn.GRU's time over ours, one thread (target)": _against_native,
    "the masked loop's time over ours, one thread (target)": _against_the_masked_loop,
    "wide shapes: nn.LSTM's or nn.GRU's time over ours, one thread (target)": _wide("native_over_this", WIDE_NATIVE),
    "wide shapes: share of the core's measured peak (target)": _wide("share_of_peak", WIDE_SHARE),
    "two threads over one (target)": _two_threads,
    "our float32 weights over our bfloat16 ones (target at batch 1)": _bf16,
    "never slower than others: their time over ours (target)": _against_every_peer,
}
