"""Skip RNN models: SkipRNNModel and its heads, as transformers expects them."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .cells_skip_rnn import CELLS, state_dtype
from .checkpoint_skip_rnn import name_code, refuse_broken_numbers, refuse_foreign_weights
from .configuration_skip_rnn import SkipRNNConfig
from .layers_skip_rnn import SkipRNNLayer, SkipStack, UpdateGate, init_layer, init_update_gate
from .losses_skip_rnn import budget_loss, frame_loss, infer_problem_type, sequence_loss
from .outputs_skip_rnn import SkipRNNClassifierOutput, SkipRNNModelOutput, SkipRNNState
from .pull_skip_rnn import Fetch, pull
from .push_skip_rnn import Stream, StreamBatch, stream

logger = logging.get_logger(__name__)

# What each input must be: shape, rank, type.
INPUTS = {
    "input_values": ("[B, T, input_size]", 3, "floating point"),
    "input_ids": ("[B, T]", 2, "integers (int32 or int64)"),
    "pixel_values": ("[B, C, H, W], C = input_size", 4, "floating point"),
}


class SkipRNNPreTrainedModel(PreTrainedModel):
    """Weights, their initialisation, and what all Skip RNN models share."""

    config: SkipRNNConfig
    base_model_prefix = "skip_rnn"
    main_input_name = "input_values"
    # The budget is a mean over rows: Trainer shall divide by the accumulation steps, not rescale by item counts.
    accepts_loss_kwargs = False
    _no_split_modules = ["SkipRNNModel"]  # noqa: RUF012 - transformers' own form
    _keep_in_fp32_modules_strict = ["update_gate"]  # noqa: RUF012

    def __init__(self, config: SkipRNNConfig) -> None:
        super().__init__(config)
        if config.vocab_size is not None:
            self.main_input_name = "input_ids"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SkipRNNLayer):
            init_layer(module, self.config.forget_bias)
        elif isinstance(module, UpdateGate):
            init_update_gate(module, self.config.update_bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -0.25, 0.25)  # as the paper's unknown words (section 4.4)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As PreTrainedModel, from safetensors files only; nothing that a file holds is run as code.

        Raises:
            ValueError: the weights are not those that the config describes, or not finite; the message says which.
            OSError: there is no such file, or it is cut off or of another kind.
        """
        kwargs.setdefault("use_safetensors", True)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights of {pretrained_model_name_or_path} are no whole safetensors file ({error}): cut off, or "
                "of another kind. Get the checkpoint again, or save it again with save_pretrained."
            ) from error

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        source = load_config.pretrained_model_name_or_path
        refuse_foreign_weights(source, loading_info, load_config.ignore_mismatched_sizes)
        info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        refuse_broken_numbers(source, model)
        return info

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As PreTrainedModel; the config names every Auto class and pipeline that the code beside it has."""
        name_code(self.config, type(self).__name__)
        super().save_pretrained(*args, **kwargs)

    def set_scan_backend(self, backend: str) -> None:
        """Choose the scan: "auto", "dense", "events", "cpu" or "triton"; see SkipStack.set_scan_backend."""
        SkipStack.set_scan_backend(cast(SkipStack, self.base_model), backend)

    def set_gate_shift(self, shift: float) -> None:
        """Move a trained model's operating point: more updates, or fewer; see SkipStack.set_gate_shift."""
        SkipStack.set_gate_shift(cast(SkipStack, self.base_model), shift)

    def pull(self, fetch: Fetch, length: int | Sequence[int] | None = None, **options: Any) -> Any:
        """Run sequences that stand elsewhere, and fetch only the steps that the model reads; see pull_skip_rnn.pull."""
        return pull(self, fetch, length, **options)

    def stream(self, batch_size: int | None = None, **options: Any) -> Stream | StreamBatch:
        """Take steps as they come, and say how many of the next ones are not needed; see streaming_skip_rnn.stream."""
        return stream(self, batch_size, **options)


