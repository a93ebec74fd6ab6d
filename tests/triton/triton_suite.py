"""The Triton engine against the definition, on a CUDA GPU, or on the CPU, interpreted.

    TRITON_INTERPRET=1 python tests/triton/triton_suite.py     # small shapes, no GPU
    python tests/triton/triton_suite.py                        # a GPU: larger shapes and other precisions, too
    python tests/triton/triton_suite.py "options, gru" TF32    # only checks whose names contain one of these

It needs no pytest, which a GPU machine may lack. PYTHONPATH: the checkout and its tests/scans. It prints one line a
check; the exit status is 1 if any fails. --results FILE keeps the outcomes, renewed after every check; --limit is the
number of seconds after which what still runs has failed. No kernel is tuned but where a check says so.
"""

import argparse
import json
import math
import os
import sys
import time
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from triton_cases import CHECKS, GPU_CHECKS, INTERPRETED, engine


def run_check(name: str) -> bool:
    """Whether the check holds. Prints its line, and what went wrong."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    wrong = ""
    try:
        with engine():
            (CHECKS | GPU_CHECKS)[name]()
    except Exception:  # noqa: BLE001 - the other checks still tell something
        wrong = f"\n{traceback.format_exc()}"
    print(f"{name}: {'FAILED' if wrong else 'ok'} ({time.perf_counter() - start:.1f} s){wrong}", flush=True)
    return not wrong


def run_and_exit(name: str) -> None:
    """In a process of its own: what breaks the device there breaks no other check."""
    sys.exit(0 if run_check(name) else 1)


class Outcomes:
    """What became of the checks: "not finished", then "ok" or "FAILED"; in the file, too."""

    def __init__(self, names: list[str], file: Path | None):
        self.of, self.file = dict.fromkeys(names, "not finished"), file
        self.write()

    def add(self, name: str, holds: bool) -> None:
        self.of[name] = "ok" if holds else "FAILED"
        self.write()

    def write(self) -> None:
        if self.file is not None:
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.of, indent=1) + "\n", encoding="utf-8")
            part.replace(self.file)


def run_in_processes(outcomes: Outcomes, limit: float) -> None:
    """Several at a time, since most of the time goes into compiling."""
    jobs = max(1, min(8, (os.cpu_count() or 2) // 2))
    end = time.monotonic() + limit
    context = get_context("spawn")
    waiting, running = list(outcomes.of), dict[str, Any]()
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[name] = context.Process(target=run_and_exit, args=(name,))
            running[name].start()
        for name, process in list(running.items()):
            if process.exitcode is not None:
                outcomes.add(name, process.exitcode == 0)
                del running[name]
        time.sleep(0.05)
    for process in running.values():
        process.kill()


def main() -> int:
    """Run every check; how many did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", default=[""], help="parts of names of checks")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--limit", type=float, default=math.inf)
    options = parser.parse_args()
    checks = CHECKS if INTERPRETED else GPU_CHECKS | CHECKS  # the longest first
    names = [name for name in checks if any(part in name for part in options.wanted)]
    outcomes = Outcomes(names, options.results)
    if INTERPRETED:
        for name in names:
            outcomes.add(name, run_check(name))
    else:
        run_in_processes(outcomes, options.limit)
    failed = [name for name, outcome in outcomes.of.items() if outcome != "ok"]
    print(f"{len(names) - len(failed)} of {len(names)} checks passed", flush=True)
    if failed:
        print(f"Not passed: {'; '.join(failed)}", flush=True)
    return len(failed)


if __name__ == "__main__":
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    if INTERPRETED:
        import triton_interpreter  # noqa: F401 - speeds the interpreter up
    elif not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU here; TRITON_INTERPRET=1 runs the small checks on the CPU.")
    sys.exit(min(main(), 1))
