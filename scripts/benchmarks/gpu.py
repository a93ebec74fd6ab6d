"""Time Skip RNN on a CUDA GPU against cuDNN's LSTM and GRU, and against Skip RNNs that compute every step.

    python scripts/benchmark.py gpu                  # within --budget seconds, most wanted first
    python scripts/benchmark.py gpu --parts reach    # only what gpu_targets.py judges
    python scripts/benchmark.py gpu --shapes 256,784,1,110 --rates 0.5 --precisions bfloat16
    python scripts/benchmark.py gpu --report         # pass or MISS, from the CSV, without measuring

Times are between device events; one CSV row a measurement under model_cards/speed/, written at once, with the peak of
allocated memory. A run renews the rows that it measures and leaves the others. Peers: gpu_peers.py. What
fails is a row with its error; after an error that leaves the device unusable, or a measurement that does not end, the
exit status is 3, and the same command with --resume goes on behind it. A time says nothing of a wrong result: with
--equality FILE (written by tests/triton/triton_suite.py, as `make gpu` does) every row tells whether its checks held.
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
# Most wanted first: when the budget ends, what stands last is left out.
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
LONGEST_LOOP = 1000  # steps: beyond, a loop in Python takes minutes
LOOPS = ("events", "events_graphed", "masked_loop", "masked_loop_graphed", "masked_loop_compiled")
BROKEN = 3  # exit status


class Part(NamedTuple):
    """A part of the whole."""

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
    """One workload, and what is timed of it."""

    shape: Shape
    cell: str
    precision: str
    mode: str
    rate: float
    spread: str
    peers: tuple[str, ...]


@dataclass
class Row:
    """One measurement."""

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
    p20_ms: float | str = ""  # empty, as the following, where there is an error
    p50_ms: float | str = ""
    p80_ms: float | str = ""
    native_over_this: float | str = ""
    peak_mib: float | str = ""
    slowest_row_updates: int | str = ""  # one after the other, of each layer
    equality: str = ""  # "passed", or which checks of this engine did not
    error: str = ""


KEY = (
    *("device", "cell", "mode", "batch", "steps", "inputs", "units", "layers", "sequence", "precision"),
    *("rate", "spread", "name"),
)


def key(row: dict[str, str]) -> tuple[str, ...]:
    """Return what a row measures, where."""
    return tuple(row[name] for name in KEY)


def use_precision(name: str) -> None:
    """torch's own switches, for matrix products and for cuDNN."""
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"


def timed(run: Run, seconds: float) -> tuple[list[float], float]:
    """Milliseconds of each call, at least 5, and the peak of memory in MiB above what stood before."""
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
    """Return the milliseconds of a run on the device; waits for it."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def gpu_provenance() -> dict[str, str]:
    """What every row says of where it comes from."""
    import triton

    facts = provenance() | {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return facts | {"triton": triton.__version__}


def equality(results: dict[str, str] | None, wanted: Wanted) -> str:
    """Whether the suite's checks that touch this engine held: "passed", or which did not; see `touches`."""
    if results is None:
        return "not asked"
    failed = [name for name, outcome in results.items() if outcome != "ok" and touches(name, wanted)]
    return "; ".join(failed) or "passed"


def touches(check: str, wanted: Wanted) -> bool:
    """Whether a check of that name says something of this workload: unless it names another cell or precision."""
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
    """CSV fields of one workload's measurements; an error is one, too. native_ms: the native layer's, if known."""
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
        except Exception as error:  # noqa: BLE001 - one peer's failure is a row, not the end
            lines = str(error).splitlines() or [""]
            yield {"name": name, "error": f"{type(error).__name__}: {lines[0][:200]}"}
            torch.cuda.synchronize()  # raises where the device is lost
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
    """Leaves the process with status 3 where its block does not end: a kernel that hangs cannot be interrupted."""

    on_end: Callable[[str, str], None] = staticmethod(lambda name, error: None)

    def __init__(self, name: str, seconds: float):
        self.timer = threading.Timer(seconds, self.end, (name, f"did not end within {seconds:.0f} s"))
        self.timer.daemon = True

    def end(self, name: str, error: str) -> None:
        """Write it down, and leave."""
        self.on_end(name, error)
        os._exit(BROKEN)

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()


def show(row: Row) -> None:
    """One line of the log."""
    shape = f"({row.batch}, {row.steps}, {row.inputs}, {row.units})"
    what = f"{row.cell:5}{row.mode:10}{shape:22}{row.precision:9}{row.rate:5.0%} {row.spread:10}{row.name:21}"
    said = row.error or f"{row.p50_ms:10.3f} ms {row.native_over_this:>7}x {row.peak_mib:9.1f} MiB"
    print(what + said, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="of the whole")
    parser.add_argument("--shapes", nargs="+", help="B,T,I,H[,layers] instead of the parts")
    parser.add_argument("--cells", nargs="+", choices=["lstm", "gru"], help="default: the part's")
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--rates", nargs="+", type=float, help="shares of steps read; default: the part's")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), help="default: the part's")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="default: the part's")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each line of the table")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which nothing new is begun")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds that one measurement may take at most")
    parser.add_argument("--equality", type=Path, help="outcomes of tests/triton/triton_suite.py")
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has rows of, errors too")
    parser.add_argument("--report", action="store_true", help="the table of what is asked for alone")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards" / "speed" / "gpu.csv")
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> list[Wanted]:
    """Most wanted first: part by part; in it LSTM before GRU, bf16 and TF32 before the others, then by shape."""
    parts = [PARTS[name] for name in options.parts]
    if options.shapes:
        parts = [Part([Shape(*(int(size) for size in text.split(",")[:5])) for text in options.shapes])]  # type: ignore[arg-type]
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
    """The CSV fields that say what was wanted."""
    shape = {name: value for name, value in wanted.shape._asdict().items() if name != "input_gradients"}
    return shape | {name: getattr(wanted, name) for name in ("cell", "mode", "precision", "rate", "spread")}


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write, judge."""
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
