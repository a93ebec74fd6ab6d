"""Where a result comes from: this checkout's commit and this machine's processor."""

import platform
import subprocess
from pathlib import Path

import torch


def commit() -> str:
    """The checkout's commit, marked -dirty where tracked files differ from it; "unknown" outside of a checkout."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor's name and its vector instructions, as torch sees them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
