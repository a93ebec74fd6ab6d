"""Train, classify and stream for a long time, and check that throughput does not fall and memory does not grow.

    python tests/survival/soak.py --minutes 20      # writes soak.csv, a row a minute

Lengths (2 to 400 steps) and batch sizes (1 to 64) are random. Throughput is steps per second of processor time. Other
programs on the machine change it too. So after every minute a new process serves the same kind of traffic for a quarter
of the time, and the old process's throughput is divided by the new one's. The script compares the last quarter of the
minutes with the second quarter. It fails if the median of this quotient has fallen by more than 10 %, or if the old
process's memory has grown by more than 2 % plus 4 MiB.
"""

import argparse
import csv
import gc
import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification

TABLE = Path(__file__).with_name("soak.csv")
KINDS = ("training", "inference", "stream")
DECAY, GROWTH, NOISE = 0.10, 0.02, 4.0  # tolerances: fall of throughput, growth of memory (shares), and MiB


class Traffic:
    """Random requests to one model: training, inference and streams."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        config = SkipRNNConfig(input_size=4, hidden_size=32, num_labels=5, update_bias=-2.0, budget_weight=1e-4)
        self.model = SkipRNNForSequenceClassification(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)

    def batch(self, rows: int) -> dict[str, torch.Tensor]:
        steps = self.rng.randint(2, 400)
        lengths = torch.randint(1, steps + 1, (rows, 1))
        return {
            "input_values": torch.randn(rows, steps, 4),
            "attention_mask": torch.arange(steps) < lengths,
            "labels": torch.randint(0, 5, (rows,)),
        }

    def training(self) -> tuple[int, int]:
        """Run one optimizer step; return (rows, steps)."""
        batch = self.batch(self.rng.randint(1, 64))
        self.model.train()(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return batch["attention_mask"].shape[0], batch["attention_mask"].numel()

    def inference(self) -> tuple[int, int]:
        batch = self.batch(self.rng.randint(1, 64))
        with torch.inference_mode():
            self.model.eval()(**batch)
        return batch["attention_mask"].shape[0], batch["attention_mask"].numel()

    def stream(self) -> tuple[int, int]:
        steps = self.rng.randint(2, 400)
        inputs, stream = torch.randn(steps, 4), self.model.eval().stream()
        for x in inputs:
            stream.push(x)
        return 1, steps


def minute(traffic: Traffic, seconds: float) -> dict[str, Any]:
    """Serve traffic, and return a row of the table."""
    rows, steps, spent = 0, dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0.0)
    uses: dict[str, Callable[[], tuple[int, int]]] = {kind: getattr(traffic, kind) for kind in KINDS}
    end = time.monotonic() + seconds
    while rows == 0 or time.monotonic() < end:
        for kind, use in uses.items():
            start = time.process_time()
            more_rows, more_steps = use()
            spent[kind] += time.process_time() - start
            steps[kind] += more_steps
            rows += more_rows
    gc.collect()
    memory = psutil.Process().memory_info().rss / 2**20
    speed = {f"{kind}_steps_per_cpu_second": round(steps[kind] / spent[kind]) for kind in KINDS}
    return {"rows": rows, "memory_mib": round(memory, 1), **speed}


def old_process(pipe: Any, seconds: float) -> None:
    """Serve traffic and send a row of the table whenever the pipe asks for one."""
    torch.set_num_threads(1)
    traffic = Traffic(0)
    while pipe.recv():
        pipe.send(minute(traffic, seconds))


def new_process(pipe: Any, seconds: float, seed: int) -> None:
    """Warm up, then serve traffic and send one row."""
    torch.set_num_threads(1)
    traffic = Traffic(seed)
    minute(traffic, 0.0)
    pipe.send(minute(traffic, seconds))


def fork(target: Callable[..., None], *args: object) -> Any:
    """Fork a process, which has all imports already, and return the pipe to it."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    multiprocessing.get_context("fork").Process(target=target, args=(theirs, *args), daemon=True).start()
    theirs.close()  # so that reading fails if the process dies
    return ours


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """Return what became worse between the second and the last quarter of the minutes."""
    quarter = max(len(rows) // 4, 1)
    early, late = rows[quarter : 2 * quarter] or rows[:1], rows[-quarter:]
    before, after = (median(row["memory_mib"] for row in part) for part in (early, late))
    found = [f"memory grew from {before} to {after} MiB"] if after > before * (1 + GROWTH) + NOISE else []
    for kind in KINDS:
        before, after = (median(row[f"{kind}_against_new"] for row in part) for part in (early, late))
        if after < before * (1 - DECAY):
            found.append(f"{kind} against a new process fell from {before} to {after}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds for each row of the table")
    parser.add_argument("--output", type=Path, default=TABLE)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    old = fork(old_process, options.seconds)
    with options.output.open("w", newline="") as file:
        for number in range(options.minutes):
            old.send(True)
            row, new = old.recv(), fork(new_process, options.seconds / 4, number).recv()
            names = {kind: f"{kind}_steps_per_cpu_second" for kind in KINDS}
            row |= {f"{kind}_against_new": round(row[name] / new[name], 3) for kind, name in names.items()}
            rows.append({"minute": number + 1, **row})
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if number == 0:
                writer.writeheader()
            writer.writerow(rows[-1])
            file.flush()
            print(rows[-1], flush=True)
    old.send(False)
    found = losses(rows)
    print("; ".join(found) or "nothing decayed, nothing grew")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
