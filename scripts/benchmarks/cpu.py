"""Time Skip RNN against nn.LSTM, nn.GRU, ONNX Runtime and a masked loop, in one process, interleaved.

    python scripts/benchmark.py                        # every part
    python scripts/benchmark.py --parts targets --cells lstm --modes inference     # a part of it, in a few minutes
    python scripts/benchmark.py --shapes 64,784,1,110 --rates 1.0 0.5 --peers native ours native_bf16
    python scripts/benchmark.py --checkpoints model_cards/skip-*                   # trained models at their own rates
    python scripts/benchmark.py --report               # the table of the targets, from the CSV, without measuring
    python scripts/benchmark.py --streaming            # steps of streams, exported graphs: benchmark_streaming.py
    python scripts/benchmark.py --memory               # of a training step: benchmark_memory.py
    python scripts/benchmark.py --device cuda          # against cuDNN: benchmark_gpu.py

One CSV row a measurement under model_cards/speed/: median and 20th/80th percentile in milliseconds, how many times
faster than the native layer, and the share of the core's measured multiply-add peak that the needed operations reach.
A run renews the rows that it measures and leaves the others, so the whole can be measured in parts. A table of the
targets (benchmark_targets.py) says pass or miss. Nothing is written when the fast scans disagree with the definition
(asked once for every state of the sources), or when the machine is busy. Update rates are constant, log-normally spread
over rows (a batch costs its slowest row), or those of a trained checkpoint, whose folder then names the `spread`.
"""

import argparse
import csv
import datetime
import hashlib
import itertools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

from hf_skiprnn import __version__
from hf_skiprnn.kernels.cpu.operators import peak_flops
from hf_skiprnn.training.provenance import commit, cpu_name
from scripts.benchmarks import targets as benchmark_targets
from scripts.benchmarks.peers import PEERS, Workload, of_checkpoint

ROOT = Path(__file__).resolve().parents[2]
BUSY_PERCENT = 15.0  # of all cores, taken by others in the moment before a measurement


class Shape(NamedTuple):
    """Of a workload."""

    batch: int
    steps: int
    inputs: int
    units: int
    layers: int = 1
    sequence: bool = False
    input_gradients: bool = False


NARROW = [Shape(batch, 784, 1, 110) for batch in (1, 16, 64, 256)]
WIDE = [
    Shape(32, 400, 300, 128, input_gradients=True),
    Shape(16, 250, 2048, 512),
    Shape(8, 250, 4096, 256, layers=2),
]
RATES = (1.0, 0.5, 0.25, 0.1)


class Part(NamedTuple):
    """A part of the whole: these shapes, each with these rates, peers and numbers of threads."""

    shapes: list[Shape]
    rates: Sequence[float] = RATES
    peers: Sequence[str] = ("native", "ours")
    threads: Sequence[int] = (1,)
    spread: str = "constant"
    seconds: float = 1.0  # of repetitions for each line of the table


PARTS = {
    "targets": Part(NARROW, seconds=3.0),
    "wide": Part(WIDE),
    "long": Part([Shape(1, 16000, 1, 64)]),
    "sequence": Part([Shape(64, 784, 1, 110, sequence=True)]),
    "masked": Part([Shape(256, 784, 1, 110)], peers=("native", "ours", "masked_loop")),
    "peers": Part([*NARROW[1:3], WIDE[1]], (0.5,), tuple(PEERS)),
    "lognormal": Part(NARROW[1:], (0.5, 0.25, 0.1), ("native", "ours", "native_packed"), spread="lognormal"),
    "threads": Part([NARROW[1], NARROW[3], WIDE[0], WIDE[1]], (0.5,), threads=(1, 2), seconds=2.0),
}


@dataclass
class Row:
    """One measurement."""

    date: str
    device: str
    threads: int
    torch: str
    python: str
    hf_skiprnn: str
    commit: str
    level: str
    cell: str
    mode: str
    batch: int
    steps: int
    inputs: int
    units: int
    layers: int
    sequence: bool
    rate: float
    spread: str
    name: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    native_over_this: float
    share_of_peak: float | str  # empty but for ours


