"""Timing for the benchmarks: run the tests first, wait until the machine is idle, and alternate the compared runs."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch

from .rows import ROOT
from .workload import Run

SHORT = 50.0  # milliseconds of a short call
BUSY_PERCENT = 15.0  # largest load of all cores by other processes just before a measurement


def check_equality(*tests: str) -> None:
    """Run test files and exit if one fails. Files that passed are not run again until the package changes.

    Args:
        tests: paths, relative to the root of the checkout.

    Raises:
        SystemExit: a test fails.
    """
    sources = sorted(path for path in (ROOT / "hf_skiprnn").rglob("*") if path.suffix in (".py", ".h", ".cpp", ".so"))
    told = " ".join([*tests, os.environ.get("HF_SKIPRNN_CPU_ISA", "")])  # each instruction set is tested
    state = hashlib.sha256(b"".join([*(path.read_bytes() for path in sources), told.encode()])).hexdigest()
    stamp = ROOT / "build" / "benchmark-equality" / state
    if stamp.exists():
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"Nothing is measured: the tests of equality fail.\n{run.stdout[-3000:]}")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()


def wait_until_idle() -> None:
    """Wait until other processes leave the machine idle, for at most a minute.

    Raises:
        SystemExit: the machine stays busy.
    """
    import psutil  # type: ignore[import-untyped]  # has no types

    for _ in range(150):
        busy = psutil.cpu_percent(interval=0.4)
        if busy <= BUSY_PERCENT:
            return
    sys.exit(f"Stopped: {busy:.0f} % of the machine is busy (at most {BUSY_PERCENT:.0f} %). Try again later.")


def interleaved(runs: Mapping[str, Run], seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of every call of each run: a warm-up, then at least 3 calls each in `seconds` seconds.

    The runs alternate, so that a change of the processor's clock affects all of them equally. A short call is made
    twice and the second one is timed: the first one after another run finds other caches and a fragmented heap.

    Before each call subnormal numbers are flushed to zero. Gradients that fade over hundreds of steps become subnormal,
    and a layer of PyTorch is then up to ten times as slow. Our engine flushes by itself. A peer may change the thread's
    setting, so it is not enough to set it once.
    """
    twice = set()
    for name, run in runs.items():
        _milliseconds(run)
        if _milliseconds(run) < SHORT:
            twice.add(name)
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 3 or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            if name in twice:
                _milliseconds(run)
            times[name].append(_milliseconds(run))
    return times


def _milliseconds(run: Run) -> float:
    torch.set_flush_denormal(True)
    before = time.perf_counter()
    run()
    return (time.perf_counter() - before) * 1e3


def times_faster(reference: Sequence[float], times: Sequence[float]) -> float:
    """Return the speed-up over the reference: the median over rounds of the ratio of the two calls' times."""
    return median(slow / fast for slow, fast in zip(reference, times, strict=True))
