"""Time Skip RNN on a CUDA GPU against cuDNN's LSTM and GRU, and against Skip RNNs that compute every step.

    python scripts/benchmark.py gpu                  # within --budget seconds, most wanted first
    python scripts/benchmark.py gpu --parts reach    # only what gpu_targets.py judges
    python scripts/benchmark.py gpu --shapes 256,784,1,110 --rates 0.5 --precisions bfloat16
    python scripts/benchmark.py gpu --report         # pass or MISS, from the CSV, without measuring

Times are measured with CUDA events. Each measurement is written at once, as a row of a CSV file under
model_cards/speed/, with the peak of allocated memory. A run replaces the rows that it measures and keeps the others.
The peers are in gpu_peers.py. A failed measurement is a row with its error. If an error makes the device unusable, or a
measurement does not end, the exit status is 3, and the same command with --resume continues after it. A time is only
valid for a correct result: with --equality FILE (which tests/triton/triton_suite.py writes in `make gpu`) every row
tells whether its checks passed.
"""

import argparse
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from hf_skiprnn.kernels.triton.operators import unavailable_reason
from scripts.benchmarks import gpu_targets
from scripts.benchmarks.gpu_peers import PEERS
from scripts.benchmarks.rows import ROOT, percentiles, provenance, read, write
from scripts.benchmarks.workload import Run, Shape, Workload

MAIN = Shape(256, 784, 1, 110)
WIDE = Shape(64, 250, 2048, 512)
# The most important measurements come first: when the time budget ends, the last ones are left out.
SHAPES = [
    MAIN,
    Shape(256, 784, 1, 128),
    WIDE,
    Shape(1024, 784, 1, 128),
    Shape(32, 400, 300, 128),
    Shape(16, 784, 1, 110),
    Shape(16, 250, 2048, 512),
    Shape(16, 1024, 768, 768),
    Shape(512, 784, 1, 110),
    Shape(64, 784, 1, 110),
    Shape(1, 784, 1, 110),
    Shape(64, 784, 1, 110, sequence=True),
    Shape(8, 250, 4096, 256, layers=2),
    Shape(1, 16000, 1, 64),
    Shape(1, 100000, 1, 64),
]
PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float16": torch.float16,
}
LONGEST_LOOP = 1000  # steps: a longer loop in Python takes minutes
LOOPS = ("events", "events_graphed", "masked_loop", "masked_loop_graphed", "masked_loop_compiled")
BROKEN = 3  # exit status if the device is unusable or a measurement does not end


class Part(NamedTuple):
    """A part of the benchmark."""

    shapes: list[Shape]
    rates: tuple[float, ...] = (0.5, 0.25, 1.0, 0.1)
    cells: tuple[str, ...] = ("lstm", "gru")
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    peers: tuple[str, ...] = ("native", "ours", "ours_graphed")
    spread: str = "constant"


PARTS = {
    "reach": Part(SHAPES[:3], (0.5, 0.25, 1.0), ("lstm",), ("bfloat16", "tf32"), ("native", "ours")),
    "peers": Part([MAIN], (0.5,), ("lstm",), ("tf32", "bfloat16"), ("native_graphed", "ours_graphed", *LOOPS)),
    "rows": Part(
        [MAIN, SHAPES[3], WIDE],
        (0.5, 0.25, 0.1),
        ("lstm",),
        ("bfloat16",),
        ("native", "ours", "native_packed"),
        "lognormal",
    ),
    "all": Part(SHAPES),
}


class Wanted(NamedTuple):
    """A workload and the peers to time on it."""

    shape: Shape
    cell: str
    precision: str
    mode: str
    rate: float
    spread: str
    peers: tuple[str, ...]


@dataclass
class Row:
    """A row of the CSV file: one measurement."""

    date: str
    device: str
    torch: str
    triton: str
    cuda: str
    python: str
    hf_skiprnn: str
    commit: str
    cell: str
    mode: str
    batch: int
    steps: int
    inputs: int
    units: int
    layers: int
    sequence: bool
    precision: str
    rate: float
    spread: str
    name: str
    p20_ms: float | str = ""  # this and the next fields are empty if there is an error
    p50_ms: float | str = ""
    p80_ms: float | str = ""
    native_over_this: float | str = ""
    peak_mib: float | str = ""
    slowest_row_updates: int | str = ""  # number of sequential updates in each layer
    equality: str = ""  # "passed", or the checks of this engine that failed
    error: str = ""


