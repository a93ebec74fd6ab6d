"""The budget over the course of training: a lambda that warms up, or one that is steered to a wanted update rate.

A fixed lambda is `budget_weight` of the config, and a target in the loss itself is `budget_loss="l1"` or `"l2"` with
`budget_target` (section 3.3 of the paper names both). What is here changes `model.config.budget_weight` as training
goes on, through callbacks for SkipRNNTrainer:

    SkipRNNTrainer(model, args, ..., callbacks=[BudgetController(0.4)])  # read 40 % of the steps
"""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

logger = logging.get_logger(__name__)

SMALLEST, LARGEST = 1e-8, 1.0  # lambda of the controller
START = 1e-5  # where it starts if the config's lambda is 0
# Change of log(lambda) per change of the error, and per error, at every log. With 1 and 0.3 the rate swings, on digits
# until the gate has closed for good.
KEEP_UP, CATCH_UP = 3.0, 0.1
DESCENT = 0.5  # share of training over which the wanted rate goes from the first one logged to the target
TOLERANCE = 0.05  # of the wanted rate, as a share of the steps


@dataclass
class BudgetArguments:
    """Options of the budget's course."""

    budget_warmup_steps: float = field(
        default=0.0,
        metadata={"help": "Let lambda grow linearly from 0 over so many steps; below 1: a share of training."},
    )
    target_update_rate: float | None = field(
        default=None, metadata={"help": "Steer lambda until this share of the steps is read, as in 0.4."}
    )

    def callbacks(self) -> list[TrainerCallback]:
        """The callbacks that these options ask for.

        Raises:
            ValueError: an option out of its range, or both at once.
        """
        if self.budget_warmup_steps and self.target_update_rate is not None:
            raise ValueError("budget_warmup_steps and target_update_rate both set lambda: give one of them.")
        if self.budget_warmup_steps:
            return [BudgetWarmup(self.budget_warmup_steps)]
        return [] if self.target_update_rate is None else [BudgetController(self.target_update_rate)]


class BudgetWarmup(TrainerCallback, ExportableState):
    """Lambda from 0 to the config's `budget_weight`, linearly; so the task is learned before steps are saved.

    steps: optimizer steps of the warm-up; below 1, a share of all of them. Losses of evaluations on the way hold the
    lambda of that moment.
    """

    def __init__(self, steps: float) -> None:
        if not steps > 0:
            raise ValueError(f"steps must be above 0; got {steps}.")
        self.steps = steps
        self.weight: float | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: the config there holds the lambda of its moment."""
        return {"args": {"steps": self.steps}, "attributes": {"weight": self.weight}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Note where lambda goes: to the config's, or to that of the training that goes on here."""
        self.weight = kept_in(state, self).get("weight") or self.weight or float(model.config.budget_weight)
        self.length = self.steps if self.steps >= 1 else self.steps * state.max_steps

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Lambda of this step: decided by its number alone, so a resumed run goes on where it was."""
        model.config.budget_weight = (self.weight or 0.0) * min(state.global_step / self.length, 1.0)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Leave the whole lambda in the config."""
        model.config.budget_weight, self.weight = self.weight, None


def kept_in(state: TrainerState, callback: ExportableState) -> dict[str, Any]:
    """Attributes of a callback that the checkpoint holds from which training goes on; empty at its beginning."""
    saved: Any = state.stateful_callbacks
    return saved.get(type(callback).__name__, {}).get("attributes", {}) if state.global_step else {}


class BudgetController(TrainerCallback, ExportableState):
    """Steers lambda so that `target` of the real steps are read, and says when it cannot.

    At every training log (`logging_steps`; every 10 to 50 steps do well) lambda grows while the window's update rate is
    above the wanted one and shrinks while it is below: log(lambda) follows the error log(rate / wanted) and its sum.
    The wanted rate goes from the first one that is logged to the target over the first half of training, so that the
    task is learned on the way. Lambda starts from the config's `budget_weight`. Needs budget_loss="cost" and the
    learned gate.

    After training, `outcome` holds the target, the rate of the last evaluation (without one: of the last log), lambda,
    and whether the rate is within 5 % of the steps; if it is not, a warning says why. Give the last checkpoint, not the
    best: the best one may be from before the rate was reached.
    """

    def __init__(self, target: float) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"target must be a share of the steps, above 0 and at most 1; got {target}.")
        self.target = target
        self.weight: float | None = None
        self.error = 0.0
        self.first: float | None = None  # rate
        self.rate: float | None = None
        self.outcome: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "args": {"target": self.target},
            "attributes": {"weight": self.weight, "error": self.error, "first": self.first},
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Start from the config's lambda, or go on from the checkpoint's."""
        config = model.config
        if config.gate != "learned" or config.budget_loss != "cost":
            raise ValueError(
                'A target update rate needs gate="learned" and budget_loss="cost"; got '
                f'gate="{config.gate}", budget_loss="{config.budget_loss}".'
            )
        kept = kept_in(state, self)
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
        """Steer by the update rate of the window that was just logged."""
        if not logs or "update_rate" not in logs or self.weight is None:
            return
        self.rate = logs["update_rate"]
        self.first = self.rate if self.first is None else self.first
        wanted = self.first + (self.target - self.first) * min(state.global_step / (DESCENT * state.max_steps), 1.0)
        # A rate far off says little more than "far": beyond a factor of e the error counts no more.
        error = max(-1.0, min(1.0, math.log(max(self.rate, 1e-6) / wanted)))
        change = KEEP_UP * (error - self.error) + CATCH_UP * error
        self.error = error
        self.weight = max(SMALLEST, min(LARGEST, self.weight * math.exp(change)))
        model.config.budget_weight = self.weight

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Evaluated rates count at the end: they are over all rows."""
        self.rate = (metrics or {}).get("eval_update_rate", self.rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what was reached."""
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
                "The wanted update rate of %.1f %% was not reached: it is %s, with lambda %.3g. %s",
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
                "Lambda is as good as 0, so the task alone makes the model read no more. "
                'budget_loss="l1" with budget_target also rewards reading.'
            )
        if self.rate > self.target and (self.weight or 0.0) >= LARGEST / 10:
            return "Lambda is at its limit: this model does not learn to read less on this task."
        return "Lambda was still moving: train longer, lower logging_steps, or start from another budget_weight."
