"""Helpers for tests of the repository: list its tracked files, and run Python in a new process."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
from paths import ROOT


@cache
def tracked_files() -> list[PurePosixPath]:
    """Return the tracked files that exist, relative to the root; skip the test if git is missing."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    try:
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [PurePosixPath(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def run_python(code: str, folder: Path, **environment: str) -> None:
    """Run code in a new process in `folder`, with this checkout; if it fails, fail with its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
