"""The parameters of a stack of layers under one shared gate, their initial values, and the scan over them."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .cells_skip_rnn import CELLS, GATE_GRADIENTS, GateWeights, LayerWeights, state_dtype
from .changed_modules_skip_rnn import PLAIN_TENSORS, is_plain, linear_map
from .dense_scan_skip_rnn import DENSE, Engine
from .event_scan_skip_rnn import EVENTS
from .outputs_skip_rnn import ScanOutput, SkipRNNState

SCAN_BACKENDS = ("auto", "dense", "events", "cpu", "triton")
HALF = (torch.float16, torch.bfloat16)
PLAIN = {engine.name: engine for engine in (DENSE, EVENTS)}


def select_engine(backend: str, inputs: Tensor, num_weights: int) -> Engine:
    """Return the engine of that name, or with "auto" the fastest one for these inputs here.

    Args:
        backend: one of SCAN_BACKENDS.
        inputs: [B, T, I], or token ids [B, T].
        num_weights: how many numbers the layers' matrices hold.

    Raises:
        RuntimeError: a named engine cannot run here; the message says why and what to do.
    """
    if backend in PLAIN:
        return PLAIN[backend]
    try:  # checkpoints hold a copy of this file, which also runs where the package is not installed
        from hf_skiprnn.kernels import choose_engine
    except ImportError as error:
        if backend == "auto":
            return EVENTS
        raise RuntimeError(
            f"Scan backend {backend!r} needs the hf_skiprnn package: pip install hf_skiprnn. "
            "Or use 'events', which runs anywhere."
        ) from error
    return choose_engine(backend, inputs, num_weights)


def plan_gates(
    gate: str,
    state: SkipRNNState,
    mask: Tensor | None,
    shape: torch.Size,
    skip_probability: float,
    stride: int,
    generator: torch.Generator | None,
) -> Tensor | None:
    """Return the gates of the baselines "random" and "strided" [B, T] bool, which need no scan; otherwise None.

    A row's gates depend on a step's index among its real steps, so padding does not move them. A fresh row reads its
    first real step.
    """
    if gate not in ("random", "strided"):
        return None
    device = state.increment.device
    real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
    index = real.cumsum(1) - 1
    fresh = (state.increment == 1).unsqueeze(1)
    if gate == "strided":
        before = torch.where(fresh, stride - 1, state.steps_since_update.long().unsqueeze(1))
        return (before + index + 1) % stride == 0
    draws = torch.rand(shape, generator=generator, device=generator.device if generator else device).to(device)
    return (draws >= skip_probability).gather(1, index.clamp(min=0)) | (fresh & (index == 0))


def own_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast: gates are decided in the state's precision.

    Entering autocast takes time, as much as a tenth of a short scan, so it is only entered where it is on.
    """
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


class UpdateGate(nn.Linear):
    """The update gate's linear layer (eq. 4). It stays in float32 in half-precision models, since gates need it."""

    def __init__(self, hidden_size: int, **factory: Any) -> None:
        super().__init__(hidden_size, 1, **factory)
        if self.weight.dtype in HALF:
            self.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device, torch.float32) if moved.dtype in HALF else moved

        return super()._apply(keep_precision, recurse)


