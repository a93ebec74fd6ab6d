"""SkipRNNTrainer: transformers' Trainer with what a Skip RNN adds: the budget, the updates, and safe resumption."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from huggingface_hub import ModelCardData
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, has_length

from hf_skiprnn.evaluation.metrics import multiply_accumulates, real_lengths, update_statistics

from .checkpoints import (
    COMPLETE,
    delete_older,
    disk_errors_explained,
    last_complete_checkpoint,
    mark_complete,
)
from .gradient_guard import GradientGuard, largest_element

WINDOW_FILE = "training_window.json"  # in a checkpoint: what was summed since the last log


class SkipRNNTrainer(Trainer):
    """Trainer for Skip RNN classifiers; arguments as transformers.Trainer's.

    - Logs `task_loss`, `budget_loss`, `updates` (mean per row) and `update_rate` (share of real steps) beside `loss`:
      in training over the logging window, all processes and all micro-batches; in evaluation (with the deviation and
      the 20th, 50th and 80th percentile of updates) over every row once, however they are split into batches.
    - Adds the budget where `label_smoothing_factor` or `compute_loss_func` keep the labels from the model.
    - Stops at a loss that is not finite, instead of hiding it from the log; an update whose gradient is not finite is
      left out, and one that has exploded keeps its direction through clipping.
    - Marks a checkpoint as complete when all of it is written, and resumes only from complete ones.
    - Raises at the end of training if a push to the Hub failed in the background.
    - Refuses `hub_token` in its arguments, which every checkpoint stores: log in, or set HF_TOKEN.

    Raises:
        ValueError: hub_token is set; a checkpoint to resume from is incomplete or absent; several processes are to
            evaluate on a stream with dispatch_batches=False.
        FloatingPointError: the training loss is NaN or infinite, or ten gradients in succession were.
        CheckpointError: a checkpoint could not be written, as on a full disk; the last complete one stands.
        RuntimeError: a push in the background failed; the model is trained and in output_dir.
    """

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any) -> None:
        if args is not None and args.hub_token is not None:
            raise ValueError(
                "hub_token must not be in TrainingArguments: it would be stored in plain text in training_args.bin of "
                "every checkpoint, and pushed with it. Run `hf auth login` or set HF_TOKEN instead."
            )
        super().__init__(model, args, *rest, **kwargs)
        self.args.logging_nan_inf_filter = False  # training_step stops instead
        self._guard = GradientGuard()
        self._window = TrainingWindow()
        self._evaluated = EvaluatedRows()
        self._pushes: list[Future[Any]] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Task loss plus budget; arguments and result as Trainer.compute_loss."""
        labels_kept_back = self.label_smoother is not None or self.compute_loss_func is not None
        lengths = real_lengths(inputs)
        loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
        budget = out["budget_loss"].mean()  # one value per device under DataParallel
        task = loss if labels_kept_back else out["task_loss"].mean()
        # Trainer takes what a compute_loss_func returns as already divided by the accumulation steps.
        parts = self.current_gradient_accumulation_steps if model.training else 1
        summed = model.training and self.compute_loss_func is not None
        if labels_kept_back:
            loss = task + (budget / parts if summed else budget)
        rows = (out["num_updates"].detach(), lengths)
        if model.training:
            self._window.add(task.detach() * (parts if summed else 1), budget.detach(), *rows, 1 / parts)
        else:
            self._evaluated.last = (task.detach(), budget.detach(), *rows)
        return (loss, out) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass; a broken loss or gradient does not reach the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. Nothing was updated by it. Lower the "
                "learning rate, or pass check_inputs=True to the model to see whether the data hold NaN."
            )
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:  # a scaler drops infinite ones itself
            self._check_gradients(model)
        return loss

    def _check_gradients(self, model: nn.Module) -> None:
        largest = largest_element(model.parameters(), self.args.device)
        if self.args.world_size > 1:  # where weights are sharded, a process holds its shards only
            largest = self.accelerator.gather(largest.view(1)).max()
        self._guard.apply(model.parameters(), self.state.global_step + 1, largest.item())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of the last batch: two per multiply-accumulate of its updates, thrice for forward and backward."""
        return round(6 * multiply_accumulates(self._config, self._window.last_updates))

    @property
    def _config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's means to the training logs."""
        if "loss" in logs:  # ours holds the whole window, also where training was resumed in the middle of it
            logs.update(self._window.means(self.accelerator))
            self._window = TrainingWindow()
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Trainer's, with a note of the losses and updates of every row that is not there twice."""
        self._evaluated.last = None
        result = super().prediction_step(model, dict(inputs), prediction_loss_only, ignore_keys)
        if (last := self._evaluated.last) is None:  # no labels
            return result
        task, budget, updates, lengths = last
        kept = self._rows_of_their_own(len(lengths))
        if self._some_process_repeats_rows(len(lengths)):
            # All join in: where weights are sharded, a forward needs every process. One without rows counts none of it.
            task, budget = self._loss_of_first_rows(inputs, max(kept, 1))
        gathered = self.accelerator.gather_for_metrics((updates, lengths))
        self._evaluated.add(task, budget, kept, *gathered)
        return result

    def _rows_of_their_own(self, rows: int) -> int:
        """How many of a batch's rows are not repetitions that fill up the last batch of several processes."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - rows * self.accelerator.process_index, 0), rows)

    def _some_process_repeats_rows(self, rows: int) -> bool:
        """Whether any process has a batch of both; the same answer on all of them."""
        state = self.accelerator.gradient_state
        return state.end_of_dataloader and state.remainder > 0 and state.remainder % rows > 0

    def _loss_of_first_rows(self, inputs: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
        """Task loss and budget of the batch's first rows alone."""
        first = self._prepare_inputs({name: value[:rows] for name, value in inputs.items()})
        items = (first["labels"] != -100).sum()
        if self.args.average_tokens_across_devices:
            items = items * self.accelerator.num_processes  # Trainer multiplies the loss by it
        with torch.no_grad(), self.compute_loss_context_manager():
            model: Any = self.model
            self.compute_loss(model, first, num_items_in_batch=items if self.compute_loss_func else None)
        last: Any = self._evaluated.last
        return last[0], last[1]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, with the losses and updates of all rows among its metrics."""
        if self.args.world_size > 1 and isinstance(dataloader, DataLoaderShard) and not has_length(dataloader):
            raise ValueError(
                "A stream that every process reads a part of (dispatch_batches=False) does not say which rows at its "
                "end are there twice. Evaluate on a dataset of known length, or leave dispatch_batches alone."
            )
        self._evaluated = EvaluatedRows()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = self._evaluated.metrics(self.accelerator, self.args.device)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; `resume_from_checkpoint` (True: the last in output_dir) must be complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
        elif resume_from_checkpoint and not (Path(resume_from_checkpoint) / COMPLETE).is_file():
            raise ValueError(
                f"{resume_from_checkpoint} holds no file named {COMPLETE!r}: it was cut off while being written, or "
                "another trainer wrote it. Resume from an earlier one, or add that file if you know that all is there."
            )
        self._window = TrainingWindow()
        if resume_from_checkpoint and self.is_world_process_zero():
            self._window.load(Path(resume_from_checkpoint, WINDOW_FILE))
        resumed_at = None
        if resume_from_checkpoint and (path := Path(resume_from_checkpoint, TRAINER_STATE_NAME)).is_file():
            resumed_at = json.loads(path.read_text(encoding="utf-8"))["global_step"]  # now: older ones get deleted
        outcome = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.state.global_step == resumed_at:  # nothing was left to train
            self._load_rng_state(str(resume_from_checkpoint))  # Trainer does at the first step; evaluations may draw
        self._raise_failed_pushes()
        return outcome

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_always_push:
            self._finish_current_push()  # it reads the files that are written next
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = getattr(self.push_in_progress, "jobs", []) if self.is_world_process_zero() else []
        self._pushes += [job for job in jobs if job not in self._pushes]

    def _raise_failed_pushes(self) -> None:
        """Trainer forgets what went wrong in the background, and training would end as if all were on the Hub."""
        errors = [error for job in self._pushes if (error := job.exception()) is not None]
        count, self._pushes = len(self._pushes), []
        if errors:
            raise RuntimeError(
                f"Training is done and the model is in {self.args.output_dir}, but {len(errors)} of {count} pushes to "
                f"{self.hub_model_id} failed, the last with: {errors[-1]}. Call trainer.push_to_hub() again, or "
                "publish the folder with scripts/publish.py."
            ) from errors[-1]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from the last checkpoint of a run that was over, Trainer would train one step more.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)
        # Older checkpoints stay until this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with disk_errors_explained(folder, delete=True):
                super()._save_checkpoint(model, trial)
                self._window.save(folder / WINDOW_FILE, self.accelerator, self.args.should_save)
                self.accelerator.wait_for_everyone()  # every process writes a file of its own
                if self.args.should_save:
                    mark_complete(folder)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            delete_older(folder, limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer; raises CheckpointError where the disk is full."""
        if _internal_call:  # by _save_checkpoint, or before a push
            return super().save_model(output_dir, _internal_call)
        with disk_errors_explained(Path(output_dir or str(self.args.output_dir)), delete=False):
            return super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md with what is known here, unless there is one. Trainer's would name a base model."""
        path = Path(str(self.args.output_dir), "README.md")
        if self.is_world_process_zero() and not path.exists():
            card = draft_card(path.parent.resolve().name, self._config, self.state, self.args.seed)
            path.write_text(card, encoding="utf-8")


