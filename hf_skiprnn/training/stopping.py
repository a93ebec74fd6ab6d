"""When a run has shown what it can: the task is solved, and the number of updates falls no more.

For tasks whose metrics hold `solved` (adding, frequency): there the paper asks only whether, and with how many updates.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

SLACK = 0.01  # of the steps: a share of updates that is lower by less has not fallen


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
        """The callback that the option asks for, if any."""
        return [StopWhenSettled(self.stop_when_settled)] if self.stop_when_settled else []


class StopWhenSettled(TrainerCallback, ExportableState):
    """Stops training after `evaluations` evaluations in a row that are solved and read no less than those before them.

    An evaluation that is not solved begins anew; so does one whose share of updates is below the lowest since then by
    more than SLACK. A resumed run goes on counting. After training `outcome` says whether the run settled, and at which
    optimizer step.

    Raises:
        ValueError: `evaluations` below 1; in training, a task whose metrics do not say whether it is solved.
    """

    def __init__(self, evaluations: int) -> None:
        if evaluations < 1:
            raise ValueError(f"evaluations must be at least 1; got {evaluations}.")
        self.evaluations = evaluations
        self.lowest: float | None = None
        self.settled = 0
        self.outcome: dict[str, Any] = {"settled": False, "step": None}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "args": {"evaluations": self.evaluations},
            "attributes": {"lowest": self.lowest, "settled": self.settled},
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Go on from a checkpoint's count."""
        saved: Any = state.stateful_callbacks
        kept = saved.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        self.lowest, self.settled = kept.get("lowest", self.lowest), kept.get("settled", self.settled)
        if kept:  # killed after its last checkpoint, a run does not go on
            self._stop_if_settled(state, control)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Count, and stop."""
        if not metrics or "eval_update_rate" not in metrics:
            return  # an evaluation after training, of another split
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
