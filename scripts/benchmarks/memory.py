"""Peak memory of one training step at (256, 784, 1, 110), ours against nn.LSTM and nn.GRU. Linux.

    python scripts/benchmark.py --memory

Each measurement is a process of its own: its highest resident memory during the step, less what it held before. Before,
it has taken a small step, so that libraries and threads are there. One CSV row each in model_cards/speed/memory.csv.
"""

import argparse
import csv
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.benchmarks.peers import PEERS, Workload

ROOT = Path(__file__).resolve().parents[2]
RATES = (1.0, 0.5, 0.25, 0.1)
LARGEST = 0.2  # of the native layer's memory


def _held(name: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


def measure(cell: str, name: str, rate: float) -> float:
    """MiB that a training step takes in this process."""
    from scripts.benchmarks.cpu import Shape

    torch.set_num_threads(1)
    for shape in (Shape(2, 16, 1, 110), Shape(256, 784, 1, 110)):
        run = PEERS[name](Workload(shape, cell, "training", rate))
        assert run is not None  # both can train
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _held("VmRSS")
        run()
    return _held("VmHWM") - before


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write."""
    from scripts.benchmarks.cpu import provenance

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("CELL", "NAME", "RATE"), help="in this process, and print the MiB")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards" / "speed" / "memory.csv")
    options = parser.parse_args(arguments)
    if options.one:
        print(measure(options.one[0], options.one[1], float(options.one[2])))
        return
    facts, rows = provenance(), []
    for cell in ("lstm", "gru"):
        peaks = {}
        for name, rate in [("native", 1.0), *itertools.product(["ours"], RATES)]:
            command = [
                sys.executable,
                str(ROOT / "scripts" / "benchmark.py"),
                "--memory",
                "--one",
                cell,
                name,
                str(rate),
            ]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name, rate] = peak = float(run.stdout.split()[-1])
            share = peak / peaks["native", 1.0]
            verdict = "" if name == "native" else f"{share:6.3f} ({LARGEST:g}) {'pass' if share <= LARGEST else 'MISS'}"
            print(f"{cell:5}{name:8}{rate:4.0%} {peak:9.1f} MiB  {verdict}", flush=True)
            shape = {"batch": 256, "steps": 784, "inputs": 1, "units": 110}
            row = {"cell": cell, "mode": "training"} | shape | {"rate": rate, "name": name, "peak_mib": round(peak, 1)}
            rows.append(facts | row | {"share_of_native": round(share, 4)})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
