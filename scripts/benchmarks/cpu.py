"""Time Skip RNN on the CPU against nn.LSTM, nn.GRU, ONNX Runtime and a masked loop, alternating in one process.

    python scripts/benchmark.py                        # every part, with the widest instruction set of this machine
    python scripts/benchmark.py --isa avx2             # our engine and the peers use at most AVX2
    python scripts/benchmark.py --parts targets --cells lstm --modes inference     # a part, in a few minutes
    python scripts/benchmark.py --shapes 64,784,1,110 --rates 1.0 0.5 --peers native ours native_bf16
    python scripts/benchmark.py --checkpoints model_cards/skip-*                   # trained models at their own rates
    python scripts/benchmark.py --report               # the table of the targets from the CSV file; measures nothing

Each measurement is a row of model_cards/speed/cpu.csv. It holds the median and the 20th and 80th percentile in
milliseconds, the speed-up over the native layer, and the share of the core's measured multiply-add peak. A run replaces
the rows that it measures and keeps the others, so the benchmark can be run in parts. At the end, targets.py prints pass
or MISS for every target. Nothing is measured if the fast scans disagree with the dense scan (these tests run once for
each state of the sources) or if the machine is busy. The column `spread` tells where the update rates come from: they
are constant, or differ between rows with a log-normal distribution (a batch takes as long as its slowest row), or, with
the name of a checkpoint, they are those of that trained model.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .peak import peak_flops
from .peers import PEERS
from .rows import SPEED, cpu_provenance, percentiles, read, write
from .targets import WORKLOAD, report
from .timing import check_equality, interleaved, times_faster, wait_until_idle
from .workload import Shape, Workload, of_checkpoint

TESTS = ("tests/scans/test_scans.py", "tests/scans/test_cpu_engine.py")
KEY = (*WORKLOAD, "threads", "name", "instruction_set")  # the columns that identify a measurement
NARROW = [Shape(batch, 784, 1, 110) for batch in (1, 16, 64, 256)]
WIDE = [
    Shape(32, 400, 300, 128, input_gradients=True),
    Shape(16, 250, 2048, 512),
    Shape(8, 250, 4096, 256, layers=2),
]
RATES = (1.0, 0.5, 0.25, 0.1)


class Part(NamedTuple):
    """A part of the benchmark: every combination of its shapes, rates, peers and numbers of threads."""

    shapes: list[Shape]
    rates: Sequence[float] = RATES
    peers: Sequence[str] = ("native", "ours")
    threads: Sequence[int] = (1,)
    spread: str = "constant"
    seconds: float = 1.0  # time of repetitions for each workload


PARTS = {
    "targets": Part(NARROW, seconds=3.0),
    "wide": Part(WIDE),
    "long": Part([Shape(1, 16000, 1, 64)]),
    "sequence": Part([Shape(64, 784, 1, 110, sequence=True)]),
    "masked": Part([Shape(256, 784, 1, 110)], peers=("native", "ours", "masked_loop")),
    "peers": Part([*NARROW[1:3], WIDE[1]], (0.5,), tuple(PEERS)),
    "bf16": Part([NARROW[0], *WIDE], (1.0, 0.5, 0.25), ("native", "ours", "native_bf16", "ours_bf16")),
    "lognormal": Part(NARROW[1:], (0.5, 0.25, 0.1), ("native", "ours", "native_packed"), spread="lognormal"),
    "threads": Part([NARROW[1], NARROW[3], WIDE[0], WIDE[1]], (0.5,), threads=(1, 2), seconds=2.0),
}


def as_in_parts(shape: Shape) -> Shape:
    """Return the shape of the same sizes in PARTS, if there is one: rows of the CSV do not tell input_gradients."""
    known = (part for each in PARTS.values() for part in each.shapes)
    return next((part for part in known if part.columns() == shape.columns()), shape)


def operations(workload: Workload) -> float:
    """Return the number of floating-point operations that a run needs; a multiply-add counts as two.

    In a training step an update needs three matrix products: forward, the gradient of the weights, and the gradient of
    the inputs (in the lowest layer only if it is wanted). A skipped step needs one: the gradient of its gate takes the
    product with its input. The product with the state is shared by all steps since the last update.
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


