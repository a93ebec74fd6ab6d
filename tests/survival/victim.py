"""scripts/train.py, telling on stdout what it is in the middle of, so that a killer can choose the moment.

    python tests/survival/victim.py --task digits ...        # options of scripts/train.py

Lines of the first process: "@begin step", "@end step", and likewise save, evaluate and finish (what comes after the
last step).
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_skiprnn.training import SkipRNNTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
train = importlib.import_module("train")


def tell(word: str, phase: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(1, f"@{word} {phase}\n".encode())  # one system call: lines of two processes never mix


def reported(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tell("begin", phase)
        try:
            return method(*args, **kwargs)
        finally:
            tell("end", phase)

    return wrapper


PHASES = {"training_step": "step", "_save_checkpoint": "save", "evaluation_loop": "evaluate"}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, phase in PHASES.items():
        setattr(SkipRNNTrainer, name, reported(phase, getattr(SkipRNNTrainer, name)))
    train.results_of = reported("finish", train.results_of)
    train.main()
    tell("end", "run")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
