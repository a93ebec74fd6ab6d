"""Callbacks of SkipRNNTrainer: the budget weight lambda over the course of training, and when to stop.

A fixed lambda is `budget_weight` of the config; a target in the loss itself is `budget_loss="l1"` or `"l2"` with
`budget_target` (section 3.3 of the paper names both). The callbacks change `model.config.budget_weight` while training
goes on:

    SkipRNNTrainer(model, args, ..., callbacks=[BudgetController(0.4)])  # read 40 % of the steps
"""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

logger = logging.get_logger(__name__)

SMALLEST, LARGEST = 1e-8, 1.0  # the controller's limits of lambda
START = 1e-5  # the controller's first lambda if the config's is 0
# The controller changes log(lambda) at every log by PROPORTIONAL * (change of the error) + INTEGRAL * error. With 1 and
# 0.3 the update rate oscillates; on the task digits it ended at a gate that stayed closed.
PROPORTIONAL, INTEGRAL = 3.0, 0.1
DESCENT = 0.5  # share of training over which the wanted rate goes from the first logged one to the target
TOLERANCE = 0.05  # share of the steps by which the reached rate may differ from the target
SLACK = 0.01  # share of the steps: an update rate that is lower by less than this has not fallen


@dataclass
class BudgetArguments:
    """Options of how lambda changes while training."""

    budget_warmup_steps: float = field(
        default=0.0,
        metadata={"help": "Let lambda grow linearly from 0 over so many steps; below 1: a share of training."},
    )
    target_update_rate: float | None = field(
        default=None,
        metadata={
            "help": "Read this share of the steps, as in 0.2. The gate's start, budget and noise follow from it "
            "(RateController), and the trained gate is calibrated on validation rows."
        },
    )
    steered_update_rate: float | None = field(
        default=None,
        metadata={
            "help": "Steer lambda of budget_loss='cost' at every log until this share of the steps is read "
            "(BudgetController): the way of version 0.1.0. For new work, use target_update_rate."
        },
    )

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks that these options ask for.

        Raises:
            ValueError: an option is out of its range, or more than one is set.
        """
        from .rate_controller import RateController  # it imports from this file

        makers = {
            "budget_warmup_steps": BudgetWarmup,
            "target_update_rate": RateController,
            "steered_update_rate": BudgetController,
        }
        asked = {name: value for name in makers if (value := getattr(self, name)) not in (None, 0.0)}
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} all set lambda: give one of them.")
        return [makers[name](value) for name, value in asked.items()]


@dataclass
class StoppingArguments:
    """Option of when to stop."""

    stop_when_settled: int = field(
        default=0,
        metadata={
            "help": "Stop after so many evaluations in a row that found the task solved and the share of updates not "
            "fallen by more than 1 % of the steps; 0: train to the end."
        },
    )

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that the option asks for, if any."""
        return [StopWhenSettled(self.stop_when_settled)] if self.stop_when_settled else []


def saved_attributes(state: TrainerState, callback: ExportableState) -> dict[str, Any]:
    """Return what the checkpoint that training resumes from holds of a callback; nothing in a new run."""
    saved: Any = state.stateful_callbacks
    return saved.get(type(callback).__name__, {}).get("attributes", {}) if state.global_step else {}


class BudgetWarmup(TrainerCallback, ExportableState):
    """Let lambda grow linearly from 0 to the config's `budget_weight`: first the task is learned, then to skip.

    The losses of evaluations during the warm-up hold the lambda of that moment.

    Args:
        steps: optimizer steps of the warm-up; below 1, a share of all steps.

    Raises:
        ValueError: steps is not above 0.
    """

    def __init__(self, steps: float) -> None:
        if not steps > 0:
            raise ValueError(f"steps must be above 0; got {steps}.")
        self.steps = steps
        self.weight: float | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the config there holds lambda as it was at that step, not the final one."""
        return {"args": {"steps": self.steps}, "attributes": {"weight": self.weight}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Note the final lambda: the checkpoint's where training resumes, else the config's."""
        kept = saved_attributes(state, self).get("weight")
        self.weight = kept or self.weight or float(model.config.budget_weight)
        self.length = self.steps if self.steps >= 1 else self.steps * state.max_steps

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Set lambda by the number of the step alone, so that a resumed run goes on where it was."""
        model.config.budget_weight = (self.weight or 0.0) * min(state.global_step / self.length, 1.0)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Leave the final lambda in the config."""
        model.config.budget_weight, self.weight = self.weight, None


