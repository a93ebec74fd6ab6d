"""Callbacks of SkipRNNTrainer: change the budget weight lambda during training, and stop early.

Without a callback, lambda is constant: the config's `budget_weight`. `budget_loss="l1"` or `"l2"` with `budget_target`
(both from section 3.3 of the paper) put a target into the loss itself. The callbacks change
`model.config.budget_weight` during training:

    SkipRNNTrainer(model, args, ..., callbacks=[BudgetController(0.4)])  # read 40 % of the steps
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

logger = logging.get_logger(__name__)

SMALLEST, LARGEST = 1e-8, 1.0  # limits of lambda in BudgetController
START = 1e-5  # initial lambda in BudgetController if the config's is 0
# At every log, BudgetController changes log(lambda) by PROPORTIONAL * (change of the error) + INTEGRAL * error. With 1
# and 0.3 instead, the update rate oscillates; on the task digits the gate then closed for good.
PROPORTIONAL, INTEGRAL = 3.0, 0.1
DESCENT = 0.5  # share of training during which the wanted rate falls from the first logged rate to the target
TOLERANCE = 0.05  # largest difference between the final update rate and the target, as a share of the steps
SLACK = 0.01  # StopWhenSettled counts an update rate as lower only if it is lower by more than this


@dataclass
class BudgetArguments:
    """Options that change lambda during training."""

    budget_warmup_steps: float = field(
        default=0.0,
        metadata={"help": "Let lambda grow linearly from 0 over so many steps; a number below 1: share of all steps."},
    )
    target_update_rate: float | None = field(
        default=None,
        metadata={
            "help": "Train the gate to read this share of the steps, for example 0.2. RateController then sets the "
            "gate's initial bias, its budget and its noise. After training the gate is calibrated on validation rows."
        },
    )
    dial: list[float] | None = field(
        default=None,
        metadata={
            "nargs": 2,
            "help": "Train one model for all shares of the steps between these two, for example 0.05 0.9: "
            "model(..., update_rate=0.1) then reads a tenth. A call without update_rate reads target_update_rate; its "
            "default is the recipe's share, or the geometric mean of the two if that share is outside them. The "
            "training takes twice the epochs or steps of our recipes, unless you choose their number.",
        },
    )
    steered_update_rate: float | None = field(
        default=None,
        metadata={
            "help": "Change lambda of budget_loss='cost' at every log until this share of the steps is read "
            "(BudgetController). This is how version 0.1.0 did it; for new work, use target_update_rate."
        },
    )

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks for these options.

        Raises:
            ValueError: an option is out of its range, or more than one is set.
        """
        from .rate_controller import RateController  # it imports from this file

        if self.dial is not None and self.target_update_rate is None:
            self.target_update_rate = math.sqrt(abs(math.prod(self.dial)))  # RateController refuses a wrong dial
        makers: dict[str, Callable[[Any], TrainerCallback]] = {
            "budget_warmup_steps": BudgetWarmup,
            "target_update_rate": lambda target: RateController(target, self.dial),
            "steered_update_rate": BudgetController,
        }
        given = {name: value for name in makers if (value := getattr(self, name)) is not None}
        asked = {name: value for name, value in given.items() if value or name != "budget_warmup_steps"}  # 0: none
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} all set lambda: use only one of them.")
        return [makers[name](value) for name, value in asked.items()]


@dataclass
class StoppingArguments:
    """The option that stops training early."""

    stop_when_settled: int = field(
        default=0,
        metadata={
            "help": "Stop after so many evaluations in a row in which the task is solved and the share of steps read "
            "does not fall any more, by more than 0.01; 0: train to the end."
        },
    )

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback if the option is set; otherwise an empty list."""
        return [StopWhenSettled(self.stop_when_settled)] if self.stop_when_settled else []


def saved_attributes(state: TrainerState, callback: ExportableState) -> dict[str, Any]:
    """Return a callback's attributes in the checkpoint from which training resumes; an empty dict in a new run."""
    saved: Any = state.stateful_callbacks
    return saved.get(type(callback).__name__, {}).get("attributes", {}) if state.global_step else {}