def draft_card(name: str, config: Any, state: TrainerState, seed: int) -> str:
    """README.md of a run: what was trained and what its last evaluation said."""
    metadata = ModelCardData(library_name="transformers", tags=["skip-rnn", config.cell_type]).to_yaml()
    text = (
        f"---\n{metadata}\n---\n\n# {name}\n\n"
        f"A Skip RNN, trained from scratch for {state.global_step} steps with seed {seed}: {config.cell_type.upper()}, "
        f"{config.num_hidden_layers} x {config.hidden_size} units, {config.gate} gate, "
        f"budget weight {config.budget_weight}.\n"
    )
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    if not evaluations:
        return text
    rows = [f"| {name} | {value:.6g} |\n" for name, value in evaluations[-1].items() if name.startswith("eval_")]
    return text + "\nLast evaluation:\n\n| metric | value |\n|---|---|\n" + "".join(rows)


class TrainingWindow:
    """Sums over the micro-batches since the last log, kept on the device."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # task loss, budget loss, weight; updates, real steps, rows
        self.last_updates = 0.0

    def add(self, task: Tensor, budget: Tensor, updates: Tensor, lengths: Tensor, weight: float) -> None:
        """Losses of a micro-batch, weighed by its share of an optimizer step; updates and real steps of its rows."""
        exact = torch.float32 if updates.device.type == "mps" else torch.float64
        rows = [updates.sum(), lengths.sum(), torch.tensor(len(lengths), device=updates.device)]
        losses = [task * weight, budget * weight, torch.tensor(weight, device=updates.device)]
        sums = torch.stack([part.to(exact) for part in (*losses, *rows)])
        self.sums = sums if self.sums is None else self.sums.to(sums) + sums
        self.last_updates = float(rows[0])

    def save(self, path: Path, accelerator: Any, should_save: bool) -> None:
        """Keep the sums of all processes with a checkpoint, so that what is steered by them goes on from there."""
        sums = None if self.sums is None else accelerator.reduce(self.sums, "sum").tolist()
        if should_save:
            path.write_text(json.dumps({"sums": sums}), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Go on with what `save` kept; on one process, as the sums are of all."""
        if path.is_file() and (sums := json.loads(path.read_text(encoding="utf-8"))["sums"]) is not None:
            self.sums = torch.tensor(sums, dtype=torch.float64)

    def means(self, accelerator: Any) -> dict[str, float]:
        """Over all processes; empty where nothing was added."""
        if self.sums is None:
            return {}
        task, budget, weight, updates, steps, rows = accelerator.reduce(self.sums, "sum").tolist()
        return {
            "loss": (task + budget) / weight,
            "task_loss": task / weight,
            "budget_loss": budget / weight,
            "updates": updates / rows,
            "update_rate": updates / max(steps, 1.0),
        }


class EvaluatedRows:
    """Losses and updates of an evaluation, every row once."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # task, budget, updates [B], lengths [B]
        self.sums = np.zeros(3)  # task loss, budget loss, rows: of this process
        self.updates: list[np.ndarray] = []  # of all processes
        self.lengths: list[np.ndarray] = []

    def add(self, task: Tensor, budget: Tensor, rows: int, updates: Tensor, lengths: Tensor) -> None:
        if rows:
            self.sums += rows * np.array([task.item(), budget.item(), 1.0])
        self.updates.append(updates.float().cpu().numpy())
        self.lengths.append(lengths.cpu().numpy())

    def metrics(self, accelerator: Any, device: torch.device) -> dict[str, float]:
        """Over all processes; empty where no batch had labels."""
        if not self.updates:
            return {}
        exact = torch.float32 if device.type == "mps" else torch.float64
        sums = accelerator.reduce(torch.tensor(self.sums, dtype=exact, device=device), "sum").tolist()
        task, budget = sums[0] / sums[2], sums[1] / sums[2]
        statistics = update_statistics(np.concatenate(self.updates), np.concatenate(self.lengths))
        return {"loss": task + budget, "task_loss": task, "budget_loss": budget, **statistics}