class LayerParameters(NamedTuple):
    """The parameters of one layer, as a SkipRNNLayer holds them and under the same names."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    bias_hh_n: Tensor | None
    initial_h: Tensor | None
    initial_c: Tensor | None


class SkipRNNLayer(nn.Module):
    """The parameters of one layer. A scan runs all layers of a stack together, so forward only returns them."""

    def __init__(
        self, cell: str, input_size: int, hidden_size: int, bias: bool, learn_initial_state: bool, **factory: Any
    ) -> None:
        super().__init__()
        rows = CELLS[cell].num_gates * hidden_size
        self.cell = cell
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, **factory))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(rows, **factory)) if bias else None
        after = bias and cell == "gru_reset_after"
        self.bias_hh_n = nn.Parameter(torch.empty(hidden_size, **factory)) if after else None
        self.initial_h = nn.Parameter(torch.empty(hidden_size, **factory)) if learn_initial_state else None
        has_c = learn_initial_state and CELLS[cell].has_cell_state
        self.initial_c = nn.Parameter(torch.empty(hidden_size, **factory)) if has_c else None

    def forward(self, _: None = None) -> tuple[Tensor | None, ...]:
        """Return copies of the parameters, in the order of LayerParameters; only a changed layer is called.

        Tools that change a module act when it is called: hooks of pruning, offloading and FSDP, adapters of peft. Some
        of them free the parameters after the call, so these are copies. (The argument: peft passes one.)
        """
        values = (getattr(self, name) for name in LayerParameters._fields)
        return tuple(None if value is None else value.clone() for value in values)


def layer_weights(layer: SkipRNNLayer | LayerParameters, dtype: torch.dtype | None = None) -> LayerWeights:
    """Return a layer's weights for a scan, cast to `dtype` if it is given (autocast)."""
    w = LayerWeights(layer.weight_ih, layer.weight_hh, layer.bias, layer.bias_hh_n)
    if dtype is None:
        return w
    return LayerWeights(w.weight_ih.to(dtype), w.weight_hh.to(dtype), *(b if b is None else b.to(dtype) for b in w[2:]))


