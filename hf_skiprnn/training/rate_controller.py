"""Train a gate to read a target share of the steps: `SkipRNNTrainer(..., callbacks=[RateController(0.2)])`.

`RateController(0.2, dial=(0.05, 0.9))` trains one model for all shares from 5 to 90 %.

The budget is lambda * N / L (`budget_loss="rate"`). Lambda is the dual variable (Lagrange multiplier) of the constraint
"the share of steps read is the target": it rises while the model reads more, and falls while it reads less. A negative
lambda rewards reading, which opens a closed gate again. All quantities are shares, so the same constants serve
sequences of any length.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .callbacks import saved_attributes
from .forward_notes import skip_rnns
from .window import Held

logger = logging.get_logger(__name__)

# gate_noise: rows read from about 0.8 to 1.25 times the target share. More noise can slow down learning: the test
# accuracy of --config mnist-skip-lstm --num_train_epochs 3 --warmup_steps 200 --gate_noise A is 75 and 59 % (seeds 42,
# 1) with A = 0.25, and 49 % (seed 42) with A = 1.
NOISE = 0.25
SMALL = 0.1  # factor by which W_p is scaled at the start, so that the gate begins as a fixed stride
PROPORTIONAL = 1.0  # proportional gain, in units of the task loss
SMOOTHING = 0.05  # weight of a step in the moving average of the task loss
# Integral gain for each optimizer step: COURSE / number of steps, clamped to [SLOWEST, FASTEST].
SLOWEST, FASTEST, COURSE = 0.03, 0.3, 24.0
LIMIT = 5.0  # limit of the integral (anti-windup); in trials it stayed below 3
TOLERANCE = 0.1  # largest relative difference between the final share and the target
CLOSED, OPEN = 0.25, 0.95  # a share below CLOSED * target or above OPEN is far off
SHUT = 1.1  # a gate that reads fewer steps of a row, and less than half of the target, is shut
PATIENCE = 100  # optimizer steps after which a share far off is logged, and a shut gate starts anew
RESTARTS = 3  # largest number of such starts
# The range of a dial is widened from 0 to the whole between these shares of training. With the whole range from the
# first step, models of long sequences did not learn the task at any share. Widened between 0.3 and 0.7, a dial of
# find_digit (14 epochs, seeds 1 and 2) has 34.1 and 35.4 % at a share of 0.1 (validation), 73.8 and 67.5 % at 0.2;
# with these values it has 35.0 and 42.9 %, 76.7 and 77.5 %. At 0.35 they differ by less than a point.
WIDENED_FROM, WIDENED_TO = 0.1, 0.4
# gate_gradient becomes "mean" after EXPLOSIONS steps with an element of the gradient above EXPLODED, or above EXPLODED
# times a task loss above 1.
EXPLODED, EXPLOSIONS = 100.0, 3
NARROW = 0.1  # standard deviation of the noise below which rows are too alike to measure the slope


class RateController(TrainerCallback, ExportableState):
    """Keep the share of steps that a learned gate reads at `target` during the whole training.

    The gate of a new model starts by reading about every (1 / target)-th step: W_p is small, and
    b_p = logit(target) - log 2, which puts the threshold half-way between two strides. Then, at every optimizer step,
    with the share of steps read in its rows,

        error = clamp((share - target) / (2 target (1 - target)), -1, 1)
        level += rate * error
        lambda = task loss * (level + error) / (4 target (1 - target))

    where the task loss is the largest value so far of its moving average, level stays in [-LIMIT, LIMIT], and rate is
    the integral gain, COURSE / (number of optimizer steps), in [SLOWEST, FASTEST].
    `config.gate_gradient`, if it is "sum", is set to "capped": with "sum", gradients explode through long intervals.
    After a third step with an element above EXPLODED it is set to "mean", and the training recovers.
    A gate that is shut reads one step of a row, and then has next to no gradient. After PATIENCE steps it starts anew
    as a stride, and lambda from 0; the rest of the model stays.
    If `config.gate_noise` is 0 or a dial's range, it is set to NOISE, so that the trained gate also works at other
    shifts. After training, `hf_skiprnn.training.calibrate` finds the shift at which the target is read. `outcome` holds
    the target, the share in the last evaluation, lambda, and whether that share is within 10 % of the target.

    With `dial=(low, high)` every row has its own target in training. Its logit is drawn uniformly between those of low
    and high; the gate's shift is the difference to the target's logit. Lambda is then a line over the shift, with two
    dual variables: a level, and a slope, without which all rows would come to read the same share. After a calibration
    `model(..., update_rate=r)` reads the share r, each row its own.

    SkipRNNTrainer passes the share of every step to `observe`. Other trainers do not, so with them an error is raised
    at the end of training.

    Args:
        target: wanted share of the real steps, above 0 and below 1.
        dial: lowest and highest share that the trained model shall read, around the target; None: only the target.

    Raises:
        ValueError: target or dial is out of its range; or, at the start of training, if the gate is not learned.
    """

    def __init__(self, target: float, dial: Sequence[float] | None = None) -> None:
        if dial is not None and (len(dial) != 2 or not 0 < dial[0] < dial[1] < 1):
            raise ValueError(
                "dial must be two shares of the steps, the lower one first, both above 0 and below 1; "
                f"got {list(dial)}. For example: 0.05 0.9."
            )
        if not 0 < target < 1:
            raise ValueError(
                f"target must be a share of the steps, above 0 and below 1; got {target:g}. gate='always' reads all."
            )
        if dial is not None and not dial[0] <= target <= dial[1]:
            raise ValueError(f"The target, {target:g}, must lie in the range of the dial, {dial[0]:g} to {dial[1]:g}.")
        self.target = target
        self.dial = None if dial is None else tuple(dial)
        self.level = 0.0  # the integral of the error, in units of `scale`
        self.slope = 0.0  # the integral of the error's slope over the noise in standard deviations, likewise
        self.smooth: float | None = None  # moving average of the task loss
        self.scale: float | None = None  # its largest value; the first one of a trained model says little
        self.weight, self.weight_slope = 0.0, 0.0  # lambda
        self.astray = 0  # number of steps in a row with a share far off
        self.shut = 0  # number of steps in a row with a gate that is shut
        self.restarts = 0
        self.explosions = 0  # number of steps with an exploded gradient
        self.share: float | None = None
        self.outcome: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        names = (
            "level",
            "slope",
            "smooth",
            "scale",
            "astray",
            "shut",
            "restarts",
            "explosions",
            "weight",
            "weight_slope",
        )
        attributes = {name: getattr(self, name) for name in names}
        return {"args": {"target": self.target, "dial": self.dial}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Set the budget, the noise and, in a new model, the gate's initial bias; or restore a checkpoint's state."""
        base = skip_rnn_in(model)
        config = base.config
        if config.gate != "learned":
            raise ValueError(f"A target update rate needs gate='learned'; got gate={config.gate!r}.")
        if args.load_best_model_at_end and args.metric_for_best_model in (None, "loss", "eval_loss"):
            logger.warning(
                "load_best_model_at_end compares eval_loss, which contains lambda, and lambda changes in training. Set "
                'metric_for_best_model to "task_loss" or to a metric of yours.'
            )
        config.budget_loss, config.budget_target = "rate", self.target
        self.max_steps = max(state.max_steps, 1)
        self.rate = min(max(COURSE / self.max_steps, SLOWEST), FASTEST)
        kept = saved_attributes(state, self)
        self.level, self.share = kept.get("level", 0.0), None
        self.smooth, self.scale = kept.get("smooth"), kept.get("scale")
        self.slope, self.weight_slope = kept.get("slope", 0.0), kept.get("weight_slope", 0.0)
        for name in ("astray", "shut", "restarts", "explosions"):
            setattr(self, name, kept.get(name, 0))
        if config.gate_gradient != "mean":
            config.gate_gradient = "capped" if self.explosions < EXPLOSIONS else "mean"
        self.weight = kept.get("weight", 0.0)
        config.budget_weight, config.budget_slope = self.weight, self.weight_slope
        if self.dial is None:
            low, high = config.noise_range()
            config.gate_noise = high if high and low == -high else NOISE  # a dial's range would move the share
        else:
            self.widen(config, state.global_step)
        gate = base.update_gate
        is_default = config.update_bias == type(config).update_bias  # else the user has chosen the start
        if not kept and is_default and can_start(gate) and bool((gate.bias == config.update_bias).all()):
            start_as_stride(gate, self.target, SMALL)  # a new gate

    def observe(self, config: Any, held: Held, step: int, largest: float = 0.0) -> None:
        """Set lambda for the next step, and calm gradients that explode.

        Args:
            config: the model's config; its budget_weight is lambda.
            held: means over the rows of an optimizer step.
            step: number of the optimizer step.
            largest: magnitude of the gradient's largest element; 0 if it is not known.
        """
        if largest > EXPLODED * max(abs(held.task_loss), 1.0):
            self.explosions += 1
            if self.explosions == EXPLOSIONS:
                config.gate_gradient = "mean"
                logger.warning(
                    "Gradients have exploded in %d steps, up to step %d. From now on the gates of an interval count as "
                    'their mean (gate_gradient="mean").',
                    *(EXPLOSIONS, step),
                )
        share = self.share = held.share
        loss = max(abs(held.task_loss), 1e-6)
        self.smooth = loss if self.smooth is None else self.smooth + SMOOTHING * (loss - self.smooth)
        self.scale = self.smooth if self.scale is None else max(self.scale, self.smooth)
        unit = self.scale / (4 * self.target * (1 - self.target))
        if self.dial is None:
            error = clamp((share - self.target) / (2 * self.target * (1 - self.target)), 1.0)
            self.level = clamp(self.level + self.rate * error, LIMIT)
            self.weight = unit * (self.level + PROPORTIONAL * error)
        else:
            self.follow(held, unit, *config.noise_range())
            self.widen(config, step)
        config.budget_weight, config.budget_slope = self.weight, self.weight_slope
        is_astray = share < CLOSED * self.target or (share > OPEN and self.target < 0.8)
        self.astray = self.astray + 1 if is_astray else 0
        self.shut = self.shut + 1 if held.updates < SHUT and share < self.target / 2 else 0
        if self.astray == PATIENCE:
            logger.warning(
                "The gate has read %.1f %% of the steps for %d optimizer steps (now at %d); the target is %.1f %%. "
                "Lambda changes until it reads %s. You need not do anything unless training ends like this.",
                *(100 * share, PATIENCE, step, 100 * self.target),
                "less" if share > self.target else "more",
            )

    def on_step_end(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Start a gate that is shut anew: its weight from 0, its bias, the optimizer's moments, and lambda."""
        if self.shut < PATIENCE or self.restarts >= RESTARTS:
            return
        base = skip_rnn_in(model)
        moments = getattr(optimizer, "state", {})
        if not can_start(base.update_gate) or any(part not in moments for part in base.update_gate.parameters()):
            return  # replaced or frozen, or the optimizer holds other copies (DeepSpeed)
        start_as_stride(base.update_gate, self.target, 0.0)
        for parameter in base.update_gate.parameters():
            del moments[parameter]
        self.shut, self.restarts = 0, self.restarts + 1
        self.level = self.slope = self.weight = self.weight_slope = 0.0
        base.config.budget_weight = base.config.budget_slope = 0.0
        logger.warning(
            "The gate was shut for %d optimizer steps, up to step %d. It starts anew as a stride (%d of at most %d "
            "such starts). If it shuts again, halve the learning rate.",
            *(PATIENCE, state.global_step, self.restarts, RESTARTS),
        )

    def follow(self, held: Held, unit: float, low: float, high: float) -> None:
        """Set lambda as a line over the noise of a row, which was drawn from U(low, high)."""
        middle, spread = (low + high) / 2, (high - low) / math.sqrt(12)
        error, slope = clamp(held.error, 1.0), 0.0
        if spread > NARROW:
            slope = clamp((held.error_noise - middle * held.error) / spread, 1.0)
        self.level = clamp(self.level + self.rate * error, LIMIT)
        self.slope = clamp(self.slope + self.rate * slope, LIMIT)
        self.weight_slope = unit * (self.slope + PROPORTIONAL * slope) / spread if spread > NARROW else 0.0
        self.weight = unit * (self.level + PROPORTIONAL * error) - self.weight_slope * middle

    def widen(self, config: Any, step: int) -> None:
        """Set the range of the rows' shifts for the next step."""
        assert self.dial is not None
        width = min(max((step / self.max_steps - WIDENED_FROM) / (WIDENED_TO - WIDENED_FROM), 0.0), 1.0)
        config.gate_noise = [width * (logit(share) - logit(self.target)) for share in self.dial]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Store the share over all evaluated rows."""
        self.share = (metrics or {}).get("eval_update_rate", self.share)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Set `outcome`.

        Raises:
            RuntimeError: `observe` was never called, so lambda never changed.
        """
        if self.scale is None and state.global_step:
            raise RuntimeError("RateController needs SkipRNNTrainer, which passes it the share of every step.")
        if args.load_best_model_at_end and (best := state.best_global_step):  # its weights are loaded now
            logs = [log for log in state.log_history if log["step"] == best and "eval_update_rate" in log]
            self.share = logs[-1]["eval_update_rate"] if logs else self.share
        self.judge(self.share, skip_rnn_in(model).config)

    def judge(self, share: float | None, config: Any) -> None:
        """Set `outcome` from the share that is read now; call it again after a calibration."""
        reached = share is not None and abs(share - self.target) <= TOLERANCE * self.target
        self.outcome = {
            "target_update_rate": self.target,
            "update_rate": share,
            "budget_weight": config.budget_weight,
            "gate_shift": config.gate_shift,
            "reached": reached,
        }

    def warning(self) -> str | None:
        """Return why the target was not reached, or None if it was."""
        if self.outcome is None or self.outcome["reached"]:
            return None
        share = self.outcome["update_rate"]
        reason = "Train longer: lambda was still moving."
        if abs(self.level) >= LIMIT:
            reason = "Lambda is at its limit: the gate does not learn the target share on this data."
        elif share is not None and share > self.target:
            reason = "Sequences may be too short: a sequence's first step is always read. " + reason
        shown = "unknown" if share is None else f"{share:.1%}"
        return f"The target share of steps, {self.target:.1%}, was not reached: the share is {shown}. {reason}"


def clamp(value: float, limit: float) -> float:
    """Return the number in [-limit, limit] that is nearest to `value`."""
    return min(max(value, -limit), limit)


def logit(share: float) -> float:
    """Return log(share / (1 - share))."""
    return math.log(share / (1 - share))


def skip_rnn_in(model: Any) -> Any:
    """Return the SkipRNNModel in a model, which a tool or the user may have wrapped.

    Raises:
        ValueError: there is none.
    """
    found = skip_rnns(model)
    if not found:
        raise ValueError(f"RateController needs a model that contains a SkipRNNModel; got {type(model).__name__}.")
    return found[0]


def can_start(gate: Any) -> bool:
    """Return whether a gate is a plain layer that is trained, not frozen or replaced by a tool."""
    return isinstance(gate, torch.nn.Linear) and all(part.requires_grad for part in gate.parameters())


@torch.no_grad()
def start_as_stride(gate: Any, target: float, factor: float) -> None:
    """Make a gate read about every (1 / target)-th step; its weight is multiplied by `factor`."""
    gate.weight.mul_(factor)
    gate.bias.fill_(logit(target) - math.log(2))
