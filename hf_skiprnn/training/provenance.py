"""Where a result comes from: the commit of this checkout, and the processor of this machine."""

import platform
import subprocess
from pathlib import Path

import torch

UNKNOWN = "unknown"


def commit() -> str:
    """Return the commit that this package runs at: 12 digits of its hash.

    It ends with "-dirty" where a tracked file other than results (model_cards/) differs from that commit: nobody can
    then repeat the result from the history. It is "unknown" where the package is not in a checkout of its own, as when
    it is installed, or where there is no git.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # a folder around it may be somebody else's checkout
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
    """Return the processor's name and its vector instructions, as PyTorch uses them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
