"""Measure how many rows per second `train.py` trains on, and where the time of a training step goes.

    python scripts/benchmark.py training --task digits
    python scripts/benchmark.py training --task fsdd --dataset_name FOLDER
    python scripts/benchmark.py training --dataset_name my_folder --label_column activity --max_steps 500

The options are those of `train.py`, whose code runs here without evaluations and checkpoints, for an epoch and 200
steps unless --max_steps is given. The first 5 steps are not counted. The first epoch reads and decodes the rows; later
epochs find most of them in memory. To compare two commits, run the command in a checkout of each. "model" is the
forward and backward pass: the engine and autograd. "rest" is transformers' and our Trainer.
"""

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data._utils.fetch import _IterableDatasetFetcher, _MapDatasetFetcher
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import has_length

from hf_skiprnn.commands.summary import LabelWatch
from hf_skiprnn.commands.train import trainer_of
from hf_skiprnn.commands.train_options import given, parse

WARM_UP, MORE = 5, 200  # steps that are not counted; steps after the first epoch
QUIET = ("--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false", "--report_to=none")


class Parts(TrainerCallback):
    """Seconds spent in each part of a training after the warm-up, without the parts that run inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.measured: list[tuple[int, dict[str, float]]] = []  # steps and seconds of the first and the later epochs
        self.start = WARM_UP
        self.open = ["rest"]
        self.since = time.process_time()

    def turn(self) -> None:
        """Add the time since the last call to the part that runs."""
        now = time.process_time()
        self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def enter(self, name: str) -> None:
        """Begin a part."""
        self.turn()
        self.open.append(name)

    def leave(self) -> None:
        """End the part that began last."""
        self.turn()
        self.open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.enter("optimizer")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.leave()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.turn()
        if state.global_step == WARM_UP:
            self.seconds.clear()
        is_last = state.global_step == state.max_steps  # saving the model and the like come later
        is_first = not self.measured and state.epoch >= 1
        if state.global_step > self.start and (is_last or is_first):
            self.measured.append((state.global_step - self.start, dict(self.seconds)))
            self.start = state.global_step
            self.seconds.clear()


def measure(options: Sequence[str]) -> list[tuple[float, dict[str, float]]]:
    """Train with the options of `train.py`; return rows per second, and each part's share of the time.

    There is one entry for the first epoch and one for the later ones; for an endless data set there is one entry.
    """
    parts = Parts()
    with tempfile.TemporaryDirectory() as folder:
        settings = parse([*options, f"--output_dir={folder}", *QUIET])
        set_seed(settings.args.seed)
        splits, batch = settings.task.load(settings.args.seed), settings.args.train_batch_size
        batch *= settings.args.gradient_accumulation_steps
        if not given([*options], "max_steps"):
            settings.args.max_steps = MORE + (len(splits.train) // batch if has_length(splits.train) else 0)
        trainer = trainer_of(settings, splits, LabelWatch(settings.task.compute_metrics))
        trainer.add_callback(parts)
        trainer.data_collator = parts.timed("collate", trainer.data_collator)
        for owner, name in ((trainer, "compute_loss"), (trainer.accelerator, "backward")):
            setattr(owner, name, parts.timed("model", getattr(owner, name)))
        for fetcher in (_MapDatasetFetcher, _IterableDatasetFetcher):
            setattr(fetcher, "fetch", parts.timed("read rows", fetcher.fetch))  # noqa: B010 - mypy refuses to assign it
        trainer.train()
    found = []
    for steps, seconds in parts.measured:
        total = sum(seconds.values())
        found.append((steps * batch / total, {name: part / total for name, part in seconds.items()}))
    return found


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if not arguments or "--help" in arguments:
        print(__doc__)
        return
    for name, (rate, shares) in zip(("first epoch", "later"), measure(arguments), strict=False):
        parts = ", ".join(f"{part} {shares[part]:.1%}" for part in sorted(shares, key=shares.__getitem__, reverse=True))
        print(f"{name}: {rate:.0f} rows/s: {parts}")


if __name__ == "__main__":
    main(sys.argv[1:])
