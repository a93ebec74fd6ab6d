"""Where a result comes from: this checkout's commit and this machine's processor."""

import platform
import subprocess
from pathlib import Path

import torch


def commit() -> str:
    """The checkout's commit, -dirty where files other than results differ from it; "unknown" where there is none."""
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
    """The processor's name and its vector instructions, as torch sees them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
