"""This checkout, as tests of the repository look at it: its tracked files, and Python processes that run on it."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
from paths import ROOT


@cache
def tracked_files() -> list[PurePosixPath]:
    """The tracked files that are on disk, relative to the root; without git the test is skipped."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    try:
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [PurePosixPath(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def run_python(code: str, folder: Path, **environment: str) -> None:
    """Run code on this checkout, in a new process in `folder`; fail with its output where it fails."""
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