class SkipStack(nn.Module):
    """A stack of layers under one shared gate, and the scan over it: the base of SkipRNNModel, SkipLSTM and SkipGRU."""

    layers: Sequence[SkipRNNLayer]  # an nn.ModuleList, bottom layer first
    cell: str
    gate: str
    hidden_size: int
    skip_probability: float
    stride: int
    _scan_backend: str | None = None
    _gate_shift: float = 0.0
    gate_gradient: str = "sum"  # "capped" or "mean"; see SkipRNNConfig

    def _build_stack(
        self, input_size: int, num_layers: int, bias: bool, learn_initial_state: bool, **factory: Any
    ) -> None:
        widths = [input_size] + [self.hidden_size] * (num_layers - 1)
        layers = nn.ModuleList(
            SkipRNNLayer(self.cell, width, self.hidden_size, bias, learn_initial_state, **factory) for width in widths
        )
        self.layers = cast("Sequence[SkipRNNLayer]", layers)
        if self.gate == "learned":
            self.update_gate = UpdateGate(self.hidden_size, **factory)

    def set_scan_backend(self, backend: str) -> None:
        """Choose the scan: "auto", "dense", "events", "cpu" or "triton". HF_SKIPRNN_BACKEND sets the default.

        Raises:
            ValueError: no such backend. One that cannot run here raises RuntimeError at its first use.
        """
        if backend not in SCAN_BACKENDS:
            raise ValueError(f"Scan backend must be one of {', '.join(SCAN_BACKENDS)}; got {backend!r}.")
        self._scan_backend = backend

    def set_gate_shift(self, shift: float) -> None:
        """Add `shift` to the update gate's bias at run time: below 0 fewer updates, above 0 more.

        D = sigmoid(W_p s + b_p + shift), so that one trained model serves several budgets. Limits: the first real step
        is always read. The share of steps read changes in jumps, since intervals are whole numbers of steps, and hardly
        changes where D is close to 0 or 1. The model was trained at shift 0 and loses accuracy away from it: on MNIST
        one point at -0.1 and ten at +-0.25, on IMDB two points at -0.5. SkipRNNModel keeps the
        shift in its config, so it is saved; the state dict of a SkipLSTM or SkipGRU does not hold it.

        Raises:
            ValueError: the gate is not learned, or the shift is not a finite number.
        """
        if self.gate != "learned":
            raise ValueError(f"set_gate_shift needs gate='learned'; this model has gate={self.gate!r}.")
        if not math.isfinite(shift):
            raise ValueError(f"The gate's shift must be a finite number; got {shift}.")
        self._gate_shift = float(shift)

    def current_layers(self) -> list[SkipRNNLayer | LayerParameters]:
        """Return the layers as they are now: a plain one itself, of a changed one the parameters it returns.

        A changed layer has hooks (pruning, offloading), is wrapped (peft), parametrised or sharded: what it computes is
        known only from a call; see `changed_modules_skip_rnn`.
        """
        return [
            layer if is_plain(layer, SkipRNNLayer) else LayerParameters(*cast(nn.Module, layer)(None))
            for layer in self.layers
        ]

    def current_weight(self) -> Tensor:
        """Return the lowest layer's weight_hh as it is now, whose device and precision are those of the stack."""
        layer = self.layers[0]
        return layer.weight_hh if is_plain(layer, SkipRNNLayer) else self.current_layers()[0].weight_hh

    def gate_weights(self, shift: Tensor | None = None) -> GateWeights | None:
        """Return the update gate in force, or None where nothing is learned.

        A changed gate (LoRA, a hook, a quantised weight) is called to find out what it computes now.

        Args:
            shift: [B], each row's shift, instead of the one that `set_gate_shift` set for all rows.

        Raises:
            ValueError: the gate was replaced by a module that is not linear.
        """
        if self.gate != "learned":
            return None
        gate = self.update_gate
        weight: Tensor | None = gate.weight if is_plain(gate, UpdateGate) else None
        if weight is not None and type(weight) in PLAIN_TENSORS:
            bias: Tensor = gate.bias
        else:
            like = self.current_weight()
            weight, bias = linear_map("update_gate", gate, self.hidden_size, like.device, state_dtype(like))
        if shift is None and self._gate_shift:
            bias = bias + self._gate_shift
        return GateWeights(weight, bias, shift, GATE_GRADIENTS[self.gate_gradient])

    @property
    def scan_backend(self) -> str:
        """The backend in use: the chosen one, or HF_SKIPRNN_BACKEND, or "auto"."""
        backend = self._scan_backend or os.environ.get("HF_SKIPRNN_BACKEND", "auto")
        if backend not in SCAN_BACKENDS:
            raise ValueError(f"HF_SKIPRNN_BACKEND must be one of {', '.join(SCAN_BACKENDS)}; got {backend!r}.")
        return backend

    def initial_state(self, batch_size: int) -> SkipRNNState:
        """Return the state before the first step, learned or zero; its increment of 1 makes step 1 an update.

        Raises:
            ValueError: the weights are sparse.
        """
        layers = self.current_layers()
        weight = layers[0].weight_hh
        if weight.layout != torch.strided:
            raise ValueError(f"weight_hh must be a dense tensor; got {weight.layout}. Convert it with to_dense().")
        dtype = state_dtype(weight)

        def stack(name: str) -> Tensor:
            parts = [getattr(layer, name) for layer in layers]
            if parts[0] is None:  # all layers are alike
                return weight.new_zeros((len(layers), batch_size, self.hidden_size), dtype=dtype)
            return torch.stack([part.to(dtype).expand(batch_size, -1) for part in parts])

        c = stack("initial_c") if CELLS[self.cell].has_cell_state else None
        increment = weight.new_ones(batch_size, dtype=dtype)
        return SkipRNNState(stack("initial_h"), c, increment, torch.zeros_like(increment))

    def scan(
        self,
        inputs: Tensor,
        state: SkipRNNState,
        mask: Tensor | None = None,
        forced_gates: Tensor | None = None,
        sequence: bool = False,
        generator: torch.Generator | None = None,
        table: Tensor | None = None,
        gate_shift: Tensor | None = None,
    ) -> ScanOutput:
        """Run the stack over inputs [B, T, input_size] from `state`.

        With a table of embeddings [V, input_size], which is for inference, inputs are token ids [B, T]: the native
        engine then looks up only the tokens that are read. `gate_shift` [B] is each row's shift of the gate. T = 0
        returns `state`.

        Raises:
            ValueError: inputs are on the device 'meta'.
        """
        if inputs.device.type == "meta":
            raise ValueError(
                "The inputs are on the device 'meta', where tensors have no values; the values decide which steps are "
                "read. Give inputs on a real device."
            )
        if forced_gates is None:
            chance, shape = self.skip_probability, inputs.shape[:2]
            forced_gates = plan_gates(self.gate, state, mask, shape, chance, self.stride, generator)
        current = self.current_layers()
        engine, dtype = self._engine(inputs, current), self._scan_dtype(inputs, current)
        with own_precision(inputs.device.type):
            layers, gate = [layer_weights(layer, dtype) for layer in current], self.gate_weights(gate_shift)
            options = {"cell": self.cell, "mask": mask, "forced_gates": forced_gates, "sequence": sequence}
            if table is not None and engine.scan_tokens is not None:
                return engine.scan_tokens(inputs, table, layers, gate, state, **options)
            if table is not None:
                inputs = nn.functional.embedding(inputs, table)
            return engine.scan(inputs.to(layers[0].weight_ih.dtype), layers, gate, state, **options)

    def _engine(self, inputs: Tensor, current: Sequence[SkipRNNLayer | LayerParameters]) -> Engine:
        """Return the backend of a scan over inputs [B, T, I] or [B, T]."""
        num_weights = sum(layer.weight_ih.numel() + layer.weight_hh.numel() for layer in current)
        return select_engine(self.scan_backend, inputs, num_weights) if inputs.shape[1] else DENSE

    def _scan_dtype(self, inputs: Tensor, current: Sequence[SkipRNNLayer | LayerParameters]) -> torch.dtype | None:
        """Return the dtype to which autocast casts the weights of a scan; None: they stay as they are."""
        device = inputs.device.type
        if not torch.is_autocast_enabled(device) or not self._engine(inputs, current).follows_autocast:
            return None
        return torch.get_autocast_dtype(device)

    def layer_sequences(
        self, inputs: Tensor, state: SkipRNNState, mask: Tensor | None, update_gates: Tensor
    ) -> list[Tensor]:
        """Return h after every step, [B, T, H], of each layer but the top one, given the gates of a scan [B, T].

        A lower layer's h does not leave a scan. Under given gates, layers run one after the other.
        """
        x, gates, sequences = inputs, update_gates.detach() != 0, []
        current = self.current_layers()
        dtype = self._scan_dtype(inputs, current)
        engine = EVENTS if inputs.shape[1] else DENSE
        options = {"cell": self.cell, "mask": mask, "forced_gates": gates, "sequence": True}
        with own_precision(inputs.device.type):
            for index, layer in enumerate(current[:-1]):
                h, c = state.h[index : index + 1], None if state.c is None else state.c[index : index + 1]
                start = SkipRNNState(h, c, state.increment.detach(), state.steps_since_update.detach())
                weights = layer_weights(layer, dtype)
                out = engine.scan(x.to(weights.weight_ih.dtype), [weights], None, start, **options)
                x = cast(Tensor, out.sequence)
                sequences.append(x.to(layer.weight_hh.dtype))
        return sequences


