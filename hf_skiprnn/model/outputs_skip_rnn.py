"""What the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput

from .cells_skip_rnn import SkipRNNState


@dataclass
class SkipRNNModelOutput(ModelOutput):
    """Output of SkipRNNModel.

    Attributes:
        last_hidden_state: [B, T, H], the top layer's h after every step, held at skipped and masked ones.
        pooler_output: [B, H], the top layer's h after the last real step.
        state: pass it back as `state=` to continue the sequences.
        num_updates: [B], updates of each row, differentiable through the straight-through gate.
        update_gates: [B, T], 0 or 1, with output_update_gates=True.
        budget_loss: scalar, lambda times the cost of the updates, mean over rows.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    state: SkipRNNState | None = None
    num_updates: Tensor | None = None
    update_gates: Tensor | None = None
    budget_loss: Tensor | None = None


@dataclass
class SkipRNNClassifierOutput(ModelOutput):
    """Output of the classifiers.

    Attributes:
        loss: scalar, task_loss + budget_loss; only with labels.
        logits: [B, num_labels], or [B, T, num_labels] for frames.
        task_loss: scalar; only with labels.
        budget_loss, num_updates, update_gates, state: see SkipRNNModelOutput.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    task_loss: Tensor | None = None
    budget_loss: Tensor | None = None
    num_updates: Tensor | None = None
    update_gates: Tensor | None = None
    state: SkipRNNState | None = None
