"""Run scripts/train.py, print its phases, and kill it at the moment that the variable MOMENT names.

    MOMENT="save 2 0.01" python tests/survival/victim.py --task digits ...        # options of scripts/train.py

The first process prints lines such as "@begin step 1.25" and "@end step 1.26", with its processor time in seconds. The
phases are step, save, evaluate and finish (everything after the last step). The last line is "@kill all 1.27". MOMENT
holds a phase ("start": the run itself), the number of its occurrence from 0, and the seconds of processor time after it
began, which do not depend on the load of the machine. A separate thread sends SIGKILL to the whole process group.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from hf_skiprnn.commands import train
from hf_skiprnn.training.trainer import SkipRNNTrainer

MOMENT = os.environ.get("MOMENT", "")
_begun: Counter[str] = Counter()


def tell(word: str, phase: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    os.write(1, f"@{word} {phase} {time.process_time():.6f}\n".encode())  # one system call, so that lines never mix
    if word == "begin" and MOMENT.startswith(f"{phase} {_begun[phase]} "):
        end = time.process_time() + float(MOMENT.split()[-1])
        threading.Thread(target=kill_at, args=(end,), daemon=True).start()
    _begun[phase] += word == "begin"


def kill_at(end: float) -> None:
    while time.process_time() < end:
        time.sleep(1e-4)
    tell("kill", "all")
    os.killpg(0, signal.SIGKILL)


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


def main(argv: list[str]) -> None:
    """Run `scripts/train.py` with these arguments."""
    torch.set_num_threads(1)
    tell("begin", "start")
    train.main(argv)
    tell("end", "run")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


for _name, _phase in PHASES.items():
    setattr(SkipRNNTrainer, _name, reported(_phase, getattr(SkipRNNTrainer, _name)))
train.results_of = reported("finish", train.results_of)

if __name__ == "__main__":
    main(sys.argv[1:])