class SkipRNNModel(SkipStack, SkipRNNPreTrainedModel):
    """A stack of LSTM or GRU layers that reads only some steps of a sequence (Campos et al., ICLR 2018)."""

    def __init__(self, config: SkipRNNConfig) -> None:
        super().__init__(config)
        self.cell, self.gate, self.hidden_size = config.cell, config.gate, config.hidden_size
        self.skip_probability, self.stride = float(config.skip_probability), config.stride
        if config.vocab_size is not None:
            self.embeddings = nn.Embedding(config.vocab_size, config.input_size, padding_idx=config.pad_token_id)
            self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self._build_stack(config.input_size, config.num_hidden_layers, True, config.learn_initial_state)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """The token embeddings [vocab_size, input_size]; None without vocab_size, as accelerate's FSDP expects."""
        return None if self.config.vocab_size is None else self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.embeddings = cast(nn.Embedding, value)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        state: SkipRNNState | None = None,
        forced_gates: Tensor | None = None,
        generator: torch.Generator | None = None,
        output_sequence: bool = True,
        output_update_gates: bool = False,
        check_inputs: bool = False,
    ) -> SkipRNNModelOutput:
        """Run the sequences through the stack.

        Args:
            input_values: [B, T, input_size] floating point, cast to the weights' precision.
            attention_mask: [B, T], 1 at real steps, any pattern. Masked steps do not exist.
            input_ids: [B, T] integers, instead of input_values where the config has vocab_size.
            pixel_values: [B, C, H, W] floating point with C = input_size, instead of input_values: T = H*W, row by row.
            state: SkipRNNState to continue from; default: the initial state.
            forced_gates: [B, T], replay these gates instead of computing them.
            generator: draws the gates of gate="random"; default: torch's global one.
            output_sequence: return last_hidden_state; without it no state but the last leaves the scan.
            output_update_gates: return update_gates.
            check_inputs: raise if a real step's input is NaN or infinite. Otherwise a NaN updates and shows in the
                output.

        Raises:
            ValueError: inputs, mask, gates or state of a wrong shape, type or value; the message says which.
        """
        inputs = self._embed(input_values, input_ids, pixel_values, attention_mask is not None)
        batch, steps = inputs.shape[:2]
        mask = self._as_flags("attention_mask", attention_mask, batch, steps)
        if check_inputs and inputs.is_floating_point():
            self._check_finite(inputs, mask)
        if self.training and self.config.input_noise:
            inputs = inputs + self.config.input_noise * torch.randn_like(inputs)
        forced = self._as_flags("forced_gates", forced_gates, batch, steps)
        state = self.initial_state(batch) if state is None else self._check_state(state, batch)
        table = None if inputs.is_floating_point() else self.embeddings.weight
        out = self.scan(inputs, state, mask, forced, output_sequence, generator, table)
        lengths = out.num_updates.new_full((batch,), steps) if mask is None else mask.sum(1)
        c = self.config
        dtype = self.layers[0].weight_hh.dtype
        return SkipRNNModelOutput(
            last_hidden_state=None if out.sequence is None else out.sequence.to(dtype),
            pooler_output=out.state.h[-1].to(dtype),
            state=out.state,
            num_updates=out.num_updates,
            update_gates=out.update_gates if output_update_gates else None,
            budget_loss=budget_loss(out.num_updates, lengths, c.budget_weight, c.budget_loss, c.budget_target),
        )

    def _embed(
        self, input_values: Tensor | None, input_ids: Tensor | None, pixel_values: Tensor | None, has_mask: bool
    ) -> Tensor:
        """[B, T, input_size] from whichever input came; in inference tokens [B, T] stay what they are."""
        given = {"input_values": input_values, "input_ids": input_ids, "pixel_values": pixel_values}
        present = {name: value for name, value in given.items() if value is not None}
        if len(present) != 1:
            names = " and ".join(present) or "none"
            raise ValueError(f"Give exactly one of input_values, input_ids and pixel_values; got {names}.")
        ((name, inputs),) = present.items()
        if (name == "input_ids") != (self.config.vocab_size is not None):
            wanted = "input_values or pixel_values" if self.config.vocab_size is None else "input_ids"
            raise ValueError(f"config.vocab_size={self.config.vocab_size}, so the model takes {wanted}; got {name}.")
        legend, rank, kind = INPUTS[name]
        if inputs.dim() != rank:
            raise ValueError(f"{name} must be {legend}; got {tuple(inputs.shape)}.")
        is_right = (
            inputs.is_floating_point() if kind == "floating point" else inputs.dtype in (torch.int32, torch.int64)
        )
        if not is_right:
            raise ValueError(f"{name} must be {kind}; got {inputs.dtype}.")
        shape = tuple(inputs.shape)
        if name == "pixel_values":
            inputs = inputs.flatten(2).transpose(1, 2)
        if 0 in inputs.shape[:2]:
            raise ValueError(f"{name} must have at least one row and one step; got {shape}.")
        if name == "input_ids":
            return self._look_up(inputs, has_mask)
        if inputs.shape[-1] != self.config.input_size:
            raise ValueError(f"{name} must be {legend} with {self.config.input_size} inputs a step; got {shape}.")
        return inputs

    def _look_up(self, input_ids: Tensor, has_mask: bool) -> Tensor:
        vocab = self.embeddings.num_embeddings
        if not torch.compiler.is_compiling() and bool(((input_ids < 0) | (input_ids >= vocab)).any()):
            low, high = int(input_ids.min()), int(input_ids.max())
            raise ValueError(f"input_ids must be in [0, vocab_size = {vocab}); got values from {low} to {high}.")
        if not has_mask:
            self._warn_of_padding(input_ids)
        if not torch.is_grad_enabled() and not self.training:
            return input_ids.long()
        return self.embedding_dropout(self.embeddings(input_ids))

    def _warn_of_padding(self, input_ids: Tensor) -> None:
        """transformers' own warning asks for the config of a model that generates."""
        pad = self.config.pad_token_id
        if pad is not None and not torch.compiler.is_compiling() and bool((input_ids[:, [0, -1]] == pad).any()):
            logger.warning_once(
                f"input_ids begin or end with pad_token_id = {pad}, and there is no attention_mask: padding is read "
                "like any token. Pass the tokenizer's attention_mask."
            )

    def _as_flags(self, name: str, flags: Tensor | None, batch: int, steps: int) -> Tensor | None:
        """[B, T] bool of a mask or gates."""
        if flags is None:
            return None
        if flags.shape != (batch, steps):
            hint = " Flatten the image's mask row by row." if flags.dim() > 2 else ""
            raise ValueError(f"{name} must be [B, T] = {(batch, steps)}; got {tuple(flags.shape)}.{hint}")
        if flags.dtype == torch.bool:
            return flags
        if not torch.compiler.is_compiling() and bool(((flags != 0) & (flags != 1)).any()):
            raise ValueError(f"{name} must hold 0 and 1; got values from {flags.min().item()} to {flags.max().item()}.")
        return flags != 0

    def _check_finite(self, inputs: Tensor, mask: Tensor | None) -> None:
        dtype = self.layers[0].weight_ih.dtype
        wrong = ~inputs.to(dtype).isfinite()
        if mask is not None:
            wrong = wrong & mask.unsqueeze(-1)
        if bool(wrong.any()):
            row, step, column = wrong.nonzero()[0].tolist()
            value = inputs[row, step, column].item()
            shown = f"{value}" if not math.isfinite(value) else f"inf ({value:g} in {str(dtype).split('.')[1]})"
            raise ValueError(
                f"Input holds {shown} at row {row}, step {step}, column {column} "
                f"({int(wrong.sum())} such values in all). Clean the data, or mask the step with attention_mask."
            )

    def _check_state(self, state: SkipRNNState, batch: int) -> SkipRNNState:
        """The state, in the scan's precision."""
        shape = (len(self.layers), batch, self.hidden_size)
        wanted = {"h": shape, "increment": (batch,), "steps_since_update": (batch,)}
        if CELLS[self.cell].has_cell_state:
            wanted["c"] = shape
        got = {name: tuple(part.shape) for name, part in state._asdict().items() if part is not None}
        if got != wanted:
            raise ValueError(f"state must have shapes {wanted}; got {got}. Pass the state that this model returned.")
        dtype = state_dtype(self.layers[0].weight_hh)
        h, c, increment, steps = state
        return SkipRNNState(h.to(dtype), None if c is None else c.to(dtype), increment.to(dtype), steps.to(dtype))


