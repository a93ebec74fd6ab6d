"""SkipRNNTrainer: transformers' Trainer with the budget loss, logs of updates, and checkpoints that survive a kill."""

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

from .card import license_fields, may_write, training_card
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
from .window import BatchCounts, EvaluatedRows, Held, TrainingWindow, exact

logger = logging.get_logger(__name__)

WINDOW_FILE = "training_window.json"  # file in a checkpoint that holds the sums since the last log


class SkipRNNTrainer(Trainer):
    """Trainer for Skip RNN classifiers; the arguments are those of transformers.Trainer.

    - Logs `task_loss`, `budget_loss`, `updates` (mean per row) and `update_rate` (share of the real steps) beside
      `loss`. In training they are means over the steps since the last log. In evaluation they are means over all rows,
      and the standard deviation and the 20th, 50th and 80th percentile of updates are logged too.
    - Adds the budget loss if the loss does not contain it: with `label_smoothing_factor`, with `compute_loss_func`, in
      a subclass that overrides `compute_loss`, and for your own model that contains a SkipRNNModel.
    - Stops at a loss that is not finite. Skips an update whose gradient is not finite. Scales an exploded gradient down
      before it is clipped, so that it keeps its direction.
    - Marks a checkpoint as complete after all its files are written, and resumes only from complete ones.
    - Raises at the end of training if a push to the Hub failed in the background.
    - Refuses `hub_token` in its arguments, because every checkpoint would store it: log in, or set HF_TOKEN.

    Raises:
        ValueError: hub_token is set; the checkpoint to resume from is incomplete, damaged or absent; or several
            processes evaluate on a stream with dispatch_batches=False.
        FloatingPointError: the training loss, or the gradient in ten steps in a row, was NaN or infinite.
        CheckpointError: a checkpoint could not be written, for example because the disk is full. The last complete one
            is kept.
        RuntimeError: a push in the background failed; the trained model is in output_dir.
    """

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any) -> None:
        if args is not None and args.hub_token is not None:
            raise ValueError(
                "hub_token must not be in TrainingArguments: it would be stored in plain text in training_args.bin of "
                "every checkpoint, and pushed with it. Run `hf auth login` or set HF_TOKEN instead."
            )
        super().__init__(model, args, *rest, **kwargs)
        self.args.logging_nan_inf_filter = False  # training_step stops instead
        # compute_loss is wrapped, not overridden: a subclass that overrides it would replace an override here.
        wrapped = functools.partial(self._with_budget, self.compute_loss)
        self.compute_loss = wrapped  # type: ignore[method-assign]  # Trainer's own calls use it too
        self._searched: Any = None  # the model in which _skip_rnn was found
        self._skip_rnn: Any = None
        self._loss_holds_budget: bool | None = None  # found out in the first training batch
        self._is_warned: set[str] = set()
        self._unchecked: list[Tensor] = []  # [loss, NaN labels] of each micro-batch of this optimizer step
        self._reads: list[Tensor] = []  # BatchCounts.reads() of each micro-batch of this step
        self._flos_updates = torch.zeros(())  # number of updates since the last store_flos
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
        """Call `compute_loss` of Trainer or a subclass, add the budget loss if it is missing, and store both for logs.

        Nothing here waits for the device.
        """
        again = None if model.training or self._loss_holds_budget is not None else dict(inputs)
        with noted_forwards(model) as notes:
            loss, out = compute_loss(model, inputs, True, num_items_in_batch)
        if again is not None and notes.updates and not is_own_loss(loss, out):
            self._find_budget(compute_loss, model, again, num_items_in_batch)
        if notes.updates:
            loss = self._add_budget(loss, out, notes, model.training, num_items_in_batch)
        else:
            self._warn_once("budget", f"No SkipRNNModel ran in {type(model).__name__}: no budget, no updates to log.")
        return (loss, out) if return_outputs else loss

    def _find_budget(self, compute_loss: Callable[..., Any], model: Any, inputs: dict[str, Any], items: Any) -> None:
        """Find out whether the loss holds the budget, from an evaluation batch before any training batch."""
        bare = self.accelerator.unwrap_model(model)  # DDP would wait for a backward pass
        with torch.enable_grad(), noted_forwards(bare) as notes:
            loss = compute_loss(bare, inputs, True, items)[0]
        if notes.budget_losses:
            self._loss_holds_budget = depends_on(loss, notes.budget_losses[0])

    def _add_budget(self, loss: Tensor, out: Any, notes: ForwardNotes, training: bool, items: Any) -> Tensor:
        """Return the loss including the budget loss; store both, the updates and the lengths for the logs."""
        own = out if isinstance(out, Mapping) and "task_loss" in out else {}  # the output of our classifiers
        is_own = is_own_loss(loss, out)
        if training and self._loss_holds_budget is None:
            found = depends_on(loss, notes.budget_losses[0])
            self._loss_holds_budget = is_own or (own.get("loss") is not None if found is None else found)
        is_held = self._loss_holds_budget
        if is_held is None or is_own:
            is_held = own.get("loss") is not None
        parts = self.current_gradient_accumulation_steps if training else 1
        divisor = parts if training and self._is_divided(items) else 1  # divide the budget loss like the task loss
        budget = notes.budget_loss
        task = own["task_loss"].mean() if is_own else loss.mean() * divisor - (budget if is_held else 0.0)
        counts = BatchCounts(task.detach(), budget.detach(), *notes.rows())
        if training:
            self._window.add(counts, 1 / parts)
            self._reads.append(counts.reads(self._config.budget_target))
            updates = counts.updates.sum()
            self._flos_updates = self._flos_updates + updates.to(exact(updates.device))
        else:
            self._evaluated.last = counts
        return loss if is_held else loss + budget / divisor

    def _is_divided(self, num_items_in_batch: Any) -> bool:
        """Whether compute_loss itself divides by the accumulation steps, by the rule of Trainer.training_step."""
        stated = getattr(self, "loss_is_scaled_for_ga", None)  # older versions of transformers do not have it
        if stated is not None:
            return stated
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run Trainer's training step, then check loss and gradients before the optimizer uses them.

        This waits for the device once in each optimizer step, with a single transfer.
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
        reads = torch.stack([torch.zeros(6).to(checks), *(part.to(checks) for part in self._reads)]).sum(dim=0)
        sums = torch.cat([checks, reads])
        self._unchecked.clear()
        self._reads.clear()
        largest = largest_element(model.parameters(), sums.device).to(sums)
        values = torch.cat([sums, largest.view(1)])
        if self.args.world_size > 1:  # all processes must stop together; with sharded weights each sees only its shards
            gathered = self.accelerator.gather(values.view(1, -1))
            values = torch.cat([gathered[:, :-1].sum(dim=0), gathered[:, -1:].amax(dim=0)])
        loss, broken, *held, largest_value = values.tolist()
        step = self.state.global_step + 1
        if not math.isfinite(loss):
            reason = "Lower the learning rate, or pass check_inputs=True to the model to see whether the data hold NaN."
            if broken:
                reason = f"{broken:.0f} labels of this step are NaN: fill them, or leave such rows out."
            raise FloatingPointError(f"The loss is {loss} at step {step}. No weights were changed by it. {reason}")
        if self.accelerator.scaler is None:  # a gradient scaler already skips updates that are not finite
            self._guard.apply(model.parameters(), step, largest_value)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RateController) and held[1]:
                callback.observe(
                    self._config, Held.of(held), step, largest_value if self.accelerator.scaler is None else 0.0
                )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0 for a Skip RNN; `store_flos` counts its updates, without waiting for the device at every batch."""
        return 0 if self._config is not None else super().floating_point_ops(inputs)

    def store_flos(self) -> None:
        """Add the operations of the updates: two per multiply-accumulate, times three with the backward pass."""
        if self._config is not None:
            updates = float(self._flos_updates)
            self._flos_updates = torch.zeros(())
            self.current_flos += round(6 * multiply_accumulates(self._config, updates))
        super().store_flos()

    @property
    def _config(self) -> Any:
        """The config of the Skip RNN, which may be a part of the user's model; None without a Skip RNN."""
        model: Any = self.model  # perhaps in a wrapper; accelerate's unwrap_model takes a millisecond
        if self._searched is not model:
            found = skip_rnns(model)
            self._searched, self._skip_rnn = model, found[0] if found else None
        return None if self._skip_rnn is None else self._skip_rnn.config

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to the training logs."""
        if "loss" in logs:  # our loss covers all steps since the last log, even if training was resumed in between
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
        """Run Trainer's search. The default objective sums the metrics of `compute_metrics`, without those added here.

        Without `compute_metrics` the objective is the evaluation loss, which includes the budget loss.
        """
        return super().hyperparameter_search(hp_space, compute_objective or default_objective, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Run Trainer's prediction step, and store the losses and updates of every row once."""
        self._evaluated.last = None
        result = super().prediction_step(model, dict(inputs), prediction_loss_only, ignore_keys)
        if (last := self._evaluated.last) is None:  # no labels
            return result
        task, budget, updates, lengths, _ = last  # the gate has no noise in evaluation
        kept = self._rows_of_their_own(len(lengths))
        if self._some_process_repeats_rows(len(lengths)):
            # Every process takes part: a forward pass of sharded weights needs all. Some have no own rows, and count 0.
            task, budget, *_ = self._counts_of_first_rows(inputs, max(kept, 1))
        gathered = self.accelerator.gather_for_metrics((updates, lengths))
        self._evaluated.add(task, budget, kept, *gathered)
        return result

    def _rows_of_their_own(self, rows: int) -> int:
        """Count the rows of a batch without the repeated rows that fill up the last batches of several processes."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - rows * self.accelerator.process_index, 0), rows)

    def _some_process_repeats_rows(self, rows: int) -> bool:
        """Whether the batch of any process mixes own and repeated rows; all processes get the same answer."""
        state = self.accelerator.gradient_state
        return state.end_of_dataloader and state.remainder > 0 and state.remainder % rows > 0

    def _counts_of_first_rows(self, inputs: dict[str, Any], rows: int) -> BatchCounts:
        """Run only the first rows of a batch, and return their losses and updates."""
        first = self._prepare_inputs({name: value[:rows] for name, value in inputs.items()})
        items = (first["labels"] != -100).sum()
        if self.args.average_tokens_across_devices:
            items = items * self.accelerator.num_processes  # Trainer multiplies the loss by this number
        with torch.no_grad(), self.compute_loss_context_manager():
            model: Any = self.model
            self.compute_loss(model, first, num_items_in_batch=items if self.compute_loss_func else None)
        last: Any = self._evaluated.last
        return last

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return Trainer's loader, and always of the rows that are asked for.

        With persistent workers, Trainer keeps the loader of `eval_dataset` and returns it for other data sets too.
        """
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        kept = self.__dict__.pop("_eval_dataloaders", None)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.__dict__.pop("_eval_dataloaders", None)
            if kept is not None:
                self._eval_dataloaders = kept

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run Trainer's evaluation, and add the losses and updates of all rows to the metrics."""
        if self.args.world_size > 1 and isinstance(dataloader, DataLoaderShard) and not has_length(dataloader):
            raise ValueError(
                "With dispatch_batches=False, a stream does not tell which rows at its end are repetitions. Evaluate "
                "on a dataset of known length, or do not set dispatch_batches."
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
        """Train; `resume_from_checkpoint` (True: the last complete one in output_dir) must be complete."""
        folder = resumable_checkpoint(str(self.args.output_dir), resume_from_checkpoint)
        self._window, self._unchecked, self._reads, resumed_at = TrainingWindow(), [], [], None
        self._searched = None  # the user may have changed the model
        self._forget_calibration()
        if folder is not None:
            if self.is_world_process_zero():
                self._window.load(folder / WINDOW_FILE)
            resumed_at = steps_of(folder)  # read before training, which may delete this checkpoint
        outcome = super().train(None if folder is None else str(folder), *args, **kwargs)
        if self.state.global_step == resumed_at:  # nothing was left to train
            self._load_rng_state(str(folder))  # Trainer does it at the first step; evaluations may use random numbers
        self._raise_failed_pushes()
        return outcome

    def _forget_calibration(self) -> None:
        """Remove the calibration of a Skip RNN that will change: its table would not hold any more."""
        for found in skip_rnns(self.model) if self.model is not None else ():  # model_init makes it later
            if found.config.gate_calibration and any(part.requires_grad for part in found.parameters()):
                found.config.gate_calibration = None
                self._warn_once(
                    "calibration",
                    "The model's calibration is removed, because training changes which shares it reads. For "
                    "update_rate=, call hf_skiprnn.training.calibrate after training.",
                )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.create_model_card()
        if self.args.hub_always_push:
            self._finish_current_push()  # it still reads the files that this push overwrites
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = getattr(self.push_in_progress, "jobs", []) if self.is_world_process_zero() else []
        self._pushes += [job for job in jobs if job not in self._pushes]

    def _raise_failed_pushes(self) -> None:
        """Raise an error if pushes failed in the background; Trainer does not check them."""
        errors = [error for job in self._pushes if (error := job.exception()) is not None]
        count, self._pushes = len(self._pushes), []
        if errors:
            raise RuntimeError(
                f"Training is done and the model is in {self.args.output_dir}, but {len(errors)} of {count} pushes to "
                f"{self.hub_model_id} failed, the last with: {errors[-1]}. Call trainer.push_to_hub() again, or "
                "publish the folder with `hf-skiprnn publish`."
            ) from errors[-1]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # If training resumed from the last checkpoint of a finished run, Trainer would train one more step.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            mark_incomplete(folder)
        # Older checkpoints are kept until this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with disk_errors_explained(folder, delete=True):
                super()._save_checkpoint(model, trial)
                self._window.save(folder / WINDOW_FILE, self.accelerator, self.args.should_save)
                self.accelerator.wait_for_everyone()  # every process writes its own file
                if self.args.should_save:
                    mark_complete(folder)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            delete_older(folder, limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Trainer does.

        Raises:
            CheckpointError: the model could not be written, for example because the disk is full.
        """
        if _internal_call:  # called by _save_checkpoint or before a push
            return super().save_model(output_dir, _internal_call)
        with disk_errors_explained(Path(output_dir or str(self.args.output_dir)), delete=False):
            return super().save_model(output_dir, _internal_call)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,  # noqa: A002 - the name in Trainer
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write README.md at every push: what the model is, how to use it, and the last evaluation.

        The user's own README.md is not overwritten. license: as the Hub names it; default: that of the previous card.
        """
        path, config = Path(str(self.args.output_dir), "README.md"), self._config
        if config is None:
            super().create_model_card(language, license, *args, **kwargs)
        elif self.is_world_process_zero() and may_write(path):
            fields = config.to_dict() | {"architectures": [type(self.accelerator.unwrap_model(self.model)).__name__]}
            own: dict[str, Any] = getattr(self.processing_class, "to_dict", dict)()
            location = self.hub_model_id or path.parent.resolve().name
            text = training_card(location, fields, own, self.state, license_fields(path, license), language)
            write_whole(path, text)


def is_own_loss(loss: Tensor, out: Any) -> bool:
    """Return whether a loss is the one that our classifiers compute."""
    return isinstance(out, Mapping) and "task_loss" in out and loss is out.get("loss")


def default_objective(metrics: dict[str, float]) -> float:
    """Return transformers' default objective, computed only from the metrics of the user's `compute_metrics`."""
    ours = ("eval_task_loss", "eval_budget_loss", "eval_update", "eval_model_preparation_time")
    return default_compute_objective({k: value for k, value in metrics.items() if not k.startswith(ours)})