class BudgetController(TrainerCallback, ExportableState):
    """Steer lambda until the share `target` of the real steps is read; warn at the end if it is not.

    A proportional-integral controller of log(lambda): at every training log, lambda grows while the logged update rate
    is above the wanted one and shrinks while it is below. The wanted rate goes from the first logged one to the target
    over the first half of training, so that the task is learned on the way. Lambda starts at the config's
    `budget_weight`. `logging_steps` of 10 to 50 work well.

    After training, `outcome` holds the target, the update rate of the last evaluation (without one: of the last log),
    lambda, and whether the two rates differ by at most 5 % of the steps; if they differ by more, a warning says why.
    Use the last checkpoint, not the best one: the best may be from before the rate was reached.

    Args:
        target: wanted share of the real steps, above 0 and at most 1.

    Raises:
        ValueError: target is out of its range; at the start of training, the gate is not learned or budget_loss is not
            "cost".
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
        """Return what a checkpoint keeps."""
        return {
            "args": {"target": self.target},
            "attributes": {"weight": self.weight, "error": self.error, "first": self.first},
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Take the checkpoint's lambda where training resumes, else the config's."""
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
        """Change lambda by the update rate that was just logged."""
        if not logs or "update_rate" not in logs or self.weight is None:
            return
        self.rate = logs["update_rate"]
        self.first = self.rate if self.first is None else self.first
        wanted = self.first + (self.target - self.first) * min(state.global_step / (DESCENT * state.max_steps), 1.0)
        # The error is limited to a factor of e, so that one log far off does not throw lambda far off.
        error = max(-1.0, min(1.0, math.log(max(self.rate, 1e-6) / wanted)))
        change = PROPORTIONAL * (error - self.error) + INTEGRAL * error
        self.error = error
        self.weight = max(SMALLEST, min(LARGEST, self.weight * math.exp(change)))
        model.config.budget_weight = self.weight

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Note the evaluated rate, which is over all rows: the outcome is judged by it."""
        self.rate = (metrics or {}).get("eval_update_rate", self.rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the outcome; warn if the target was not reached."""
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
                "Lambda is almost 0, so it is the task alone that makes the model read so little. "
                'budget_loss="l1" with budget_target also rewards reading.'
            )
        if self.rate > self.target and (self.weight or 0.0) >= LARGEST / 10:
            return "Lambda is at its upper limit: this model does not learn to read less on this task."
        return "Lambda was still moving: train longer, lower logging_steps, or start from another budget_weight."


class StopWhenSettled(TrainerCallback, ExportableState):
    """Stop training when the task is solved and the number of updates falls no more.

    For tasks whose metrics hold `solved` (adding, frequency): there the paper asks only whether the task is solved, and
    with how many updates. Evaluations are counted that are solved and whose update rate is not more than 1 % of the
    steps below the lowest rate so far; the count starts again at 0 at any other evaluation. A resumed run goes on
    counting. After training, `outcome` says whether the run settled, and at which optimizer step.

    Args:
        evaluations: stop at this count.

    Raises:
        ValueError: evaluations is below 1; in training, the task's metrics do not say whether it is solved.
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
        """Go on with the checkpoint's count where training resumes."""
        kept = saved_attributes(state, self)
        self.lowest, self.settled = kept.get("lowest", self.lowest), kept.get("settled", self.settled)
        if kept:  # the checkpoint may be the last one of a run that had settled
            self._stop_if_settled(state, control)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Count this evaluation, and stop training if the count is reached."""
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
