"""The Triton scan in the equality tests of all backends, without a GPU: its kernels run on the CPU, interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 and aarch64")


def test_the_triton_scan_passes_the_tests_of_all_scans() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "triton"]
    done = subprocess.run(
        [*command, *(Path(__file__).with_name(name) for name in ("test_scans.py", "test_gate.py"))],
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert "-triton]" not in done.stdout  # nothing was skipped
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 30
