"""The outputs of scans and models, and the state that continues a sequence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple
from transformers.utils.generic import ModelOutput


class SkipRNNState(NamedTuple):
    """What a Skip RNN carries from one step to the next; pass it back as `state=` to continue a sequence.

    All parts are floating point, at least float32. `steps_since_update` holds whole numbers; it is a float so that
    gradients flow through it from one chunk of a sequence into the chunk before. A fresh state has increment 1, so that
    the first real step is always an update. Without a learned gate the increment is 0 after the first update.
    """

    h: Tensor  # [L, B, H]
    c: Tensor | None  # [L, B, H]; None for a GRU
    increment: Tensor  # [B]
    steps_since_update: Tensor  # [B]

    def detach(self) -> "SkipRNNState":
        """Return the same values without their graph, for truncated backpropagation."""
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> "SkipRNNState":
        """Return `function` of every part."""
        c = None if self.c is None else function(self.c)
        return SkipRNNState(function(self.h), c, function(self.increment), function(self.steps_since_update))

    def reorder(self, index: Tensor) -> "SkipRNNState":
        """Return the rows `index` ([N], integer) of the batch, in that order."""
        return SkipRNNState(
            self.h[:, index],
            None if self.c is None else self.c[:, index],
            self.increment[index],
            self.steps_since_update[index],
        )


# torch.export.save writes the class by this name.
_register_namedtuple(SkipRNNState, serialized_type_name=f"{__name__}.SkipRNNState")


class ScanOutput(NamedTuple):
    """The result of a scan; every backend returns it."""

    sequence: Tensor | None  # [B, T, H], the top layer's h after every step; None unless asked for
    state: SkipRNNState  # after the last real step
    num_updates: Tensor  # [B], differentiable through the straight-through gate
    update_gates: Tensor  # [B, T], 0 or 1, differentiable likewise


@dataclass
class _Output(ModelOutput):
    """The base of the models' outputs: a ModelOutput that is made quickly, which shows in calls with one short row.

    transformers' own methods list the fields of the class at every assignment.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and name in self.__dataclass_fields__:
            super(ModelOutput, self).__setitem__(name, value)
        object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        if len(self) < 2:  # it may be made of one mapping or of pairs, as accelerate does
            super().__post_init__()


@dataclass
class SkipRNNModelOutput(_Output):
    """The output of SkipRNNModel.

    Attributes:
        last_hidden_state: [B, T, H], the top layer's h after every step; skipped and masked steps keep the last one.
        pooler_output: [B, H], the top layer's h after the last real step.
        state: pass it back as `state=` to continue the sequences.
        num_updates: [B], updates of each row, differentiable through the straight-through gate.
        update_gates: [B, T], 0 or 1, with output_update_gates=True.
        budget_loss: scalar, lambda times the cost of the updates, mean over rows.
        hidden_states: with output_hidden_states=True: the inputs [B, T, input_size], then each layer's h [B, T, H],
            bottom layer first. Only the top layer's h and the inputs are part of the graph of the other outputs.
        gate_noise: [B], the shift of each row's gate that was drawn in training; None without `config.gate_noise`.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    state: SkipRNNState | None = None
    num_updates: Tensor | None = None
    update_gates: Tensor | None = None
    budget_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    gate_noise: Tensor | None = None


@dataclass
class SkipRNNClassifierOutput(_Output):
    """The output of the classifiers.

    Attributes:
        loss: scalar, task_loss + budget_loss; only with labels.
        logits: [B, num_labels], or [B, T, num_labels] for frames.
        task_loss: scalar; only with labels.
        budget_loss, num_updates, update_gates, state, hidden_states: see SkipRNNModelOutput.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    task_loss: Tensor | None = None
    budget_loss: Tensor | None = None
    num_updates: Tensor | None = None
    update_gates: Tensor | None = None
    state: SkipRNNState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
