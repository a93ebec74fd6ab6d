"""The transformers models: SkipRNNModel, and classifiers of sequences and of steps on top of it."""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .changed_modules_skip_rnn import is_table
from .checkpoint_skip_rnn import name_code, refuse_broken_numbers, refuse_foreign_weights
from .configuration_skip_rnn import SkipRNNConfig
from .inputs_skip_rnn import (
    check_finite,
    check_flags,
    check_state,
    check_tokens,
    select_input,
    warn_of_budget,
    warn_of_padding,
)
from .layers_skip_rnn import SkipRNNLayer, SkipStack, UpdateGate, init_layer, init_update_gate
from .losses_skip_rnn import budget_of, frame_loss, infer_problem_type, sequence_loss
from .operating_point_skip_rnn import Shift, row_shifts
from .outputs_skip_rnn import SkipRNNClassifierOutput, SkipRNNModelOutput, SkipRNNState
from .pull_skip_rnn import Fetch, pull
from .push_skip_rnn import Stream, StreamBatch, stream


class SkipRNNPreTrainedModel(PreTrainedModel):
    """The base of all Skip RNN models: loading, saving, initial weights, and the choice of backend and budget."""

    config: SkipRNNConfig
    base_model_prefix = "skip_rnn"
    main_input_name = "input_values"
    # The loss is a mean over rows, so a Trainer must divide it by the accumulation steps and not by a count of items.
    accepts_loss_kwargs = False
    _no_split_modules = ["SkipRNNModel"]  # noqa: RUF012 - transformers' own form
    _keep_in_fp32_modules_strict = ["update_gate"]  # noqa: RUF012 - likewise

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
        """Load a model as PreTrainedModel.from_pretrained does, but only from safetensors files: they hold no code.

        Raises:
            ValueError: weights do not fit the config, or are not finite; the message names them.
            OSError: there is no weights file, or it is cut off or of another kind.
        """
        kwargs.setdefault("use_safetensors", True)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights of {pretrained_model_name_or_path} are no whole safetensors file ({error}): they are "
                "cut off, or of another kind. Get the checkpoint again, or save it again with save_pretrained."
            ) from error

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        source = load_config.pretrained_model_name_or_path
        refuse_foreign_weights(source, loading_info, load_config.ignore_mismatched_sizes)
        info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        refuse_broken_numbers(source, model)
        return info

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save a model as PreTrainedModel.save_pretrained does, with its code and its Auto classes and pipelines."""
        name_code(self.config, type(self).__name__)
        super().save_pretrained(*args, **kwargs)

    def set_scan_backend(self, backend: str) -> None:
        """Choose the scan: "auto", "dense", "events", "cpu" or "triton"; see SkipStack.set_scan_backend."""
        SkipStack.set_scan_backend(cast(SkipStack, self.base_model), backend)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the token embeddings as PreTrainedModel.resize_token_embeddings does.

        Raises:
            ValueError: the model takes numbers.
        """
        if self.config.vocab_size is None:
            raise ValueError("There are no token embeddings to resize: the model takes numbers, vocab_size is None.")
        return super().resize_token_embeddings(*args, **kwargs)

    def set_gate_shift(self, shift: float) -> None:
        """Make a trained model read more or fewer steps, and save that with it: sets `config.gate_shift`."""
        SkipStack.set_gate_shift(cast(SkipStack, self.base_model), shift)

    def pull(self, fetch: Fetch, length: int | Sequence[int] | None = None, **options: Any) -> Any:
        """Run sequences of which only the steps that the model reads are fetched; see pull_skip_rnn.pull."""
        return pull(self, fetch, length, **options)

    def stream(self, batch_size: int | None = None, **options: Any) -> Stream | StreamBatch:
        """Run a sequence whose steps arrive one by one; see push_skip_rnn.stream."""
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

    @property
    def gate_gradient(self) -> str:  # type: ignore[override]  # the config holds it, since a callback changes it
        return self.config.gate_gradient

    @property
    def _gate_shift(self) -> float:  # the config holds it, so that it is saved
        return self.config.gate_shift

    @_gate_shift.setter
    def _gate_shift(self, shift: float) -> None:
        self.config.gate_shift = shift

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]  # transformers always has one
        """Return the token embeddings [vocab_size, input_size], or None without vocab_size, as accelerate expects."""
        return None if self.config.vocab_size is None else self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.embeddings = cast(nn.Embedding, value)

    @can_return_tuple  # type: ignore[untyped-decorator]  # transformers has no types here
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
        gate_shift: Shift | None = None,
        update_rate: Shift | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SkipRNNModelOutput:
        """Run the sequences through the stack.

        Args:
            input_values: [B, T, input_size] floating point, cast to the weights' precision. T = 0 returns the initial
                state. Where the config has vocab_size, integers [B, T] in this place are input_ids.
            attention_mask: [B, T], 1 at real steps and 0 at masked ones, in any pattern. The result is the same as if
                masked steps were cut out.
            input_ids: [B, T] integers, instead of input_values where the config has vocab_size.
            pixel_values: [B, C, H, W] floating point with C = input_size, instead of input_values: T = H*W, row by row.
            state: SkipRNNState to continue from; default: the initial state.
            forced_gates: [B, T], gates to take instead of computed ones.
            generator: draws the gates of gate="random"; default: torch's global one.
            output_sequence: return last_hidden_state; False saves its memory.
            output_update_gates: return update_gates.
            check_inputs: raise if a real step's input is NaN or infinite. Otherwise such a step is read, and the output
                shows it.
            gate_shift: number, or [B] numbers: each row's shift of the gate, instead of `config.gate_shift`.
            update_rate: number, or [B] numbers: the share of steps that each row shall read, on average over rows like
                those of `config.gate_calibration`, which it needs.
            inputs_embeds: [B, T, input_size] floating point, instead of input_ids: what the embeddings would return.
            token_type_ids: ignored; BERT's tokenizers return them.
            output_hidden_states: return hidden_states; default: `config.output_hidden_states`.
            output_attentions: must not be True, since there are none.

        Raises:
            ValueError: inputs, mask, gates or state of a wrong shape, type or value; the message says which.
        """
        if output_attentions:
            raise ValueError("output_attentions=True: a Skip RNN has no attentions. See output_update_gates.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        name, inputs = select_input(self.config, input_values, input_ids, pixel_values, inputs_embeds)
        if name == "input_ids":
            inputs = self._embed(inputs, attention_mask is not None, as_vectors=bool(output_hidden_states))
        elif name == "inputs_embeds" and self.config.vocab_size is not None:
            inputs = self.embedding_dropout(inputs)
        batch, steps = inputs.shape[:2]
        mask = check_flags("attention_mask", attention_mask, batch, steps)
        if check_inputs and inputs.is_floating_point():
            check_finite(inputs, mask, self.current_weight().dtype)
        if self.training and self.config.input_noise:
            inputs = inputs + self.config.input_noise * torch.randn_like(inputs)
        forced = check_flags("forced_gates", forced_gates, batch, steps)
        state = self.initial_state(batch) if state is None else check_state(self, state, batch)
        table = None if inputs.is_floating_point() else self.embeddings.weight
        shift, noise = row_shifts(
            self.config, batch, state.increment, gate_shift, update_rate, self.training, generator
        )
        sequence = output_sequence or bool(output_hidden_states)
        out = self.scan(inputs, state, mask, forced, sequence, generator, table, shift)
        lengths = out.num_updates.new_full((batch,), steps) if mask is None else mask.sum(1)
        dtype = self.current_weight().dtype
        last = None if out.sequence is None else out.sequence.to(dtype)
        hidden_states = None
        if output_hidden_states:
            hidden_states = (inputs, *self.layer_sequences(inputs, state, mask, out.update_gates), cast(Tensor, last))
        return SkipRNNModelOutput(
            last_hidden_state=last if output_sequence else None,
            pooler_output=out.state.h[-1].to(dtype),
            state=out.state,
            num_updates=out.num_updates,
            update_gates=out.update_gates if output_update_gates else None,
            budget_loss=budget_of(self.config, out.num_updates, lengths, noise),
            hidden_states=hidden_states,
            gate_noise=noise,
        )

    def _embed(self, input_ids: Tensor, has_mask: bool, as_vectors: bool) -> Tensor:
        """Return the embeddings [B, T, input_size] of tokens [B, T].

        In inference return the tokens, for `SkipStack.scan`, unless vectors are wanted or the embeddings must be
        called since a tool has changed them.
        """
        table = self.embeddings
        vocab_size: Any = getattr(table, "num_embeddings", None) or self.config.vocab_size
        check_tokens(input_ids, vocab_size)
        if not has_mask:
            warn_of_padding(input_ids, self.config.pad_token_id)
        if not as_vectors and not torch.is_grad_enabled() and not self.training and is_table(table):
            return input_ids.long()
        return self.embedding_dropout(table(input_ids))

    def embed_step(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [N, input_size] of one step's tokens [N], without gradients; ids are not checked."""
        if is_table(self.embeddings):
            return nn.functional.embedding(input_ids, self.embeddings.weight.detach())
        with torch.no_grad():
            return self.embeddings(input_ids.unsqueeze(0)).squeeze(0)


class SkipRNNClassifier(SkipRNNPreTrainedModel):
    """The base of both classifiers: dropout and a linear layer on the top layer's h."""

    per_frame: ClassVar[bool]

    def __init__(self, config: SkipRNNConfig) -> None:
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.skip_rnn = SkipRNNModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]  # transformers has no types here
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
        gate_shift: Shift | None = None,
        update_rate: Shift | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SkipRNNClassifierOutput:
        """Classify sequences, or their steps.

        Args:
            input_values: [B, T, input_size]; this and the following: see SkipRNNModel.forward.
            attention_mask: [B, T].
            labels: for sequences [B] classes, [B] or [B, num_labels] numbers, or [B, num_labels] of 0 and 1; for frames
                [B, T] classes or [B, T, num_labels] of 0 and 1. A label of -100 is ignored, except in regression.
            input_ids: [B, T].
            pixel_values: [B, C, H, W].
            state: SkipRNNState to continue from.
            forced_gates: [B, T], gates to take.
            generator: draws the gates of gate="random".
            output_update_gates: return update_gates.
            check_inputs: raise if a real step's input is NaN or infinite.
            gate_shift: number or [B].
            update_rate: number or [B].
            inputs_embeds: [B, T, input_size].
            token_type_ids: ignored.
            output_hidden_states: return hidden_states.
            output_attentions: must not be True.

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
            gate_shift=gate_shift,
            update_rate=update_rate,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(out.last_hidden_state if self.per_frame else out.pooler_output))
        task_loss = None if labels is None else self._task_loss(logits, labels, attention_mask)
        if labels is None and self.training and logits.requires_grad and self.config.budget_weight:
            warn_of_budget()
        return SkipRNNClassifierOutput(
            loss=None if task_loss is None else task_loss + out.budget_loss,
            logits=logits,
            task_loss=task_loss,
            budget_loss=out.budget_loss,
            num_updates=out.num_updates,
            update_gates=out.update_gates,
            state=out.state,
            hidden_states=out.hidden_states,
        )

    def _task_loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class SkipRNNForSequenceClassification(SkipRNNClassifier):
    """A classifier (or regression) of whole sequences, from the state after the last real step."""

    per_frame = False

    def _task_loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        problem_type = self.config.problem_type or infer_problem_type(labels, self.num_labels)
        self.config.problem_type = problem_type  # pipelines choose softmax or sigmoid by it
        return sequence_loss(logits, labels, problem_type)


class SkipRNNForFrameClassification(SkipRNNClassifier):
    """A classifier of every step (frame), from the state at that step."""

    per_frame = True

    def _task_loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        return frame_loss(logits, labels, None if attention_mask is None else attention_mask != 0)
