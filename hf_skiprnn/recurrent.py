"""SkipLSTM and SkipGRU: layers that replace nn.LSTM and nn.GRU, with the same arguments and return values."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hf_skiprnn.conversion import load_native, native_state
from hf_skiprnn.model.cells_skip_rnn import GATE_GRADIENTS
from hf_skiprnn.model.inputs_skip_rnn import check_state
from hf_skiprnn.model.layers_skip_rnn import SkipStack, init_layer, init_update_gate
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState


class _SkipRecurrent(SkipStack):
    """The base of SkipLSTM and SkipGRU."""

    has_cell_state: ClassVar[bool]
    native: ClassVar[type[nn.RNNBase]]

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
        gate_gradient: str = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bidirectional:
            raise ValueError(
                "bidirectional=True is refused: the gate decides from past steps alone which steps to skip."
            )
        if dropout:
            raise ValueError(
                f"dropout={dropout} is refused: a new mask at every step would change the state at skipped steps. "
                "Apply dropout to the inputs or the output."
            )
        if gate not in ("learned", "always", "random", "strided"):
            raise ValueError(f'gate must be "learned", "always", "random" or "strided"; got {gate!r}.')
        if gate_gradient not in GATE_GRADIENTS:
            raise ValueError(f'gate_gradient must be "sum", "capped" or "mean"; got {gate_gradient!r}.')
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "stride": stride}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if not 0 <= skip_probability < 1:
            raise ValueError(f"skip_probability must be in [0, 1); got {skip_probability}.")
        self.cell, self.gate, self.skip_probability, self.stride = cell, gate, skip_probability, stride
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.forget_bias, self.update_bias, self.gate_gradient = forget_bias, update_bias, gate_gradient
        self._build_stack(input_size, num_layers, bias, learn_initial_state, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters, from the distributions of the authors' code, which differ from nn.LSTM's."""
        for layer in self.layers:
            init_layer(layer, self.forget_bias)
        if self.gate == "learned":
            init_update_gate(self.update_gate, self.update_bias)

    def flatten_parameters(self) -> None:
        """Do nothing: nn.LSTM and nn.GRU have this method for cuDNN, and code that uses them calls it."""

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, gate={self.gate!r}"

    def forward(self, input: Tensor | PackedSequence, hx: Any = None, *, return_updates: bool = False) -> Any:  # noqa: A002 - nn.LSTM's name
        """Return (output, (h_n, c_n)) as nn.LSTM, or (output, h_n) as nn.GRU.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
            hx: (h_0, c_0) or h_0, each [num_layers, B, H] ([num_layers, H] without a batch); default: the learned
                initial state, or zeros. The first step is then always an update.
                To process a sequence in parts, pass a SkipRNNState: `layer.initial_state(B)` for the first part (B = 1
                without a batch), and for each further part the state that the last call returned in place of (h_n,
                c_n) or h_n. Gates and outputs then equal those of the whole sequence. h_n and c_n alone do not hold
                the increment and the steps since the last update, so with them each part starts with an update.
            return_updates: also return (num_updates [B], update_gates [B, T]). Both are differentiable: the budget loss
                is lambda * num_updates.mean(). At the padding of a PackedSequence the gate is 0.

        Raises:
            ValueError: input or hx of another shape or type than above.
        """
        if isinstance(input, PackedSequence):
            padded, lengths = pad_packed_sequence(input, batch_first=True)
            self._check(padded, "a PackedSequence of rows [T, I]")
            mask = torch.arange(padded.shape[1], device=lengths.device) < lengths.unsqueeze(1)
            out, sequence, last = self._run(padded, hx, mask.to(padded.device))
            output: Any = _pack_like(input, sequence, lengths)
            updates = (out.num_updates, out.update_gates)
        elif input.dim() == 2:
            out, sequence, last = self._run(self._as_batch(input), self._map_state(hx, lambda h: h.unsqueeze(1)), None)
            output, last = sequence[0], self._map_state(last, lambda h: h.squeeze(1))
            updates = (out.num_updates[0], out.update_gates[0])
        else:
            out, sequence, last = self._run(self._as_batch(input), hx, None)
            output = sequence if self.batch_first else sequence.transpose(0, 1)
            updates = (out.num_updates, out.update_gates)
        return (output, last, updates) if return_updates else (output, last)

    def _check(self, inputs: Tensor, shape: str) -> None:
        """Raise ValueError if inputs have another number of axes, width or type than the layer takes."""
        if inputs.dim() not in (2, 3) or inputs.shape[-1] != self.input_size:
            raise ValueError(
                f"input must be {shape} with I = {self.input_size}; got {tuple(inputs.shape)}. "
                f"The layer was made with batch_first={self.batch_first}."
            )
        if not inputs.is_floating_point():
            raise ValueError(f"input must be floating point; got {inputs.dtype}. Convert it with .float().")

    def _as_batch(self, inputs: Tensor) -> Tensor:
        """Return the input as [B, T, I]."""
        self._check(inputs, "[T, I], [B, T, I]" if self.batch_first else "[T, I], [T, B, I]")
        batched = inputs.unsqueeze(0) if inputs.dim() == 2 else inputs if self.batch_first else inputs.transpose(0, 1)
        if batched.shape[1] == 0:
            raise ValueError(f"input must have at least one step; got {tuple(inputs.shape)}.")
        return batched

    def _run(self, inputs: Tensor, hx: Any, mask: Tensor | None) -> tuple[ScanOutput, Tensor, Any]:
        """Return the scan's output, its sequence [B, T, H] in the inputs' dtype, and the last state in hx's form."""
        state = self.initial_state(inputs.shape[0])
        if isinstance(hx, SkipRNNState):
            state = check_state(self, hx, inputs.shape[0])
        elif hx is not None:
            self._check_form(hx)
            h, c = hx if self.has_cell_state else (hx, None)
            for name, part in (("h_0", h), ("c_0", c)):
                if part is not None and part.shape != state.h.shape:
                    shape = tuple(state.h.shape)
                    raise ValueError(f"{name} must be [num_layers, B, H] = {shape}; got {tuple(part.shape)}.")
            state = state._replace(h=h.to(state.h.dtype), c=None if c is None else c.to(state.h.dtype))
        out = self.scan(inputs, state, mask, sequence=True)
        assert out.sequence is not None  # because of sequence=True
        sequence = out.sequence.to(inputs.dtype)
        if isinstance(hx, SkipRNNState):
            return out, sequence, out.state
        h, c = out.state.h.to(inputs.dtype), out.state.c
        return out, sequence, h if c is None else (h, c.to(inputs.dtype))

    def _check_form(self, hx: Any) -> None:
        """Raise ValueError if hx is not (h_0, c_0) of an LSTM, or h_0 of a GRU."""
        parts = hx if self.has_cell_state and isinstance(hx, (tuple, list)) else (hx,)
        if len(parts) != 1 + self.has_cell_state or not all(isinstance(part, Tensor) for part in parts):
            wanted = "(h_0, c_0)" if self.has_cell_state else "h_0"
            got = f"({', '.join(type(part).__name__ for part in hx)})" if isinstance(hx, tuple) else type(hx).__name__
            raise ValueError(f"hx must be {wanted} or a SkipRNNState; got {got}.")

    def _map_state(self, hx: Any, function: Callable[[Tensor], Tensor]) -> Any:
        """Apply `function` to h or to (h, c). None and a SkipRNNState, which always has a batch, stay as they are."""
        if hx is None or isinstance(hx, SkipRNNState):
            return hx
        self._check_form(hx)
        return tuple(function(part) for part in hx) if self.has_cell_state else function(hx)

    @classmethod
    def from_native(cls, native: nn.RNNBase, **gate_options: Any) -> Self:
        """Return a layer with the weights of an nn.LSTM or nn.GRU; with gate="always" it computes the same function.

        Raises:
            ValueError: `native` is bidirectional, has dropout or projections, or is the other kind of layer; or
                gru_reset="before" was passed, which nn.GRU does not compute.
        """
        names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
        names += ["proj_size"] * (native.proj_size > 0)  # SkipLSTM accepts the argument only to refuse it with a reason
        weight = native.weight_ih_l0
        arguments = {name: getattr(native, name) for name in names} | {"device": weight.device, "dtype": weight.dtype}
        layer = cls(**arguments, **gate_options)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if native.bias else 2]
        found = [f"{kind}_l{index}" for index in range(native.num_layers) for kind in kinds]
        load_native(layer, {name: getattr(native, name) for name in found})  # getattr: a weight may be parametrised
        return layer

    def to_native(self) -> nn.RNNBase:
        """Return an nn.LSTM or nn.GRU that computes the same as this layer with gate="always".

        Raises:
            ValueError: the gate may skip, the initial state is learned, or the reset gate acts before the product;
                nn.LSTM and nn.GRU can do none of these.
        """
        state, weight = native_state(self), self.layers[0].weight_ih
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first")
        arguments = {name: getattr(self, name) for name in names} | {"device": weight.device, "dtype": weight.dtype}
        native = self.native(**arguments)
        native.load_state_dict(state)
        return native