class BudgetWarmup(TrainerCallback, ExportableState):
    """Let lambda grow linearly from 0 to the config's `budget_weight`: the model learns the task first, then to skip.

    Evaluations during the warm-up use lambda as it is at that time.

    Args:
        steps: number of optimizer steps of the warm-up; below 1: a share of all steps.

    Raises:
        ValueError: steps is not above 0.
    """

    def __init__(self, steps: float) -> None:
        if not steps > 0:
            raise ValueError(f"steps must be above 0; got {steps}.")
        self.steps = steps
        self.weight: float | None = None

    def state(self) -> dict[str, Any]:
        """Return what to store in a checkpoint: the final lambda, because the config holds the current one."""
        return {"args": {"steps": self.steps}, "attributes": {"weight": self.weight}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Take the final lambda from the checkpoint if training resumes, otherwise from the config."""
        kept = saved_attributes(state, self).get("weight")
        self.weight = kept or self.weight or float(model.config.budget_weight)
        self.length = self.steps if self.steps >= 1 else self.steps * state.max_steps

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Set lambda; it depends only on the step's number, so that a resumed run continues where it was."""
        model.config.budget_weight = (self.weight or 0.0) * min(state.global_step / self.length, 1.0)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Put the final lambda into the config."""
        model.config.budget_weight, self.weight = self.weight, None


class BudgetController(TrainerCallback, ExportableState):
    """Change lambda until the share `target` of the real steps is read; warn at the end if it was not reached.

    This is a proportional-integral controller of log(lambda). At every training log, lambda grows if the logged update
    rate is above the wanted rate, and shrinks if it is below. During the first half of training the wanted rate goes
    from the first logged rate to the target, so that the model learns the task meanwhile. Lambda starts at the config's
    `budget_weight`. `logging_steps` of 10 to 50 work well.

    After training, `outcome` holds the target, the update rate of the last evaluation (without evaluations: of the last
    log), lambda, and whether the target was reached: whether the rates differ by at most 0.05. If it was not reached, a
    warning says why. Use the last checkpoint, not the best one, which may be from before the target was reached.

    Args:
        target: wanted share of the real steps, above 0 and at most 1.

    Raises:
        ValueError: target is out of its range; or, at the start of training, if the gate is not learned or budget_loss
            is not "cost".
    """

    def __init__(self, target: float) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"target must be a share of the steps, above 0 and at most 1; got {target}.")
        self.target = target
        self.weight: float | None = None
        self.error = 0.0
        self.first: float | None = None  # the first logged update rate
        self.rate: float | None = None
        self.outcome: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "args": {"target": self.target},
            "attributes": {"weight": self.weight, "error": self.error, "first": self.first},
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Take lambda from the checkpoint if training resumes, otherwise from the config."""
        config = model.config
        if config.gate != "learned" or config.budget_loss != "cost":
            raise ValueError(
                'A target update rate needs gate="learned" and budget_loss="cost"; got '
                f'gate="{config.gate}", budget_loss="{config.budget_loss}".'
            )
        kept = saved_attributes(state, self)
        self.weight = float(kept.get("weight") or self.weight or config.budget_weight or START)
        self.error = float(kept.get("error", self.error))
        self.first = kept.get("first", self.first)
        config.budget_weight = self.weight

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Change lambda according to the update rate that was just logged."""
        if not logs or "update_rate" not in logs or self.weight is None:
            return
        self.rate = logs["update_rate"]
        self.first = self.rate if self.first is None else self.first
        wanted = self.first + (self.target - self.first) * min(state.global_step / (DESCENT * state.max_steps), 1.0)
        # The error is clamped to [-1, 1], a factor of e, so that one extreme log does not change lambda too much.
        error = max(-1.0, min(1.0, math.log(max(self.rate, 1e-6) / wanted)))
        change = PROPORTIONAL * (error - self.error) + INTEGRAL * error
        self.error = error
        self.weight = max(SMALLEST, min(LARGEST, self.weight * math.exp(change)))
        model.config.budget_weight = self.weight

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Store the update rate over all evaluated rows, which decides the outcome."""
        self.rate = (metrics or {}).get("eval_update_rate", self.rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set `outcome`; warn if the target was not reached."""
        reached = self.rate is not None and abs(self.rate - self.target) <= TOLERANCE
        self.outcome = {
            "target_update_rate": self.target,
            "update_rate": self.rate,
            "budget_weight": self.weight,
            "reached": reached,
        }
        if not reached:
            shown = "unknown" if self.rate is None else f"{self.rate:.1%}"
            logger.warning(
                "The target update rate of %.1f %% was not reached: the rate is %s, with lambda %.3g. %s",
                100 * self.target,
                shown,
                self.weight or 0.0,
                self._reason(),
            )

    def _reason(self) -> str:
        if self.rate is None:
            return "Nothing was logged: lower logging_steps."
        if self.rate < self.target and (self.weight or 0.0) <= 10 * SMALLEST:
            return (
                "Lambda is almost 0, so the budget is not the reason why the model reads so little. "
                'budget_loss="l1" with budget_target also rewards reading.'
            )
        if self.rate > self.target and (self.weight or 0.0) >= LARGEST / 10:
            return "Lambda is at its upper limit: the model does not learn to read less on this task."
        return "Lambda was still moving: train longer, lower logging_steps, or start from another budget_weight."


class StopWhenSettled(TrainerCallback, ExportableState):
    """Stop training when the task is solved and the number of updates no longer falls.

    It is for tasks whose metrics hold `solved` (adding, frequency), for which the paper reports only whether the task
    is solved and with how many updates. It counts evaluations in a row in which the task is solved and the update rate
    is at most 0.01 below the lowest rate so far; any other evaluation resets the count to 0. A resumed run continues
    the count. After training, `outcome` says whether the run settled, and at which optimizer step.

    Args:
        evaluations: the count at which training stops.

    Raises:
        ValueError: evaluations is below 1; or, during training, if the task's metrics do not say whether it is solved.
    """

    def __init__(self, evaluations: int) -> None:
        if evaluations < 1:
            raise ValueError(f"evaluations must be at least 1; got {evaluations}.")
        self.evaluations = evaluations
        self.lowest: float | None = None
        self.settled = 0
        self.outcome: dict[str, Any] = {"settled": False, "step": None}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "args": {"evaluations": self.evaluations},
            "attributes": {"lowest": self.lowest, "settled": self.settled},
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Take the count from the checkpoint if training resumes."""
        kept = saved_attributes(state, self)
        self.lowest, self.settled = kept.get("lowest", self.lowest), kept.get("settled", self.settled)
        if kept:  # the run may already have settled at the checkpoint
            self._stop_if_settled(state, control)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Count this evaluation, and stop training if the count is high enough."""
        if not metrics or "eval_update_rate" not in metrics:
            return  # an evaluation of another split, after training
        if "eval_solved" not in metrics:
            raise ValueError(
                "stop_when_settled needs a task whose metrics say whether it is solved (adding, frequency); this one "
                f"has {', '.join(sorted(metrics))}. Leave the option out."
            )
        rate = metrics["eval_update_rate"]
        if not metrics["eval_solved"]:
            self.lowest, self.settled = None, 0
        elif self.lowest is None or rate < self.lowest - SLACK:
            self.lowest, self.settled = rate, 0
        else:
            self.settled += 1
        self._stop_if_settled(state, control)

    def _stop_if_settled(self, state: TrainerState, control: Any) -> None:
        if self.settled >= self.evaluations:
            self.outcome = {"settled": True, "step": state.global_step}
            control.should_training_stop = True
