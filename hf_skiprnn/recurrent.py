"""SkipLSTM and SkipGRU: where nn.LSTM and nn.GRU stand, with the same arguments and return values."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hf_skiprnn.model.layers_skip_rnn import SkipStack, init_layer, init_update_gate
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput


class _SkipRecurrent(SkipStack):
    """What SkipLSTM and SkipGRU share."""

    has_cell_state: ClassVar[bool]

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        gate: str = "learned",
        skip_probability: float = 0.5,
        stride: int = 2,
        learn_initial_state: bool = False,
        update_bias: float = 1.0,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bidirectional:
            raise ValueError(
                "bidirectional=True is refused: the gate decides from the past which steps are never read."
            )
        if dropout:
            raise ValueError(
                f"dropout={dropout} is refused: a new mask at every step would change the state that is held. "
                "Apply dropout to the inputs or the output."
            )
        if gate not in ("learned", "always", "random", "strided"):
            raise ValueError(f'gate must be "learned", "always", "random" or "strided"; got {gate!r}.')
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "stride": stride}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if not 0 <= skip_probability < 1:
            raise ValueError(f"skip_probability must be in [0, 1); got {skip_probability}.")
        self.cell, self.gate, self.skip_probability, self.stride = cell, gate, skip_probability, stride
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.forget_bias, self.update_bias = forget_bias, update_bias
        self._build_stack(input_size, num_layers, bias, learn_initial_state, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the authors' code does (not torch's uniform)."""
        for layer in self.layers:
            init_layer(layer, self.forget_bias)
        if self.gate == "learned":
            init_update_gate(self.update_gate, self.update_bias)

    def flatten_parameters(self) -> None:
        """Does nothing; nn.LSTM and nn.GRU have it for cuDNN, and code that uses them calls it."""

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, gate={self.gate!r}"

    def forward(self, input: Tensor | PackedSequence, hx: Any = None, *, return_updates: bool = False) -> Any:  # noqa: A002 - nn.LSTM's name
        """As nn.LSTM / nn.GRU: (output, (h_n, c_n)) or (output, h_n).

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
            hx: (h_0, c_0) or h_0, [num_layers, B, H] ([num_layers, H] without a batch); default: the learned initial
                state, or zeros. The first step is always an update.
            return_updates: also return (num_updates [B], update_gates [B, T]), differentiable, so that lambda times
                num_updates.mean() is the budget loss. Padding of a PackedSequence has gate 0.

        Raises:
            ValueError: input or hx of another shape than above.
        """
        if isinstance(input, PackedSequence):
            padded, lengths = pad_packed_sequence(input, batch_first=True)
            mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
            out, sequence, last = self._run(padded, hx, mask.to(padded.device))
            output: Any = _pack_like(input, sequence, lengths)
            updates = (out.num_updates, out.update_gates)
        elif input.dim() == 2:
            hx = None if hx is None else self._map_state(hx, lambda part: part.unsqueeze(1))
            out, sequence, last = self._run(self._as_batch(input), hx, None)
            output, last = sequence[0], self._map_state(last, lambda part: part.squeeze(1))
            updates = (out.num_updates[0], out.update_gates[0])
        else:
            out, sequence, last = self._run(self._as_batch(input), hx, None)
            output = sequence if self.batch_first else sequence.transpose(0, 1)
            updates = (out.num_updates, out.update_gates)
        return (output, last, updates) if return_updates else (output, last)

    def _as_batch(self, inputs: Tensor) -> Tensor:
        """[B, T, I] of whatever came."""
        shape = "[T, I], [B, T, I]" if self.batch_first else "[T, I], [T, B, I]"
        if inputs.dim() not in (2, 3) or inputs.shape[-1] != self.input_size:
            raise ValueError(
                f"input must be {shape} with I = {self.input_size}; got {tuple(inputs.shape)}. "
                f"Layers made with batch_first={self.batch_first}."
            )
        if not inputs.is_floating_point():
            raise ValueError(f"input must be floating point; got {inputs.dtype}. Convert it with .float().")
        batched = inputs.unsqueeze(0) if inputs.dim() == 2 else inputs if self.batch_first else inputs.transpose(0, 1)
        if batched.shape[1] == 0:
            raise ValueError(f"input must have at least one step; got {tuple(inputs.shape)}.")
        return batched

    def _run(self, inputs: Tensor, hx: Any, mask: Tensor | None) -> tuple[ScanOutput, Tensor, Any]:
        """The scan's output; its sequence [B, T, H] and (h_n, c_n) or h_n in the inputs' precision."""
        state = self.initial_state(inputs.shape[0])
        if hx is not None:
            h, c = hx if self.has_cell_state else (hx, None)
            for name, part in (("h_0", h), ("c_0", c)):
                if part is not None and part.shape != state.h.shape:
                    shape = tuple(state.h.shape)
                    raise ValueError(f"{name} must be [num_layers, B, H] = {shape}; got {tuple(part.shape)}.")
            state = state._replace(h=h.to(state.h.dtype), c=None if c is None else c.to(state.h.dtype))
        out = self.scan(inputs, state, mask, sequence=True)
        assert out.sequence is not None  # asked for
        h, c = out.state.h.to(inputs.dtype), out.state.c
        return out, out.sequence.to(inputs.dtype), h if c is None else (h, c.to(inputs.dtype))

    def _arguments_for_native(self) -> dict[str, Any]:
        if self.gate != "always":
            raise ValueError(
                f"gate={self.gate!r} may skip, which {type(self).__name__[4:]} cannot; needs gate='always'."
            )
        if self.layers[0].initial_h is not None:
            raise ValueError("A learned initial state has no place in the native layer; pass it as hx instead.")
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first")
        weight = self.layers[0].weight_ih
        return {name: getattr(self, name) for name in names} | {"device": weight.device, "dtype": weight.dtype}

    def _map_state(self, hx: Any, fn: Callable[[Tensor], Tensor]) -> Any:
        return tuple(fn(part) for part in hx) if self.has_cell_state else fn(hx)


