"""Measure how many rows per second `train.py` trains on, and where the time of a training step goes.

    python scripts/benchmark.py training --task digits
    python scripts/benchmark.py training --task fsdd --dataset_name ../shared/data/fsdd
    python scripts/benchmark.py training --dataset_name my_folder --label_column activity --max_steps 500

The options are those of `train.py`, whose code runs here without evaluations and checkpoints, for 200 steps unless
--max_steps is given. The first 20 steps are not counted. To compare two commits, run the command in a checkout of each.
"model" is the forward and backward pass: the engine and autograd. "rest" is transformers' and our Trainer.
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

from hf_skiprnn.commands.summary import LabelWatch
from hf_skiprnn.commands.train import trainer_of
from hf_skiprnn.commands.train_options import given, parse

WARM_UP = 20  # steps that are not counted
QUIET = ("--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false", "--report_to=none")


class Parts(TrainerCallback):
    """Seconds spent in each part of a training after the warm-up, without the parts that run inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.measured: dict[str, float] = {}
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
        self.measured = dict(self.seconds)  # saving the model and the like come after the last step


def measure(options: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Train with the options of `train.py`; return the rows per second, and each part's share of the time."""
    parts = Parts()
    with tempfile.TemporaryDirectory() as folder:
        settings = parse([*options, f"--output_dir={folder}", *QUIET])
        set_seed(settings.args.seed)
        trainer = trainer_of(
            settings, settings.task.load(settings.args.seed), LabelWatch(settings.task.compute_metrics)
        )
        trainer.add_callback(parts)
        trainer.data_collator = parts.timed("collate", trainer.data_collator)
        for owner, name in ((trainer, "compute_loss"), (trainer.accelerator, "backward")):
            setattr(owner, name, parts.timed("model", getattr(owner, name)))
        for fetcher in (_MapDatasetFetcher, _IterableDatasetFetcher):
            setattr(fetcher, "fetch", parts.timed("read rows", fetcher.fetch))  # noqa: B010 - mypy refuses to assign it
        steps = trainer.train().global_step - WARM_UP
    total = sum(parts.measured.values())
    rows = steps * settings.args.train_batch_size * settings.args.gradient_accumulation_steps
    return rows / total, {name: seconds / total for name, seconds in parts.measured.items()}


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if not arguments or "--help" in arguments:
        print(__doc__)
        return
    rate, shares = measure([*arguments, *([] if given([*arguments], "max_steps") else ["--max_steps=200"])])
    parts = ", ".join(f"{name} {shares[name]:.1%}" for name in sorted(shares, key=shares.__getitem__, reverse=True))
    print(f"{rate:.0f} rows/s: {parts}")


if __name__ == "__main__":
    main(sys.argv[1:])