def _pack_like(packed: PackedSequence, padded: Tensor, lengths: Tensor) -> PackedSequence:
    """Return padded outputs [B, T, H] packed in the order of `packed`."""
    if packed.sorted_indices is not None:
        padded, lengths = padded[packed.sorted_indices], lengths[packed.sorted_indices.cpu()]
    data = pack_padded_sequence(padded, lengths, batch_first=True).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


class SkipLSTM(_SkipRecurrent):
    """A Skip LSTM that replaces nn.LSTM, with the same arguments, defaults and return value.

    It also takes the gate's options (see SkipRNNConfig). Differences: parameters are initialised as in the paper;
    `bidirectional`, `proj_size` and `dropout` are refused; `forward` also accepts `return_updates` and a SkipRNNState.
    """

    has_cell_state = True
    native = nn.LSTM

    def __init__(self, *args: Any, proj_size: int = 0, **kwargs: Any) -> None:
        if proj_size:
            raise ValueError(
                f"proj_size={proj_size} is refused: no backend has projections. Put nn.Linear behind the layer."
            )
        super().__init__("lstm", *args, **kwargs)


class SkipGRU(_SkipRecurrent):
    """A Skip GRU that replaces nn.GRU; see SkipLSTM.

    gru_reset: "after" the product by default, as in nn.GRU; "before" gives the paper's GRU.
    """

    has_cell_state = False
    native = nn.GRU

    def __init__(self, *args: Any, gru_reset: str = "after", **kwargs: Any) -> None:
        if gru_reset not in ("before", "after"):
            raise ValueError(f'gru_reset must be "before" or "after"; got {gru_reset!r}.')
        super().__init__("gru" if gru_reset == "before" else "gru_reset_after", *args, **kwargs)