def _pack_like(packed: PackedSequence, padded: Tensor, lengths: Tensor) -> PackedSequence:
    """Pack padded [B, T, H] in the order of `packed`."""
    if packed.sorted_indices is not None:
        padded, lengths = padded[packed.sorted_indices], lengths[packed.sorted_indices.cpu()]
    data = pack_padded_sequence(padded, lengths, batch_first=True).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def _native_arguments(native: nn.RNNBase) -> dict[str, Any]:
    """Constructor arguments of nn.LSTM / nn.GRU, their device and dtype."""
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    weight = native.weight_ih_l0
    return {name: getattr(native, name) for name in names} | {"device": weight.device, "dtype": weight.dtype}


class SkipLSTM(_SkipRecurrent):
    """A Skip LSTM where nn.LSTM stands.

    Same arguments, defaults and return value, plus the gate's options (see SkipRNNConfig). Differences: parameters are
    drawn as in the paper; `bidirectional`, `proj_size` and `dropout` are refused; `return_updates=True` in forward.
    """

    has_cell_state = True

    def __init__(self, *args: Any, proj_size: int = 0, **kwargs: Any) -> None:
        if proj_size:
            raise ValueError(
                f"proj_size={proj_size} is refused: no backend has projections. Put nn.Linear behind the layer."
            )
        super().__init__("lstm", *args, **kwargs)

    @classmethod
    @torch.no_grad()
    def from_native(cls, native: nn.LSTM, **gate_options: Any) -> Self:
        """A SkipLSTM with the weights of `native` (its two biases added); equal to it with gate="always".

        Raises:
            ValueError: `native` is bidirectional, or has projections or dropout.
        """
        layer = cls(**_native_arguments(native), proj_size=native.proj_size, **gate_options)
        for index, mine in enumerate(layer.layers):
            mine.weight_ih.copy_(getattr(native, f"weight_ih_l{index}"))
            mine.weight_hh.copy_(getattr(native, f"weight_hh_l{index}"))
            if mine.bias is not None:
                mine.bias.copy_(getattr(native, f"bias_ih_l{index}") + getattr(native, f"bias_hh_l{index}"))
        return layer

    @torch.no_grad()
    def to_native(self) -> nn.LSTM:
        """An nn.LSTM with these weights: the same function where the gate is always open.

        Raises:
            ValueError: the gate may skip, or the initial state is learned: nn.LSTM has neither.
        """
        native = nn.LSTM(**self._arguments_for_native())
        for index, mine in enumerate(self.layers):
            getattr(native, f"weight_ih_l{index}").copy_(mine.weight_ih)
            getattr(native, f"weight_hh_l{index}").copy_(mine.weight_hh)
            if mine.bias is not None:
                getattr(native, f"bias_ih_l{index}").copy_(mine.bias)
                getattr(native, f"bias_hh_l{index}").zero_()
        return native


class SkipGRU(_SkipRecurrent):
    """A Skip GRU where nn.GRU stands.

    As SkipLSTM. `gru_reset` is "after" the product here, as in nn.GRU; "before" gives the paper's GRU.
    """

    has_cell_state = False

    def __init__(self, *args: Any, gru_reset: str = "after", **kwargs: Any) -> None:
        if gru_reset not in ("before", "after"):
            raise ValueError(f'gru_reset must be "before" or "after"; got {gru_reset!r}.')
        super().__init__("gru" if gru_reset == "before" else "gru_reset_after", *args, **kwargs)

    @classmethod
    @torch.no_grad()
    def from_native(cls, native: nn.GRU, **gate_options: Any) -> Self:
        """A SkipGRU with the weights of `native`; equal to it with gate="always".

        Raises:
            ValueError: `native` is bidirectional or has dropout, or gru_reset="before" is asked for.
        """
        layer = cls(**_native_arguments(native), **gate_options)
        layer._check_reset()
        for index, mine in enumerate(layer.layers):
            mine.weight_ih.copy_(getattr(native, f"weight_ih_l{index}"))
            mine.weight_hh.copy_(getattr(native, f"weight_hh_l{index}"))
            if mine.bias is not None and mine.bias_hh_n is not None:
                hidden = getattr(native, f"bias_hh_l{index}").clone()
                mine.bias_hh_n.copy_(hidden[2 * native.hidden_size :])
                hidden[2 * native.hidden_size :] = 0
                mine.bias.copy_(getattr(native, f"bias_ih_l{index}") + hidden)
        return layer

    @torch.no_grad()
    def to_native(self) -> nn.GRU:
        """An nn.GRU with these weights: the same function where the gate is always open.

        Raises:
            ValueError: the gate may skip, the initial state is learned, or the reset gate acts before the product.
        """
        self._check_reset()
        native = nn.GRU(**self._arguments_for_native())
        for index, mine in enumerate(self.layers):
            getattr(native, f"weight_ih_l{index}").copy_(mine.weight_ih)
            getattr(native, f"weight_hh_l{index}").copy_(mine.weight_hh)
            if mine.bias is not None:
                getattr(native, f"bias_ih_l{index}").copy_(mine.bias)
                getattr(native, f"bias_hh_l{index}").zero_()[2 * self.hidden_size :] = mine.bias_hh_n
        return native

    def _check_reset(self) -> None:
        if self.cell == "gru":
            raise ValueError(
                "nn.GRU resets after the product: weights of gru_reset='before' mean another function there."
            )