def measure(workload: Workload, peers: Sequence[str], seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of our layer and of the peers that can run this workload."""
    return interleaved({name: run for name in peers if (run := PEERS[name](workload)) is not None}, seconds)


def rows_of(workload: Workload, times: dict[str, list[float]], peak: float) -> list[dict[str, object]]:
    """Return the CSV rows of one workload, without the columns of `cpu_provenance`."""
    names = ("threads", "level", "cell", "mode", "rate", "spread")
    about = workload.shape.columns() | {name: getattr(workload, name) for name in names}
    rows: list[dict[str, object]] = []
    for name, values in times.items():
        measured = percentiles(values, "_ms")
        ratio = times_faster(times["native"], values) if "native" in times else float("nan")
        share = operations(workload) / (measured["p50_ms"] * 1e-3) / peak
        rows.append(
            {**about, "name": name, **measured}
            | {"native_over_this": round(ratio, 3), "share_of_peak": round(share, 3) if name == "ours" else ""}
        )
    return rows


def show(row: dict[str, object]) -> None:
    """Print one measurement."""
    shape = f"({row['batch']}, {row['steps']}, {row['inputs']}, {row['units']}) x {row['layers']}"
    share = f"  {row['share_of_peak']:.0%} of peak" if row["share_of_peak"] != "" else ""
    print(
        f"{row['cell']:5}{row['mode']:10}{shape:26}{row['threads']} thr {row['rate']:4.0%} {row['spread']:26}"
        f"{row['name']:22}{row['p50_ms']:10.3f} ms  {row['native_over_this']:6.2f}x{share}",
        flush=True,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to measure; default: all")
    add("--shapes", nargs="+", type=Shape.parse, help="B,T,I,H[,layers] instead of the parts")
    add("--checkpoints", nargs="+", help="instead of the parts, folders of trained models, on their test rows")
    add("--cells", nargs="+", default=["lstm", "gru"], choices=["lstm", "gru"])
    add("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    add("--batches", nargs="+", type=int, help="only shapes of these batch sizes")
    add("--rates", nargs="+", type=float, help="shares of steps read; default: the part's")
    add("--threads", nargs="+", type=int, help="default: the part's")
    add("--peers", nargs="+", choices=list(PEERS), help="default: the part's")
    add("--seconds", type=float, help="time for each workload; default: the part's")
    add("--output", type=Path, default=SPEED / "cpu.csv")
    add("--dry_run", action="store_true", help="only print: no tests of equality, no wait for an idle machine, no CSV")
    add("--check", action="store_true", help="only run the tests of equality")
    add("--report", action="store_true", help="only print the table of the targets")
    return parser.parse_args(arguments)


def has_weights(folder: str) -> bool:
    """Return whether a checkpoint folder holds weights; if not, say that it is left out."""
    found = any(Path(folder).glob("model*.safetensors"))
    if not found:
        print(f"{folder} holds no weights: it is not measured.")
    return found


def workloads(options: argparse.Namespace) -> list[tuple[Workload, Sequence[str], float]]:
    """Return what to measure, in order: a workload, its peers, and its time in seconds."""
    if options.checkpoints:
        return [
            (of_checkpoint(folder, mode), options.peers or ("native", "ours"), options.seconds or 3.0)
            for folder in options.checkpoints
            if has_weights(folder)
            for mode in options.modes
        ]
    parts = [Part([*map(as_in_parts, options.shapes)])] if options.shapes else [PARTS[name] for name in options.parts]
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write each workload, then print the table of the targets."""
    options = parse(arguments)
    if options.report:
        report(read(options.output))
        return
    if not options.dry_run:
        check_equality(*TESTS)
    if options.check:
        return
    facts, peak, planned = cpu_provenance(), peak_flops(), workloads(options)
    print(f"{facts['device']}, {facts['instruction_set']}: {peak / 1e9:.0f} GFLOP/s of multiply-adds on one core")
    minutes = sum(seconds for _, _, seconds in planned) / 60
    print(f"{len(planned)} workloads, at least {minutes:.0f} minutes")
    for workload, peers, seconds in planned:
        if not options.dry_run:
            wait_until_idle()
        torch.set_num_threads(workload.threads)
        rows = rows_of(workload, measure(workload, peers, seconds), peak * workload.threads)
        for row in rows:
            show(row)
        if not options.dry_run:
            write(options.output, [facts | row for row in rows], KEY)
    if not options.dry_run:
        report(read(options.output))


if __name__ == "__main__":
    main(sys.argv[1:])
