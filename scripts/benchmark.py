"""Time Skip RNN against nn.LSTM, nn.GRU, ONNX Runtime and a masked loop, in one process, interleaved.

    python scripts/benchmark.py                        # every shape, inference and training, one and two threads
    python scripts/benchmark.py --shapes 64,784,1,110 --rates 1.0 0.5 --cells lstm --threads 1 --seconds 2
    python scripts/benchmark.py --streaming            # steps of streams, exported graphs: benchmark_streaming.py
    python scripts/benchmark.py --device cuda          # against cuDNN: benchmark_gpu.py

One CSV row a measurement under model_cards/speed/: median and 20th/80th percentile in milliseconds, how many times
faster than the native layer, and the share of the core's measured multiply-add peak that the needed operations reach.
A table of the targets (TARGETS below) says pass or miss. Nothing is written when the fast scans disagree with the
definition, or when the machine is busy. Update rates are constant, or log-normally spread over rows (a batch costs its
slowest row).
"""

import argparse
import csv
import datetime
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
from benchmark_peers import PEERS, Workload
from provenance import commit, cpu_name

from hf_skiprnn import __version__
from hf_skiprnn.kernels.cpu import peak_flops

ROOT = Path(__file__).resolve().parents[1]
BUSY_PERCENT = 15.0  # of all cores, taken by others in the second before a measurement


class Shape(NamedTuple):
    """Of a workload."""

    batch: int
    steps: int
    inputs: int
    units: int
    layers: int = 1
    sequence: bool = False
    input_gradients: bool = False


SHAPES = [
    Shape(1, 784, 1, 110),
    Shape(16, 784, 1, 110),
    Shape(64, 784, 1, 110),
    Shape(256, 784, 1, 110),
    Shape(32, 400, 300, 128, input_gradients=True),
    Shape(16, 250, 2048, 512),
    Shape(1, 16000, 1, 64),
    Shape(8, 250, 4096, 256, layers=2),
    Shape(64, 784, 1, 110, sequence=True),
]
# nn.LSTM's or nn.GRU's time over ours that is asked for, one thread, at 100, 50 and 25 % of updates; I 1, H 110.
TARGETS: dict[tuple[str, str, int], tuple[float, float, float]] = {
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
TARGET_RATES = (1.0, 0.5, 0.25)


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
    share_of_peak: float | None


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
    """Floating-point operations that the updates need: 2 per multiply-add, thrice for forward and backward.

    Of the backward pass's three products two are needed always, the input gradients' only where they are asked for.
    """
    shape, gates = workload.shape, 4 if workload.cell == "lstm" else 3
    total = 0.0
    for layer in range(shape.layers):
        width = shape.inputs if layer == 0 else shape.units
        needs_inputs = layer > 0 or shape.input_gradients
        recurrent, inputs = shape.units, width
        passes = (1, 1) if workload.mode == "inference" else (3, 3 if needs_inputs else 2)
        total += 2 * gates * shape.units * (passes[0] * recurrent + passes[1] * inputs)
    return total * workload.updates()


def check_equality() -> None:
    """Refuse to time what is not right: the fast scans against the definition."""
    tests = [str(ROOT / "tests" / name) for name in ("test_scans.py", "test_cpu_kernel.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"Nothing is measured: the equality tests fail.\n{run.stdout[-3000:]}")


def check_idle() -> None:
    """Wait for a machine that does nothing else, a minute at most."""
    import psutil  # type: ignore[import-untyped]

    for _ in range(60):
        busy = psutil.cpu_percent(interval=1.0)
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
                "share_of_peak": None if share is None else round(share, 3),
            }
        )
    return rows


def show(row: Row) -> None:
    """One line of the log."""
    share = "" if row.share_of_peak is None else f"  {row.share_of_peak:.0%} of peak"
    shape = f"({row.batch}, {row.steps}, {row.inputs}, {row.units}){' x ' + str(row.layers) if row.layers > 1 else ''}"
    print(
        f"{row.cell:5}{row.mode:10}{shape:22}{row.threads} thr {row.rate:4.0%} {row.spread:10}{row.name:22}"
        f"{row.p50_ms:10.3f} ms  {row.native_over_this:6.2f}x{share}",
        flush=True,
    )


def report(rows: Sequence[Row]) -> None:
    """The table of targets, with pass or miss a cell."""
    print("\nnative time over ours, one thread (target): pass or miss")
    for (cell, mode, batch), targets in TARGETS.items():
        cells = []
        for rate, target in zip(TARGET_RATES, targets, strict=True):
            found = [
                row.native_over_this
                for row in rows
                if (row.cell, row.mode, row.batch, row.steps, row.units) == (cell, mode, batch, 784, 110)
                and (row.rate, row.threads, row.name, row.spread) == (rate, 1, "ours", "constant")
                and not row.sequence
            ]
            if found:
                verdict = "pass" if found[-1] >= target else "MISS"
                cells.append(f"{rate:4.0%}: {found[-1]:6.2f} ({target:g}) {verdict}")
        if cells:
            print(f"  {cell:5}{mode:10} B {batch:<4}" + "   ".join(cells))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="B,T,I,H[,layers] instead of the list of shapes")
    parser.add_argument("--cells", nargs="+", default=["lstm", "gru"], choices=["lstm", "gru"])
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.1], help="shares of steps read")
    parser.add_argument("--spread", nargs="+", default=["constant"], choices=["constant", "lognormal"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--peers", nargs="+", default=["native", "ours"], choices=list(PEERS))
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each line of the table")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards" / "speed" / "cpu.csv")
    parser.add_argument("--dry_run", action="store_true", help="print only: no equality tests, no idle check, no CSV")
    return parser.parse_args(arguments)


def workloads(options: argparse.Namespace) -> list[Workload]:
    """Everything to be measured, in order."""
    shapes = SHAPES
    if options.shapes:
        shapes = [Shape(*(int(part) for part in text.split(",")[:5])) for text in options.shapes]  # type: ignore[arg-type]
    axes = itertools.product(shapes, options.cells, options.modes, options.threads, options.spread, options.rates)
    return [
        Workload(shape, cell, mode, rate, spread, threads)
        for shape, cell, mode, threads, spread, rate in axes
        if not (spread == "lognormal" and (rate == 1.0 or shape.batch == 1))
    ]


def write(path: Path, rows: Sequence[Row]) -> None:
    """All rows so far: what was measured before an interruption stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> None:
    """Measure, print, write."""
    if "--device" in sys.argv:
        import benchmark_gpu

        benchmark_gpu.main(sys.argv[1:])
        return
    if "--streaming" in sys.argv:
        import benchmark_streaming

        benchmark_streaming.main([argument for argument in sys.argv[1:] if argument != "--streaming"])
        return
    options = parse()
    if not options.dry_run:
        check_equality()
    facts, rows = provenance(), []
    peak = peak_flops()
    print(f"{facts['device']}: {peak / 1e9:.0f} GFLOP/s of multiply-adds on one core")
    for workload in workloads(options):
        if not options.dry_run:
            check_idle()
        torch.set_num_threads(workload.threads)
        for values in rows_of(workload, measure(workload, options.peers, options.seconds), peak * workload.threads):
            rows.append(Row(**facts, **values))  # type: ignore[arg-type]
            show(rows[-1])
        if not options.dry_run:
            write(options.output, rows)
    report(rows)


if __name__ == "__main__":
    main()
