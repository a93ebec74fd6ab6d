"""SkipRNNConfig: what a Skip RNN is made of."""

import math
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class SkipRNNConfig(PreTrainedConfig):
    """Configuration of a Skip RNN (Campos et al., ICLR 2018).

    Args:
        cell_type: "lstm" or "gru".
        gru_reset: where a GRU's reset gate acts: "before" the recurrent product (paper) or "after" it (torch.nn.GRU).
        gate: "learned" (the paper's), "always" (a plain LSTM or GRU), or one of two baselines: "random" (each step is
            skipped with probability `skip_probability`) and "strided" (every `stride`-th step is read).
        skip_probability: p_skip of the "random" gate, in [0, 1).
        stride: of the "strided" gate, at least 1.
        input_size: width of an input vector, or of a token's embedding where `vocab_size` is set.
        hidden_size: units of each layer.
        num_hidden_layers: layers stacked under one shared gate.
        vocab_size: number of tokens; where set, the model takes `input_ids` and embeds them.
        pad_token_id: token whose embedding stays zero.
        budget_weight: lambda of the budget loss (section 3.3), per update of a sequence.
        budget_loss: "cost": lambda * N; "l1": lambda * |N - budget_target * L|; "l2": its square times lambda; with N
            updates over the L real steps of a row.
        budget_target: wanted share of real steps read, in [0, 1]; needed by "l1" and "l2", refused with "cost".
        learn_initial_state: learn s_0, drawn from N(0, 1); otherwise it is zero.
        update_bias: initial value of b_p; at 1 every step is an update at the start of training.
        forget_bias: initial value of an LSTM's forget gate bias.
        input_noise: standard deviation of the Gaussian noise added to input_values and pixel_values in training;
            0 switches it off. Few rows are soon known by heart, and what a gate then reads does not carry over.
        embedding_dropout: probability of zeroing an element of an embedding.
        classifier_dropout: probability of zeroing an element of the state that a classifier reads.

    Raises:
        StrictDataclassError: for a value of the wrong type, out of its range, or in contradiction to another one.
    """

    model_type = "skip_rnn"
    # Everything but the logits, so that `logits, labels = eval_pred` works with a plain Trainer.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "task_loss",
        "budget_loss",
        "num_updates",
        "update_gates",
        "state",
    ]

    cell_type: Literal["lstm", "gru"] = "lstm"
    gru_reset: Literal["before", "after"] = "before"
    gate: Literal["learned", "always", "random", "strided"] = "learned"
    skip_probability: float | int = 0.5
    stride: int = 2
    input_size: int = 1
    hidden_size: int = 110
    num_hidden_layers: int = 1
    vocab_size: int | None = None
    pad_token_id: int | None = None
    budget_weight: float | int = 1e-4
    budget_loss: Literal["cost", "l1", "l2"] = "cost"
    budget_target: float | int | None = None
    learn_initial_state: bool = True
    update_bias: float | int = 1.0
    forget_bias: float | int = 1.0
    input_noise: float | int = 0.0
    embedding_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0

    def validate_sizes(self) -> None:
        """Sizes are at least one."""
        for name in ("input_size", "hidden_size", "num_hidden_layers", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(
                f"vocab_size must be at least 1, or None for inputs without tokens; got {self.vocab_size}."
            )

    def validate_probabilities(self) -> None:
        """Probabilities lie in [0, 1)."""
        for name in ("skip_probability", "embedding_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}.")

    def validate_finite(self) -> None:
        """Weights and biases of the loss and the initialisation are finite numbers."""
        for name in ("budget_weight", "update_bias", "forget_bias"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite; got {getattr(self, name)}.")
        if not 0 <= self.input_noise < math.inf:
            raise ValueError(f"input_noise must be a finite standard deviation, at least 0; got {self.input_noise}.")
        if self.budget_weight < 0:
            raise ValueError(
                f"budget_weight must not be negative; got {self.budget_weight}. 0 switches the budget off."
            )

    def validate_budget(self) -> None:
        """A target goes with a budget that has one."""
        if self.budget_loss == "cost" and self.budget_target is not None:
            raise ValueError(
                f"budget_loss='cost' has no target; got budget_target={self.budget_target}. "
                "Use budget_loss='l1' or 'l2'."
            )
        if self.budget_loss != "cost" and self.budget_target is None:
            raise ValueError(
                f"budget_loss={self.budget_loss!r} needs budget_target, the wanted share of steps in [0, 1]."
            )
        if self.budget_target is not None and not 0 <= self.budget_target <= 1:
            raise ValueError(f"budget_target is a share of a row's real steps, in [0, 1]; got {self.budget_target}.")

    def validate_tokens(self) -> None:
        """Token settings need tokens, and input noise numbers."""
        if self.vocab_size is None:
            if self.pad_token_id is not None:
                raise ValueError(
                    f"pad_token_id={self.pad_token_id} needs vocab_size; without it inputs are not tokens."
                )
            if self.embedding_dropout:
                raise ValueError(f"embedding_dropout={self.embedding_dropout} needs vocab_size; nothing is embedded.")
        elif self.input_noise:
            raise ValueError(
                f"input_noise={self.input_noise} needs numbers as inputs; for tokens use embedding_dropout."
            )
        elif self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be in [0, vocab_size = {self.vocab_size}); got {self.pad_token_id}.")

    def validate_cell(self) -> None:
        """gru_reset belongs to a GRU."""
        if self.cell_type == "lstm" and self.gru_reset != "before":
            raise ValueError(f"gru_reset={self.gru_reset!r} needs cell_type='gru'; got cell_type='lstm'.")

    @property
    def cell(self) -> str:
        """Name of the cell in `cells_skip_rnn.CELLS`."""
        return "gru_reset_after" if (self.cell_type, self.gru_reset) == ("gru", "after") else self.cell_type
