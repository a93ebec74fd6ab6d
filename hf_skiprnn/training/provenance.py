"""Provenance of a result: the commit of this checkout, and the processor of this machine."""

import platform
import subprocess
from pathlib import Path

import torch

UNKNOWN = "unknown"


def commit() -> str:
    """Return the commit of this package: the first 12 digits of its hash.

    It ends with "-dirty" if a tracked file outside model_cards/ differs from that commit, because the result then
    cannot be repeated from the history. It is "unknown" if the package is not in its own checkout, for example because
    it is installed, or if git is missing.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # a parent folder may be a checkout of something else
        return UNKNOWN
    try:
        found = _git(root, "rev-parse", "--short=12", "HEAD")
        is_dirty = _git(root, "diff", "--quiet", "HEAD", "--", ".", ":!model_cards").returncode == 1
    except FileNotFoundError:  # git is not installed
        return UNKNOWN
    return found.stdout.strip() + "-dirty" * is_dirty or UNKNOWN


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-c", "safe.directory=*", *arguments]  # the checkout may belong to another user
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def cpu_name() -> str:
    """Return the processor's name and the vector instruction set that PyTorch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
