"""Sum losses and updates over the training steps since the last log, and over the rows of an evaluation.

The sums are tensors on the device. Only a log, a checkpoint and the end of an evaluation wait for the device.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_skiprnn.evaluation.files import write_whole
from hf_skiprnn.evaluation.metrics import update_statistics
from hf_skiprnn.model.losses_skip_rnn import noisy_rates


class BatchCounts(NamedTuple):
    """The losses (scalars), updates and lengths of one micro-batch."""

    task_loss: Tensor
    budget_loss: Tensor
    updates: Tensor  # [B], updates of each row
    lengths: Tensor  # [B], real steps of each row
    noise: Tensor | None = None  # [B], the noise of each row's gate in training

    def reads(self, target: float | None) -> Tensor:
        """Return what RateController holds, summed over rows.

        Args:
            target: `config.budget_target`.

        Returns:
            [6]: updates, real steps, task loss, rows, error, error times noise. The error of a row is that of its
            share's logit, halved; its share shall be `noisy_rates`.
        """
        device, rows = self.updates.device, len(self.lengths)
        noise = torch.zeros_like(self.updates) if self.noise is None else self.noise.to(self.updates)
        rates = noisy_rates(min(max(target or 0.5, 1e-6), 1 - 1e-6), noise)
        errors = (self.updates / self.lengths.clamp(min=1) - rates) / (2 * rates * (1 - rates))
        sums = (self.updates, self.lengths, self.task_loss * rows, torch.tensor(rows), errors, errors * noise)
        return torch.stack([part.sum().to(device, exact(device)) for part in sums])


class Held(NamedTuple):
    """What RateController holds: means over the rows of an optimizer step in all processes."""

    share: float  # updates over real steps
    task_loss: float
    error: float  # of the logit of a row's share, halved
    error_noise: float  # the same times the row's noise
    updates: float  # of a row

    @classmethod
    def of(cls, sums: Sequence[float]) -> "Held":
        """Return the means from sums of `BatchCounts.reads`."""
        updates, steps, task, rows, error, error_noise = sums
        return cls(updates / steps, task / rows, error / rows, error_noise / rows, updates / rows)


def exact(device: torch.device) -> torch.dtype:
    """Return the most precise float type of a device: float64, but float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


class TrainingWindow:
    """The sums over the micro-batches since the last log."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [5]: task loss, budget loss, updates, real steps, empty rows
        self.weight = 0.0  # number of optimizer steps
        self.rows = 0.0

    def add(self, counts: BatchCounts, weight: float) -> None:
        """Add a micro-batch; `weight` is its share of an optimizer step: 1 / accumulation steps."""
        task, budget, updates, lengths, _ = counts
        parts = (task * weight, budget * weight, updates.sum(), lengths.sum(), (lengths == 0).sum())
        sums = torch.stack([part.to(updates.device, exact(updates.device)) for part in parts])
        self.sums = sums if self.sums is None else self.sums.to(sums) + sums
        self.weight += weight
        self.rows += len(lengths)

    def _reduced(self, accelerator: Any) -> list[float]:
        """Return the sums over all processes: task loss, budget loss, updates, steps, empty rows, weight, rows."""
        assert self.sums is not None
        known = torch.tensor([self.weight, self.rows], dtype=self.sums.dtype, device=self.sums.device)
        return accelerator.reduce(torch.cat([self.sums, known]), "sum").tolist()

    def means(self, accelerator: Any) -> dict[str, float]:
        """Return the means over all processes and the number `empty_rows`; {} if no micro-batch was added."""
        if self.sums is None:
            return {}
        task, budget, updates, steps, empty, weight, rows = self._reduced(accelerator)
        return {
            "loss": (task + budget) / weight,
            "task_loss": task / weight,
            "budget_loss": budget / weight,
            "updates": updates / rows,
            "update_rate": updates / max(steps, 1.0),
            "empty_rows": empty,
        }

    def save(self, path: Path, accelerator: Any, should_save: bool) -> None:
        """Write the sums of all processes into a checkpoint, so that a resumed run logs the same numbers."""
        sums = None if self.sums is None else self._reduced(accelerator)
        if should_save:
            write_whole(path, json.dumps({"sums": sums}))

    def load(self, path: Path) -> None:
        """Load the sums that `save` wrote, if the file exists. Only one process loads them, as they are sums over all.

        Raises:
            ValueError: the file is damaged; the message names it.
        """
        if not path.is_file():
            return
        try:
            sums = json.loads(path.read_text(encoding="utf-8"))["sums"]
            if sums is None:
                return
            numbers = [float(number) for number in sums]
            if len(numbers) == 6:  # an older release wrote no empty rows, and the weight in the third place
                task, budget, weight, updates, steps, rows = numbers
                numbers = [task, budget, updates, steps, 0.0, weight, rows]
            if len(numbers) != 7 or not all(map(math.isfinite, numbers)) or min(numbers[2:]) < 0:
                raise ValueError(f"7 finite numbers were expected; got {sums}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}). Resume from an earlier checkpoint, or delete "
                "this file: then the next training log covers only the steps after it."
            ) from error
        *sums, self.weight, self.rows = numbers
        self.sums = torch.tensor(sums, dtype=torch.float64)


class EvaluatedRows:
    """Sums of the losses and updates of an evaluation; every row counts once."""

    def __init__(self) -> None:
        self.last: BatchCounts | None = None  # the batch that was evaluated last
        self.losses: list[Tensor] = []  # [3] for each batch of this process: task loss * rows, budget loss * rows, rows
        self.updates: list[Tensor] = []  # [B] for each batch, rows of all processes
        self.lengths: list[Tensor] = []

    def add(self, task: Tensor, budget: Tensor, rows: int, updates: Tensor, lengths: Tensor) -> None:
        """Add a batch.

        Args:
            task: mean task loss of this process's `rows` rows; ignored if rows is 0.
            budget: mean budget loss of these rows.
            rows: number of this process's rows, without repetitions.
            updates: [B], updates of the rows of all processes.
            lengths: [B], real steps of the rows of all processes.
        """
        if rows:
            losses = torch.stack([task, budget, task.new_ones(())]).to(exact(task.device))
            self.losses.append(rows * losses)
        self.updates.append(updates.float())
        self.lengths.append(lengths)

    def metrics(self, accelerator: Any, device: torch.device) -> dict[str, float]:
        """Return the means over all processes; {} if no batch had labels."""
        if not self.updates:
            return {}
        none = torch.zeros(3, dtype=exact(device), device=device)
        sums = torch.stack([none, *(losses.to(none) for losses in self.losses)]).sum(dim=0)
        task, budget, rows = accelerator.reduce(sums, "sum").tolist()
        columns = [torch.cat(parts).cpu().numpy().astype(np.float64) for parts in (self.updates, self.lengths)]
        task, budget = task / rows, budget / rows
        return {"loss": task + budget, "task_loss": task, "budget_loss": budget, **update_statistics(*columns)}