class SkipRNNClassifier(SkipRNNPreTrainedModel):
    """What both heads share: dropout and a linear layer on the top layer's h."""

    per_frame: ClassVar[bool]

    def __init__(self, config: SkipRNNConfig) -> None:
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.skip_rnn = SkipRNNModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        state: SkipRNNState | None = None,
        forced_gates: Tensor | None = None,
        generator: torch.Generator | None = None,
        output_update_gates: bool = False,
        check_inputs: bool = False,
    ) -> SkipRNNClassifierOutput:
        """Classify sequences, or their steps.

        Args:
            input_values: [B, T, input_size]; this and the following: see SkipRNNModel.forward.
            attention_mask: [B, T].
            labels: for sequences [B] classes, [B] or [B, num_labels] numbers, or [B, num_labels] of 0 and 1; for frames
                [B, T] classes or [B, T, num_labels] of 0 and 1. A label of -100 is ignored, but where it is a number.
            input_ids: [B, T].
            pixel_values: [B, C, H, W].
            state: to continue from.
            forced_gates: [B, T].
            generator: draws random gates.
            output_update_gates: return update_gates.
            check_inputs: raise if a real step's input is NaN or infinite.

        Raises:
            ValueError: see SkipRNNModel.forward; labels of a wrong shape, type or range.
        """
        out = self.skip_rnn(
            input_values,
            attention_mask,
            input_ids,
            pixel_values,
            state,
            forced_gates,
            generator,
            output_sequence=self.per_frame,
            output_update_gates=output_update_gates,
            check_inputs=check_inputs,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(out.last_hidden_state if self.per_frame else out.pooler_output))
        task_loss = None if labels is None else self._task_loss(logits, labels, attention_mask)
        return SkipRNNClassifierOutput(
            loss=None if task_loss is None else task_loss + out.budget_loss,
            logits=logits,
            task_loss=task_loss,
            budget_loss=out.budget_loss,
            num_updates=out.num_updates,
            update_gates=out.update_gates,
            state=out.state,
        )

    def _task_loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class SkipRNNForSequenceClassification(SkipRNNClassifier):
    """One label, several labels or numbers for a sequence, from the state after its last real step."""

    per_frame = False

    def _task_loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        problem_type = self.config.problem_type or infer_problem_type(labels, self.num_labels)
        self.config.problem_type = problem_type  # pipelines choose softmax or sigmoid by it
        return sequence_loss(logits, labels, problem_type)


class SkipRNNForFrameClassification(SkipRNNClassifier):
    """One or several labels at every step, from the state that holds there."""

    per_frame = True

    def _task_loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        return frame_loss(logits, labels, None if attention_mask is None else attention_mask != 0)
