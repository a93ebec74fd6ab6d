"""SkipRNNTrainer: transformers' Trainer with the budget, logs of updates, and checkpoints that survive a kill."""

import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    default_compute_objective,
    has_length,
)
from transformers.utils import logging

from hf_skiprnn.evaluation.files import write_whole
from hf_skiprnn.evaluation.metrics import multiply_accumulates

from .card import license_of, may_write, training_card
from .checkpoints import (
    delete_older,
    disk_errors_explained,
    mark_complete,
    mark_incomplete,
    resumable_checkpoint,
    steps_of,
)
from .forward_notes import ForwardNotes, depends_on, noted_forwards, skip_rnns
from .gradient_guard import GradientGuard, largest_element
from .rate_controller import RateController
from .window import BatchCounts, EvaluatedRows, TrainingWindow, exact

logger = logging.get_logger(__name__)

WINDOW_FILE = "training_window.json"  # in a checkpoint: the sums since the last log


class SkipRNNTrainer(Trainer):
    """Trainer for Skip RNN classifiers; arguments as transformers.Trainer's.

    - Logs `task_loss`, `budget_loss`, `updates` (mean per row) and `update_rate` (share of the real steps) beside
      `loss`. In training they are means over the steps since the last log; in evaluation, over every row once, with
      the standard deviation and the 20th, 50th and 80th percentile of updates.
    - Adds the budget wherever the loss does not hold it: with `label_smoothing_factor`, with `compute_loss_func`, in a
      subclass that overrides `compute_loss`, and for a model of your own that contains a SkipRNNModel.
    - Stops at a loss that is not finite. An update whose gradient is not finite is left out; an exploded gradient keeps
      its direction through clipping.
    - Marks a checkpoint as complete when all of it is written, and resumes only from complete ones.
    - Raises at the end of training if a push to the Hub failed in the background.
    - Refuses `hub_token` in its arguments, which every checkpoint would store: log in, or set HF_TOKEN.

    Raises:
        ValueError: hub_token is set; a checkpoint to resume from is incomplete, damaged or absent; several processes
            are to evaluate on a stream with dispatch_batches=False.
        FloatingPointError: the training loss is NaN or infinite, or ten gradients in a row were.
        CheckpointError: a checkpoint could not be written, as on a full disk; the last complete one is still there.
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
        # Wrapped, not overridden: a subclass that overrides compute_loss would lose what an override here does.
        wrapped = functools.partial(self._with_budget, self.compute_loss)
        self.compute_loss = wrapped  # type: ignore[method-assign] # so also for callers within Trainer
        self._loss_holds_budget: bool | None = None  # known from the first training batch on
        self._is_warned: set[str] = set()
        self._unchecked: list[Tensor] = []  # [loss, NaN labels] of each micro-batch of this optimizer step
        self._reads: list[Tensor] = []  # [sum of N / L, rows, sum of task losses] of each of its micro-batches
        self._flos_updates = torch.zeros(())  # since the last store_flos
        self._guard = GradientGuard()
        self._window = TrainingWindow()
        self._evaluated = EvaluatedRows()
        self._pushes: list[Future[Any]] = []

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._is_warned:
            self._is_warned.add(key)
            logger.warning(text)

    def _with_budget(
        self,
        compute_loss: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Call `compute_loss`, Trainer's or a subclass's, add the budget if it is missing, and note both for the logs.

        Nothing here waits for the device.
        """
        with noted_forwards(self.accelerator.unwrap_model(model)) as notes:
            loss, out = compute_loss(model, inputs, True, num_items_in_batch)
        if notes.updates:
            loss = self._add_budget(loss, out, notes, model.training, num_items_in_batch)
        else:
            self._warn_once("budget", f"No SkipRNNModel ran in {type(model).__name__}: no budget, no updates to log.")
        return (loss, out) if return_outputs else loss

    def _add_budget(self, loss: Tensor, out: Any, notes: ForwardNotes, training: bool, items: Any) -> Tensor:
        """Return the loss with the budget in it, and note task loss, budget, updates and lengths."""
        own = out if isinstance(out, Mapping) and "task_loss" in out else {}  # one of this package's classifiers
        is_own = bool(own) and loss is own.get("loss")
        if training and self._loss_holds_budget is None:
            found = depends_on(loss, notes.budget_losses[0])
            self._loss_holds_budget = is_own or (own.get("loss") is not None if found is None else found)
        is_held = self._loss_holds_budget
        if is_held is None or is_own:
            is_held = own.get("loss") is not None
        parts = self.current_gradient_accumulation_steps if training else 1
        divisor = parts if training and self._is_divided(items) else 1  # then the budget is divided too
        budget = notes.budget_loss
        task = own["task_loss"].mean() if is_own else loss.mean() * divisor - (budget if is_held else 0.0)
        counts = BatchCounts(task.detach(), budget.detach(), *notes.rows())
        if training:
            self._window.add(counts, 1 / parts)
            self._reads.append(counts.reads())
            updates = counts.updates.sum()
            self._flos_updates = self._flos_updates + updates.to(exact(updates.device))
        else:
            self._evaluated.last = counts
        return loss if is_held else loss + budget / divisor

    def _is_divided(self, num_items_in_batch: Any) -> bool:
        """Whether compute_loss divides by the accumulation steps itself; Trainer.training_step decides it so."""
        stated = getattr(self, "loss_is_scaled_for_ga", None)  # absent from older versions of transformers
        if stated is not None:
            return stated
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As Trainer's; then check loss and gradients, before the optimizer uses them.

        The device is waited for once an optimizer step, in one transfer.
        """
        labels = inputs.get("labels")
        loss = super().training_step(model, inputs, num_items_in_batch)
        broken = torch.zeros_like(loss)
        if isinstance(labels, Tensor) and labels.is_floating_point():
            broken = labels.isnan().sum().to(loss)
        self._unchecked.append(torch.stack([loss, broken]).to(exact(loss.device)))
        if self.accelerator.sync_gradients:
            self._check_step(model)
        return loss

    def _check_step(self, model: nn.Module) -> None:
        """Check the losses of an optimizer step's micro-batches and its gradients."""
        checks = torch.stack(self._unchecked).sum(dim=0)
        reads = torch.stack([torch.zeros(3).to(checks), *(part.to(checks) for part in self._reads)]).sum(dim=0)
        sums = torch.cat([checks, reads])
        self._unchecked.clear()
        self._reads.clear()
        largest = largest_element(model.parameters(), sums.device).to(sums)
        values = torch.cat([sums, largest.view(1)])
        if self.args.world_size > 1:  # all processes stop together; of sharded weights, each sees its shards only
            gathered = self.accelerator.gather(values.view(1, -1))
            values = torch.cat([gathered[:, :-1].sum(dim=0), gathered[:, -1:].amax(dim=0)])
        loss, broken, shares, rows, task, largest_value = values.tolist()
        step = self.state.global_step + 1
        if not math.isfinite(loss):
            reason = "Lower the learning rate, or pass check_inputs=True to the model to see whether the data hold NaN."
            if broken:
                reason = f"{broken:.0f} labels of this step are NaN: fill them, or leave such rows out."
            raise FloatingPointError(f"The loss is {loss} at step {step}. Nothing was updated by it. {reason}")
        if self.accelerator.scaler is None:  # with one, accelerate leaves out updates that are not finite
            self._guard.apply(model.parameters(), step, largest_value)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RateController) and rows:
                callback.observe(self._config, shares / rows, task / rows, step)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0 for a Skip RNN: `store_flos` counts the updates, without a wait at every batch."""
        return 0 if self._config is not None else super().floating_point_ops(inputs)

    def store_flos(self) -> None:
        """As Trainer's; operations are two per multiply-accumulate, and three times that with the backward pass."""
        if self._config is not None:
            updates = float(self._flos_updates)
            self._flos_updates = torch.zeros(())
            self.current_flos += round(6 * multiply_accumulates(self._config, updates))
        super().store_flos()

    @property
    def _config(self) -> Any:
        """The Skip RNN's config, also where a model of the user's own contains it; None without a Skip RNN."""
        found = skip_rnns(self.accelerator.unwrap_model(self.model))
        return found[0].config if found else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to the training logs."""
        if "loss" in logs:  # ours holds all steps since the last log, also if training was resumed between them
            means = self._window.means(self.accelerator)
            if empty := means.pop("empty_rows", 0):
                self._warn_once(
                    "rows",
                    f"{empty:.0f} training rows up to step {self.state.global_step} have no real step (attention_mask "
                    "is 0 everywhere): they are classified from the initial state. Leave such rows out.",
                )
            logs.update(means)
            self._window = TrainingWindow()
        super().log(logs, start_time)

    def hyperparameter_search(
        self,
        hp_space: Any = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As Trainer's. The default objective sums the metrics of `compute_metrics`, without those added here.

        Without `compute_metrics` it is the evaluation loss, which holds the budget.
        """
        return super().hyperparameter_search(hp_space, compute_objective or default_objective, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As Trainer's; notes the losses and updates of every row once."""
        self._evaluated.last = None
        result = super().prediction_step(model, dict(inputs), prediction_loss_only, ignore_keys)
        if (last := self._evaluated.last) is None:  # no labels
            return result
        task, budget, updates, lengths = last
        kept = self._rows_of_their_own(len(lengths))
        if self._some_process_repeats_rows(len(lengths)):
            # Every process takes part, as a forward of sharded weights needs all. One without own rows counts none.
            task, budget, *_ = self._counts_of_first_rows(inputs, max(kept, 1))
        gathered = self.accelerator.gather_for_metrics((updates, lengths))
        self._evaluated.add(task, budget, kept, *gathered)
        return result

    def _rows_of_their_own(self, rows: int) -> int:
        """Count the rows of a batch that are no repetitions: the last batches of several processes are filled up."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - rows * self.accelerator.process_index, 0), rows)

    def _some_process_repeats_rows(self, rows: int) -> bool:
        """Whether a process has a batch of own and repeated rows; the same answer on all processes."""
        state = self.accelerator.gradient_state
        return state.end_of_dataloader and state.remainder > 0 and state.remainder % rows > 0

    def _counts_of_first_rows(self, inputs: dict[str, Any], rows: int) -> BatchCounts:
        """Run the batch's first rows alone, and return what was counted."""
        first = self._prepare_inputs({name: value[:rows] for name, value in inputs.items()})
        items = (first["labels"] != -100).sum()
        if self.args.average_tokens_across_devices:
            items = items * self.accelerator.num_processes  # Trainer multiplies the loss by it
        with torch.no_grad(), self.compute_loss_context_manager():
            model: Any = self.model
            self.compute_loss(model, first, num_items_in_batch=items if self.compute_loss_func else None)
        last: Any = self._evaluated.last
        return last

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's, with the losses and updates of all rows among the metrics."""
        if self.args.world_size > 1 and isinstance(dataloader, DataLoaderShard) and not has_length(dataloader):
            raise ValueError(
                "A stream that every process reads a part of (dispatch_batches=False) does not say which rows at its "
                "end are repetitions. Evaluate on a dataset of known length, or do not set dispatch_batches."
            )
        if has_length(dataloader) and len(dataloader) == 0:
            raise ValueError(f"There are no rows to evaluate on ({description}): the data set is empty.")
        self._evaluated = EvaluatedRows()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = self._evaluated.metrics(self.accelerator, self.args.device)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; `resume_from_checkpoint` (True: the last complete one in output_dir) must be complete."""
        folder = resumable_checkpoint(str(self.args.output_dir), resume_from_checkpoint)
        self._window, self._unchecked, resumed_at = TrainingWindow(), [], None
        if folder is not None:
            if self.is_world_process_zero():
                self._window.load(folder / WINDOW_FILE)
            resumed_at = steps_of(folder)  # read now: training may delete this checkpoint
        outcome = super().train(None if folder is None else str(folder), *args, **kwargs)
        if self.state.global_step == resumed_at:  # nothing was left to train
            self._load_rng_state(str(folder))  # Trainer does so at the first step; evaluations may draw numbers
        self._raise_failed_pushes()
        return outcome

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.create_model_card()
        if self.args.hub_always_push:
            self._finish_current_push()  # it still reads the files that this push writes anew
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = getattr(self.push_in_progress, "jobs", []) if self.is_world_process_zero() else []
        self._pushes += [job for job in jobs if job not in self._pushes]

    def _raise_failed_pushes(self) -> None:
        """Raise for pushes that failed in the background. Trainer does not look, and the user would not know."""
        errors = [error for job in self._pushes if (error := job.exception()) is not None]
        count, self._pushes = len(self._pushes), []
        if errors:
            raise RuntimeError(
                f"Training is done and the model is in {self.args.output_dir}, but {len(errors)} of {count} pushes to "
                f"{self.hub_model_id} failed, the last with: {errors[-1]}. Call trainer.push_to_hub() again, or "
                "publish the folder with scripts/publish.py."
            ) from errors[-1]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from the last checkpoint of a finished run, Trainer would train one step more.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            mark_incomplete(folder)
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
        """As Trainer's.

        Raises:
            CheckpointError: the model could not be written, as on a full disk.
        """
        if _internal_call:  # by _save_checkpoint, or before a push
            return super().save_model(output_dir, _internal_call)
        with disk_errors_explained(Path(output_dir or str(self.args.output_dir)), delete=False):
            return super().save_model(output_dir, _internal_call)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,  # noqa: A002 - Trainer's name for it
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write README.md: what the model is, how to use it, and the last evaluation; anew at every push.

        A README.md of the user's own stays. license: as the Hub names it; without it that of the last card, if any.
        """
        path, config = Path(str(self.args.output_dir), "README.md"), self._config
        if config is None:
            super().create_model_card(language, license, *args, **kwargs)
        elif self.is_world_process_zero() and may_write(path):
            fields = config.to_dict() | {"architectures": [type(self.accelerator.unwrap_model(self.model)).__name__]}
            own: dict[str, Any] = getattr(self.processing_class, "to_dict", dict)()
            location = self.hub_model_id or path.parent.resolve().name
            text = training_card(location, fields, own, self.state, license or license_of(path), language)
            write_whole(path, text)


def default_objective(metrics: dict[str, float]) -> float:
    """Return transformers' default objective of the metrics that the user's `compute_metrics` gave."""
    ours = ("eval_task_loss", "eval_budget_loss", "eval_update", "eval_model_preparation_time")
    return default_compute_objective({k: value for k, value in metrics.items() if not k.startswith(ours)})
