"""Time Skip RNN on a CUDA GPU against cuDNN's LSTM and GRU, and against Skip RNNs that compute every step.

    python scripts/benchmark.py --device cuda                  # within --budget seconds, most wanted first
    python scripts/benchmark.py --device cuda --shapes 256,784,1,110 --rates 0.5 --precisions bfloat16

Times are between device events; one CSV row a measurement under model_cards/speed/, with the peak of allocated memory.
"ours_graphed" is ours in a CUDA graph, so without the time that Python takes to launch it. `events` cannot be captured
in a CUDA graph (its rounds depend on the data); the masked loop can. A time says nothing of a wrong result: run
tests/triton_suite.py first, as `make gpu` does.
"""

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median, quantiles

import torch
from benchmark import ROOT, Shape, provenance
from benchmark_peers import Workload, masked_loop, masked_loop_compiled, native, ours

from hf_skiprnn.kernels.triton_scan import unavailable_reason

Run = Callable[[], object]
MAIN = Shape(256, 784, 1, 110)
# Most wanted first: when the budget ends, what stands last is left out.
SHAPES = [
    MAIN,
    Shape(64, 250, 2048, 512),
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
RATES = (0.5, 0.25, 1.0, 0.1)
PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float16": torch.float16,
}
LONGEST_LOOP = 1000  # steps: beyond, a masked loop takes minutes


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
    p20_ms: float
    p50_ms: float
    p80_ms: float
    native_over_this: float
    peak_mib: float


def use_precision(name: str) -> None:
    """torch's own switches, for matrix products and for cuDNN."""
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"


def graphed(run: Run) -> Run:
    """The same in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def events(workload: Workload) -> Run:
    """Ours in plain PyTorch."""
    run = ours(workload, backend="events")
    assert run is not None
    return run


def peers(workload: Workload, precision: str, every: bool) -> dict[str, Callable[[], Run | None]]:
    """What is timed for one workload. Peers that compute every step take the same time at every rate."""
    found: dict[str, Callable[[], Run | None]] = {"native": lambda: native(workload), "ours": lambda: ours(workload)}
    found["ours_graphed"] = lambda: graphed(ours(workload))
    if every and precision in ("tf32", "float32") and workload.shape.steps <= LONGEST_LOOP:
        found["events"] = lambda: events(workload)
        found["masked_loop"] = lambda: masked_loop(workload)
        found["masked_loop_graphed"] = lambda: None if (run := masked_loop(workload)) is None else graphed(run)
        found["masked_loop_compiled"] = lambda: masked_loop_compiled(workload)
    return found


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
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return times, peak


def gpu_provenance() -> dict[str, str]:
    """What every row says of where it comes from."""
    import triton

    facts = provenance() | {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return facts | {"triton": triton.__version__}


def measure(workload: Workload, precision: str, every: bool, seconds: float) -> Iterator[dict[str, object]]:
    """CSV fields of one workload's measurements; the native layer comes first."""
    native_ms = float("nan")
    shape = {key: value for key, value in workload.shape._asdict().items() if key != "input_gradients"}
    for name, make in peers(workload, precision, every).items():
        try:
            run = make()
            if run is None:
                continue
            times, peak = timed(run, seconds)
        except (RuntimeError, AssertionError) as error:  # one peer's failure is a line, not the end
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        p50 = median(times)
        if name == "native":
            native_ms = p50
        yield shape | {
            "cell": workload.cell,
            "mode": workload.mode,
            "precision": precision,
            "rate": workload.rate,
            "spread": workload.spread,
            "name": name,
            "p20_ms": round(quantiles(times, n=5)[0], 4),
            "p50_ms": round(p50, 4),
            "p80_ms": round(quantiles(times, n=5)[3], 4),
            "native_over_this": round(native_ms / p50, 3),
            "peak_mib": round(peak, 1),
        }
        del run
        torch.cuda.empty_cache()


def show(row: Row) -> None:
    """One line of the log."""
    shape = f"({row.batch}, {row.steps}, {row.inputs}, {row.units})"
    print(
        f"{row.cell:5}{row.mode:10}{shape:22}{row.precision:9}{row.rate:5.0%} {row.spread:10}{row.name:21}"
        f"{row.p50_ms:10.3f} ms {row.native_over_this:6.2f}x {row.peak_mib:9.1f} MiB",
        flush=True,
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--shapes", nargs="+", help="B,T,I,H[,layers] instead of the list of shapes")
    parser.add_argument("--cells", nargs="+", default=["lstm", "gru"], choices=["lstm", "gru"])
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="shares of steps read")
    parser.add_argument("--spread", nargs="+", default=["constant"], choices=["constant", "lognormal"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each line of the table")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which nothing new is begun")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards" / "speed" / "gpu.csv")
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> list[tuple[Shape, str, str, str, str]]:
    """(shape, cell, precision, mode, spread), most wanted first: LSTM before GRU, bf16 and TF32 before the others."""
    shapes = SHAPES
    if options.shapes:
        shapes = [Shape(*(int(part) for part in text.split(",")[:5])) for text in options.shapes]  # type: ignore[arg-type]
    wanted = itertools.product(shapes, options.cells, options.precisions, options.modes, options.spread)

    def rank(item: tuple[Shape, str, str, str, str]) -> tuple[int, int]:
        shape, cell, precision, _, spread = item
        late = (cell == "gru") + (precision in ("float32", "float16")) + (spread != "constant")
        return (late, shapes.index(shape))

    return sorted(wanted, key=rank)


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write."""
    options = parse(arguments)
    reason = unavailable_reason()
    if reason is not None:
        sys.exit(f"Nothing is measured. {reason}")
    start, facts, rows = time.perf_counter(), gpu_provenance(), []
    print(f"{facts['device']}, torch {facts['torch']}, Triton {facts['triton']}, CUDA {facts['cuda']}", flush=True)
    left_out = 0
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for (shape, cell, precision, mode, spread), rate in itertools.product(plan(options), options.rates):
            if time.perf_counter() - start > options.budget:
                left_out += 1
                continue
            use_precision(precision)
            workload = Workload(shape, cell, mode, rate, spread, device="cuda", dtype=PRECISIONS[precision])
            every = shape == MAIN and rate == 0.5 and cell == "lstm"
            for values in measure(workload, precision, every, options.seconds):
                rows.append(Row(**facts, **values))  # type: ignore[arg-type]
                show(rows[-1])
                writer.writerow(asdict(rows[-1]))
                file.flush()
    print(f"{len(rows)} rows in {options.output}; {left_out} workloads left out after {options.budget:.0f} s.")
