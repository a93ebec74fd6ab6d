"""How the benchmarks time: only what passes its tests, only on an idle machine, and all that is compared in turn."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median

from .rows import ROOT
from .workload import Run

BUSY_PERCENT = 15.0  # of all cores: the most that other processes may take in the moment before a measurement


def check_equality(*tests: str) -> None:
    """Run these test files, and stop where one fails; what passed is not run again until the package changes.

    Args:
        tests: paths, relative to the root of the checkout.

    Raises:
        SystemExit: a test fails.
    """
    sources = sorted(path for path in (ROOT / "hf_skiprnn").rglob("*") if path.suffix in (".py", ".h", ".cpp", ".so"))
    state = hashlib.sha256(b"".join([*(path.read_bytes() for path in sources), " ".join(tests).encode()])).hexdigest()
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
    """Wait until other processes leave the machine alone, for a minute at most.

    Raises:
        SystemExit: the machine stays busy.
    """
    import psutil  # type: ignore[import-untyped]  # an extra, which ships no types

    for _ in range(150):
        busy = psutil.cpu_percent(interval=0.4)
        if busy <= BUSY_PERCENT:
            return
    sys.exit(f"Stopped: {busy:.0f} % of the machine is busy (at most {BUSY_PERCENT:.0f} %). Try again later.")


def interleaved(runs: Mapping[str, Run], seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of every call of each run: one warm-up, then all in turn for `seconds`, at least 3 times.

    In turn, so that a change of the processor's clock meets all of them alike.
    """
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


def times_faster(reference: Sequence[float], times: Sequence[float]) -> float:
    """Return how many times faster than the reference a run is: the median over rounds of the two calls' ratio."""
    return median(slow / fast for slow, fast in zip(reference, times, strict=True))