KEY = (
    *("device", "cell", "mode", "batch", "steps", "inputs", "units", "layers", "sequence", "precision"),
    *("rate", "spread", "name"),
)


def key(row: dict[str, str]) -> tuple[str, ...]:
    """Return the values that identify a measurement and its machine."""
    return tuple(row[name] for name in KEY)


def use_precision(name: str) -> None:
    """Set torch's switches for the precision of float32 matrix products and of cuDNN."""
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"


def timed(run: Run, seconds: float) -> tuple[list[float], float]:
    """Return the milliseconds of at least 5 calls, and the peak of memory in MiB above what was allocated before."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < seconds and len(times) < 200):
        times.append(between_events(run))
    return times, peak


def between_events(run: Run) -> float:
    """Run once, wait for the device, and return the milliseconds that it took there."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def gpu_provenance() -> dict[str, str]:
    """Return the columns that say where, when and with what a row was measured."""
    import triton

    facts = provenance() | {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return facts | {"triton": triton.__version__}


def equality(results: dict[str, str] | None, wanted: Wanted) -> str:
    """Return "passed" if all checks of the suite that concern this workload passed, else their names; see `touches`."""
    if results is None:
        return "not asked"
    failed = [name for name, outcome in results.items() if outcome != "ok" and touches(name, wanted)]
    return "; ".join(failed) or "passed"


def touches(check: str, wanted: Wanted) -> bool:
    """Whether a check concerns this workload: its name contains no other cell and no other precision."""
    from hf_skiprnn.kernels.triton import tiling as triton_tiling

    if check == "shared units" and not triton_tiling.SHARES:
        return False  # switched off
    words = set(check.lower().replace(",", " ").split())
    cells, precisions = {"lstm", "gru", "gru_reset_after"}, set(PRECISIONS)
    cell = "gru_reset_after" if wanted.cell == "gru" else wanted.cell
    return not ((words & cells and cell not in words) or (words & precisions and wanted.precision not in words))


def measure(
    workload: Workload, peers: Sequence[str], seconds: float, limit: float, native_ms: float | None
) -> Iterator[dict[str, object]]:
    """Yield the CSV fields of each measurement of a workload, or of its error. native_ms: time of the native layer."""
    slowest = workload.updates() // workload.shape.batch
    if workload.gates is not None:
        slowest = int(workload.gates.sum(1).max())
    for name in peers:
        if name in LOOPS and workload.shape.steps > LONGEST_LOOP:
            continue
        try:
            with Deadline(name, limit):
                run = PEERS[name](workload)
                if run is None:
                    continue
                times, peak = timed(run, seconds)
        except Exception as error:  # noqa: BLE001 - a peer's failure becomes a row, and the others are still timed
            lines = str(error).splitlines() or [""]
            yield {"name": name, "error": f"{type(error).__name__}: {lines[0][:200]}"}
            torch.cuda.synchronize()  # raises an error if the device is unusable
            continue
        p50 = median(times)
        if name == "native":
            native_ms = p50
        yield {
            "name": name,
            **percentiles(times, "_ms"),
            "native_over_this": round(native_ms / p50, 3) if native_ms else "",
            "peak_mib": round(peak, 1),
            "slowest_row_updates": slowest,
        }
        del run
        torch.cuda.empty_cache()


class Deadline:
    """Context manager that exits the process with status 3 at a time limit: a hanging kernel cannot be interrupted."""

    on_end: Callable[[str, str], None] = staticmethod(lambda name, error: None)

    def __init__(self, name: str, seconds: float):
        self.timer = threading.Timer(seconds, self.end, (name, f"did not end within {seconds:.0f} s"))
        self.timer.daemon = True

    def end(self, name: str, error: str) -> None:
        """Write the error into the CSV file, and exit the process."""
        self.on_end(name, error)
        os._exit(BROKEN)

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()


def show(row: Row) -> None:
    """Print one line of the log."""
    shape = f"({row.batch}, {row.steps}, {row.inputs}, {row.units})"
    what = f"{row.cell:5}{row.mode:10}{shape:22}{row.precision:9}{row.rate:5.0%} {row.spread:10}{row.name:21}"
    said = row.error or f"{row.p50_ms:10.3f} ms {row.native_over_this:>7}x {row.peak_mib:9.1f} MiB"
    print(what + said, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to measure; default: all"
    )
    parser.add_argument("--shapes", nargs="+", help="B,T,I,H[,layers] instead of the parts")
    parser.add_argument("--cells", nargs="+", choices=["lstm", "gru"], help="default: the part's")
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--rates", nargs="+", type=float, help="shares of steps read; default: the part's")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), help="default: the part's")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="default: the part's")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each line of the table")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no new measurement starts")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds that one measurement may take at most")
    parser.add_argument("--equality", type=Path, help="outcomes of tests/triton/triton_suite.py")
    parser.add_argument("--resume", action="store_true", help="skip what this commit already has rows for, errors too")
    parser.add_argument("--report", action="store_true", help="only print the table of the targets")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards" / "speed" / "gpu.csv")
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> list[Wanted]:
    """Return what to measure, in order: by part, LSTM before GRU, bf16 and TF32 before the others, then by shape."""
    parts = [PARTS[name] for name in options.parts]
    if options.shapes:
        parts = [Part([Shape.parse(text) for text in options.shapes])]
    wanted: list[Wanted] = []
    for part in parts:
        shapes = part.shapes

        def late(item: Wanted, shapes: list[Shape] = shapes) -> tuple[int, int]:
            return (item.cell == "gru") + (item.precision in ("float32", "float16")), shapes.index(item.shape)

        items = itertools.product(
            shapes,
            options.cells or part.cells,
            options.precisions or part.precisions,
            options.modes,
            options.rates or part.rates,
            [part.spread],
            [tuple(options.peers or part.peers)],
        )
        wanted += sorted((Wanted(*item) for item in items), key=late)
    return wanted


def fields_of(wanted: Wanted) -> dict[str, object]:
    """Return the CSV fields that describe a workload."""
    shape = {name: value for name, value in wanted.shape._asdict().items() if name != "input_gradients"}
    return shape | {name: getattr(wanted, name) for name in ("cell", "mode", "precision", "rate", "spread")}


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write, then print the table of the targets."""
    options = parse(arguments)
    known = read(options.output)
    if options.report:
        gpu_targets.report(known)
        return
    reason = unavailable_reason()
    if reason is not None:
        sys.exit(f"Nothing is measured. {reason}")
    start, facts = time.perf_counter(), gpu_provenance()
    print(f"{facts['device']}, torch {facts['torch']}, Triton {facts['triton']}, CUDA {facts['cuda']}", flush=True)
    results = None
    if options.equality and options.equality.exists():
        results = json.loads(options.equality.read_text(encoding="utf-8"))
    done = {key(row) for row in known if options.resume and row["commit"] == facts["commit"]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    left_out = 0
    for wanted in plan(options):
        what = fields_of(wanted)

        def keep(values: dict[str, object], what: dict[str, object] = what, wanted: Wanted = wanted) -> None:
            row = Row(**facts, **what, **values, equality=equality(results, wanted))  # type: ignore[arg-type]
            show(row)
            known[:] = write(options.output, [asdict(row)], KEY)

        as_text = {name: str(value) for name, value in (what | {"device": facts["device"]}).items()}
        peers = [name for name in wanted.peers if key(as_text | {"name": name}) not in done]
        if not peers:
            continue
        if time.perf_counter() - start > options.budget:
            left_out += 1
            continue
        Deadline.on_end = staticmethod(lambda name, error, keep=keep: keep({"name": name, "error": error}))
        use_precision(wanted.precision)
        dtype = PRECISIONS[wanted.precision]
        try:
            workload = Workload(
                wanted.shape, wanted.cell, wanted.mode, wanted.rate, wanted.spread, device="cuda", dtype=dtype
            )
            native = [row["p50_ms"] for row in known if key(row) == key(as_text | {"name": "native"}) and row["p50_ms"]]
            native_ms = float(native[-1]) if native else None
            for values in measure(workload, peers, options.seconds, options.limit, native_ms):
                keep(values)
                done.add(key(as_text | {"name": str(values["name"])}))
        except RuntimeError as error:
            print(f"The device is lost: {str(error).splitlines()[0]}", flush=True)
            sys.exit(BROKEN)
    print(f"{len(known)} rows in {options.output}; {left_out} workloads left out after {options.budget:.0f} s.")
    gpu_targets.report(known)


if __name__ == "__main__":
    main(sys.argv[1:])
