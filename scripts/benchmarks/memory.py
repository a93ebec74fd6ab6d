"""Measure the peak memory of one training step at (256, 784, 1, 110), ours against nn.LSTM and nn.GRU. Linux only.

    python scripts/benchmark.py memory

Each measurement runs in its own process: it is the peak of resident memory during the step, minus the memory before it.
A small step runs first, so that libraries and threads are loaded. The rows go to model_cards/speed/memory.csv.
"""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .peers import PEERS
from .rows import ROOT, SPEED, cpu_provenance, write
from .workload import Shape, Workload

SHAPE = Shape(256, 784, 1, 110)
RATES = (1.0, 0.5, 0.25, 0.1)
LARGEST = 0.2  # target: largest ratio of our memory to the native layer's
KEY = ("cell", "mode", "batch", "steps", "inputs", "units", "rate", "name", "instruction_set")


def resident(name: str) -> float:
    """Return VmRSS (resident memory now) or VmHWM (its peak) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


def measure(cell: str, name: str, rate: float) -> float:
    """Run a training step in this process, and return the MiB that it takes."""
    torch.set_num_threads(1)
    for shape in (Shape(2, 16, 1, 110), SHAPE):
        run = PEERS[name](Workload(shape, cell, "training", rate))
        assert run is not None  # all of these peers can train
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
        run()
    return resident("VmHWM") - before


def measure_elsewhere(cell: str, name: str, rate: float) -> float:
    """Call `measure` in a new process, and return its result."""
    command = [sys.executable, "-m", "scripts.benchmarks.memory", "--one", cell, name, str(rate)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("CELL", "NAME", "RATE"), help="measure in this process; print MiB")
    parser.add_argument("--output", type=Path, default=SPEED / "memory.csv")
    options = parser.parse_args(arguments)
    if options.one:
        print(measure(options.one[0], options.one[1], float(options.one[2])))
        return
    facts, rows = cpu_provenance(), []
    for cell in ("lstm", "gru"):
        native = 0.0
        for name, rate in [("native", 1.0), *itertools.product(["ours"], RATES)]:
            peak = measure_elsewhere(cell, name, rate)
            native = peak if name == "native" else native
            share = peak / native
            verdict = "" if name == "native" else f"{share:6.3f} ({LARGEST:g}) {'pass' if share <= LARGEST else 'MISS'}"
            print(f"{cell:5}{name:8}{rate:4.0%} {peak:9.1f} MiB  {verdict}", flush=True)
            row = {"cell": cell, "mode": "training"} | dict(list(SHAPE.columns().items())[:4])
            row |= {"rate": rate, "name": name, "peak_mib": round(peak, 1), "share_of_native": round(share, 4)}
            rows.append(facts | row)
    write(options.output, rows, KEY)


if __name__ == "__main__":
    main(sys.argv[1:])
