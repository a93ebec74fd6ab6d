"""The provenance of a result: the commit of this checkout and the processor of this machine."""

import platform
import subprocess
from pathlib import Path

import torch


def commit() -> str:
    """Return the checkout's commit: with -dirty if files other than results differ from it, "unknown" without git."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-c", "safe.directory=*"]
    try:
        name = subprocess.run([*git, "describe", "--always"], cwd=root, capture_output=True, text=True, check=False)
        changed = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!model_cards"]
        dirty = subprocess.run(changed, cwd=root, capture_output=True, check=False).returncode == 1
    except FileNotFoundError:  # no git
        return "unknown"
    return name.stdout.strip() + "-dirty" * dirty or "unknown"


def cpu_name() -> str:
    """Return the processor's name and the vector instructions that torch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