@torch.no_grad()
def init_layer(layer: SkipRNNLayer, forget_bias: float) -> None:
    """Draw initial weights as the authors' code does.

    Matrices on [x, h]: Glorot-uniform, where a GRU has one matrix for r and z and one for the candidate. Biases: the
    forget gate's as given, 1 for a GRU's r and z, otherwise 0. The initial state: N(0, 1). transformers' `init` skips
    parameters that were loaded; it knows whole parameters only, so a bias is written in one piece.
    """
    units = layer.weight_hh.shape[1]
    is_lstm = layer.cell == "lstm"
    fan_out = torch.tensor([4.0] * 4 if is_lstm else [2.0, 2.0, 1.0]) * units
    bound = (6 / (layer.weight_ih.shape[1] + units + fan_out)).sqrt().repeat_interleave(units).unsqueeze(1)
    for weight in (layer.weight_ih, layer.weight_hh):
        uniform = torch.empty_like(weight, dtype=torch.float32).uniform_(-1, 1)
        init.copy_(weight, (uniform * bound.to(uniform)).to(weight))
    if layer.bias is not None:
        start = torch.tensor([0.0, forget_bias, 0.0, 0.0] if is_lstm else [1.0, 1.0, 0.0])
        init.copy_(layer.bias, start.repeat_interleave(units).to(layer.bias))
    if layer.bias_hh_n is not None:
        init.zeros_(layer.bias_hh_n)
    for initial in (layer.initial_h, layer.initial_c):
        if initial is not None:
            init.normal_(initial)


@torch.no_grad()
def init_update_gate(gate: UpdateGate, update_bias: float) -> None:
    """Draw W_p Glorot-uniform and set b_p: at 1, every step is an update at the start of training (section 4)."""
    init.xavier_uniform_(gate.weight)
    init.constant_(gate.bias, update_bias)