def interleaved(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each run: one warm-up, then all in turn for `seconds`, at least 3 times."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 3 or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - before) * 1e3)
    return times


def measure(workload: Workload, peers: Sequence[str], seconds: float) -> dict[str, list[float]]:
    """Times of ours and of the peers that can run this workload."""
    runs = {name: run for name in peers if (run := PEERS[name](workload)) is not None}
    return interleaved(runs, seconds)


def operations(workload: Workload) -> float:
    """Floating-point operations that are needed: 2 per multiply-add, thrice for forward and backward of an update.

    Of the backward pass's three products two are needed always, the input gradients' only where they are asked for. In
    training a learned gate needs one forward value at every skipped step: its input products, since W_h h is the held
    state's.
    """
    shape, gates = workload.shape, 4 if workload.cell == "lstm" else 3
    update = skipped = 0.0
    for layer in range(shape.layers):
        width = shape.inputs if layer == 0 else shape.units
        product = 2 * gates * shape.units
        if workload.mode == "inference":
            update += product * (shape.units + width)
        else:
            update += product * (3 * shape.units + (3 if layer or shape.input_gradients else 2) * width)
            skipped += product * width
    updates = workload.updates()
    return update * updates + skipped * (shape.batch * shape.steps - updates)


def check_equality() -> None:
    """Refuse to time what is not right: the fast scans against the definition. What has passed is not asked again."""
    sources = sorted(path for path in (ROOT / "hf_skiprnn").rglob("*") if path.suffix in (".py", ".h", ".cpp", ".so"))
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    stamp = ROOT / "build" / "benchmark-equality"
    if stamp.exists() and stamp.read_text() == state:
        return
    tests = [str(ROOT / "tests" / name) for name in ("test_scans.py", "test_cpu_kernel.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"Nothing is measured: the equality tests fail.\n{run.stdout[-3000:]}")
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(state)


def check_idle() -> None:
    """Wait for a machine that does nothing else, a minute at most."""
    import psutil  # type: ignore[import-untyped]

    for _ in range(150):
        busy = psutil.cpu_percent(interval=0.4)
        if busy <= BUSY_PERCENT:
            return
    sys.exit(f"Stopped: {busy:.0f} % of the machine is busy (at most {BUSY_PERCENT:.0f} %). Try again later.")


def provenance() -> dict[str, str]:
    """What every row says of where it comes from."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hf_skiprnn": __version__,
        "commit": commit(),
    }


def rows_of(workload: Workload, times: dict[str, list[float]], peak: float | None) -> list[dict[str, object]]:
    """CSV fields of one workload's measurements."""
    native = times.get("native")
    needed = operations(workload)
    rows = []
    for name, values in times.items():
        p20, p50, p80 = quantiles(values, n=5)[0], median(values), quantiles(values, n=5)[3]
        ratio = median(n / v for n, v in zip(native, values, strict=True)) if native else float("nan")
        share = needed / (p50 * 1e-3) / peak if peak and name == "ours" else None
        shape = {k: v for k, v in workload.shape._asdict().items() if k != "input_gradients"}
        rows.append(
            shape
            | {
                "threads": workload.threads,
                "level": workload.level,
                "cell": workload.cell,
                "mode": workload.mode,
                "rate": workload.rate,
                "spread": workload.spread,
                "name": name,
                "p20_ms": round(p20, 4),
                "p50_ms": round(p50, 4),
                "p80_ms": round(p80, 4),
                "native_over_this": round(ratio, 3),
                "share_of_peak": "" if share is None else round(share, 3),
            }
        )
    return rows


def show(row: Row) -> None:
    """One line of the log."""
    share = f"  {row.share_of_peak:.0%} of peak" if isinstance(row.share_of_peak, float) else ""
    shape = f"({row.batch}, {row.steps}, {row.inputs}, {row.units}){' x ' + str(row.layers) if row.layers > 1 else ''}"
    print(
        f"{row.cell:5}{row.mode:10}{shape:22}{row.threads} thr {row.rate:4.0%} {row.spread:10}{row.name:22}"
        f"{row.p50_ms:10.3f} ms  {row.native_over_this:6.2f}x{share}",
        flush=True,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="of the whole; default: all"
    )
    parser.add_argument("--shapes", nargs="+", help="B,T,I,H[,layers] instead of the parts")
    parser.add_argument(
        "--checkpoints", nargs="+", help="folders of trained models, on test rows of their tasks, instead"
    )
    parser.add_argument("--cells", nargs="+", default=["lstm", "gru"], choices=["lstm", "gru"])
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--batches", nargs="+", type=int, help="only shapes of these batch sizes")
    parser.add_argument("--rates", nargs="+", type=float, help="shares of steps read; default: the part's")
    parser.add_argument("--threads", nargs="+", type=int, help="default: the part's")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="default: the part's")
    parser.add_argument("--seconds", type=float, help="time for each line of the table; default: the part's")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards" / "speed" / "cpu.csv")
    parser.add_argument("--dry_run", action="store_true", help="print only: no equality tests, no idle check, no CSV")
    parser.add_argument("--check", action="store_true", help="the equality tests alone")
    parser.add_argument("--report", action="store_true", help="the table of the targets alone")
    return parser.parse_args(arguments)


def workloads(options: argparse.Namespace) -> list[tuple[Workload, Sequence[str], float]]:
    """Everything to be measured, in order, the peers it is measured against, and for how many seconds."""
    if options.checkpoints:
        return [
            (of_checkpoint(folder, mode), options.peers or ("native", "ours"), options.seconds or 3.0)
            for folder in options.checkpoints
            for mode in options.modes
        ]
    parts = [PARTS[name] for name in options.parts]
    if options.shapes:
        parts = [Part([Shape(*(int(size) for size in text.split(",")[:5])) for text in options.shapes])]  # type: ignore[arg-type]
    return [
        (
            Workload(shape, cell, mode, rate, part.spread, threads),
            options.peers or part.peers,
            options.seconds or part.seconds,
        )
        for part in parts
        for shape, cell, mode in itertools.product(part.shapes, options.cells, options.modes)
        if not options.batches or shape.batch in options.batches
        for threads in options.threads or part.threads
        for rate in options.rates or part.rates
    ]


def key(row: dict[str, str]) -> tuple[str, ...]:
    """What a row measures."""
    names = ("level", "cell", "mode", "batch", "steps", "inputs", "units", "layers", "sequence", "rate", "spread")
    return tuple(row[name] for name in (*names, "threads", "name"))


def write(path: Path, rows: Sequence[Row]) -> benchmark_targets.Rows:
    """Renew these rows of the file, so far as they go: what was measured before an interruption stays."""
    measured = {key(row): row for row in ({k: str(v) for k, v in asdict(row).items()} for row in rows)}
    kept = {key(row): row for row in benchmark_targets.read(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows((kept | measured).values())
    return list((kept | measured).values())


def main() -> None:
    """Measure, print, write."""
    if "--device" in sys.argv:
        from scripts.benchmarks import gpu as benchmark_gpu

        benchmark_gpu.main(sys.argv[1:])
        return
    if "--streaming" in sys.argv:
        from scripts.benchmarks import streaming as benchmark_streaming

        benchmark_streaming.main([argument for argument in sys.argv[1:] if argument != "--streaming"])
        return
    if "--memory" in sys.argv:
        from scripts.benchmarks import memory as benchmark_memory

        benchmark_memory.main([argument for argument in sys.argv[1:] if argument != "--memory"])
        return
    options = parse()
    if options.report:
        benchmark_targets.report(benchmark_targets.read(options.output))
        return
    if not options.dry_run:
        check_equality()
    if options.check:
        return
    facts, rows = provenance(), []
    peak = peak_flops()
    print(f"{facts['device']}: {peak / 1e9:.0f} GFLOP/s of multiply-adds on one core")
    for workload, peers, seconds in workloads(options):
        if not options.dry_run:
            check_idle()
        torch.set_num_threads(workload.threads)
        for values in rows_of(workload, measure(workload, peers, seconds), peak * workload.threads):
            rows.append(Row(**facts, **values))  # type: ignore[arg-type]
            show(rows[-1])
        if not options.dry_run:
            known = write(options.output, rows)
    if not options.dry_run:
        benchmark_targets.report(known)


if __name__ == "__main__":
    main()
