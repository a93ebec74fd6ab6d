"""Code that pull and push inference share: check steps and states, update rows, and find the next step to read."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .cells_skip_rnn import CELLS, GateWeights, LayerWeights, state_dtype, steps_to_skip
from .event_forward_skip_rnn import update
from .inputs_skip_rnn import check_state, check_storage
from .layers_skip_rnn import layer_weights, own_precision
from .outputs_skip_rnn import SkipRNNState

Weights = TypeVar("Weights", LayerWeights, GateWeights)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that a stream can change later, in or out of torch.inference_mode; also a decorator."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def on_cpu(numbers: Sequence[int]) -> Tensor:
    """Return whole numbers as a tensor on the CPU, whatever torch's default device is."""
    return torch.tensor(numbers, dtype=torch.long, device="cpu")


class Reader:
    """A model's weights for inference step by step: they are the model's own memory, without gradients."""

    def __init__(
        self, model: Any, generator: torch.Generator | None, check_inputs: bool, shift: Tensor | None = None
    ) -> None:
        """`shift`: [B], each row's gate shift, or [], that of all rows; None: `config.gate_shift` for all rows."""
        self.model, self.base = model, model.base_model
        self.head = None if self.base is model else model.classifier
        self.generator, self.check_inputs = generator, check_inputs
        weight = self.base.current_weight()
        self.device, self.dtype, self.state_dtype = weight.device, weight.dtype, state_dtype(weight)
        self.cell = CELLS[self.base.cell]
        self.layers = [detached(layer_weights(layer)) for layer in self.base.current_layers()]
        self.shift = shift
        gate = self.base.gate_weights(shift)
        self.gate = None if gate is None else detached(gate)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the model: copies of the detached weights would not share the model's memory."""
        return Reader, (self.model, self.generator, self.check_inputs, self.shift)

    def shifted(self, shift: Tensor | None) -> "Reader":
        """Return a reader of the same model with other shifts of the gate."""
        return Reader(self.model, self.generator, self.check_inputs, shift)

    def start(self, state: SkipRNNState | None, batch: int) -> SkipRNNState:
        """Return a copy of `state`, or the initial state of `batch` rows, without its graph.

        Raises:
            ValueError: the state has another shape, or impossible values; see `check_values`.
        """
        if state is None:
            return self.base.initial_state(batch).detach().map(Tensor.clone)
        state = check_state(self.base, state, batch).detach().map(Tensor.clone)
        check_values(state, nan_passes=not self.check_inputs)
        return state

    def steps_to_skip(self, increment: float, steps_since_update: float) -> int:
        """Return the number of steps that one row skips before its next update, or NEVER, for every kind of gate.

        With gate="random" each call draws new random numbers.
        """
        if self.gate is not None:
            return steps_to_skip(increment, steps_since_update)
        if self.base.gate == "always" or increment == 1:  # a fresh row reads its first step
            return 0
        if self.base.gate == "strided":
            return (-int(steps_since_update) - 1) % self.base.stride
        skipped, where = 0, "cpu" if self.generator is None else self.generator.device
        while torch.rand((), generator=self.generator, device=where).item() < self.base.skip_probability:
            skipped += 1
        return skipped

    def waits(self, state: SkipRNNState) -> list[int]:
        """Return `steps_to_skip` of every row of a state."""
        pairs = zip(state.increment.float().tolist(), state.steps_since_update.tolist(), strict=True)
        return [self.steps_to_skip(*pair) for pair in pairs]

    def inputs(self, x: Any, rows: int, where: str) -> Tensor:
        """Return one step of some rows, [rows, input_size] in the weights' precision, from numbers or token ids.

        Raises:
            ValueError: x has another shape or type, a token is unknown, or, with check_inputs, a value is not finite in
                the weights' dtype. `where` names the input in the message.
        """
        x = as_tensor(x, self.device, where)
        if self.base.config.vocab_size is not None:
            return self._embed(x, rows, where)
        wanted = (rows, self.base.config.input_size)
        if rows == 1 and x.dim() < 2 and x.numel() == wanted[1]:
            x = x.reshape(wanted)
        if x.shape != wanted:
            raise ValueError(f"{where} must be [rows, input_size] = {wanted}; got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"{where} must be floating point; got {x.dtype}. Scale it as in training.")
        cast = x.to(self.dtype)
        if self.check_inputs and not bool(cast.isfinite().all()):
            row, column = (~cast.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"{where} holds {x[row, column].item()} in row {row}, column {column}, which is not finite in "
                f"{self.dtype}. Clean the data, or pass check_inputs=False: then a NaN updates and shows in the logits."
            )
        return cast

    def _embed(self, ids: Tensor, rows: int, where: str) -> Tensor:
        ids = ids.reshape(1) if rows == 1 and ids.numel() == 1 else ids
        if ids.shape != (rows,) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{where} must be token ids, integers [{rows}]; got {ids.dtype} {tuple(ids.shape)}.")
        vocab = self.base.config.vocab_size
        if bool(((ids < 0) | (ids >= vocab)).any()):
            raise ValueError(f"{where} must be in [0, vocab_size = {vocab}); got {ids.tolist()}.")
        return self.base.embed_step(ids)

    def update(self, state: SkipRNNState, rows: Tensor, x: Tensor) -> None:
        """Update the rows `rows` ([N] integer) of a state in place, from their inputs x [N, input_size]."""
        h, c = list(state.h[:, rows]), [] if state.c is None else list(state.c[:, rows])
        with own_precision(self.device.type):  # gates equal those of a forward pass
            increment = update(x, h, c, self.layers, self.gate and self.gate.of_rows(rows), self.cell)
        state.h[:, rows] = torch.stack(h)
        if state.c is not None:
            state.c[:, rows] = torch.stack(c)
        state.increment[rows] = 0 if increment is None else increment
        state.steps_since_update[rows] = 0

    def row_update(self, state: SkipRNNState) -> Callable[[Tensor], None]:
        """Return the function that updates a state of one row in place from x [1, input_size].

        This function decides the speed of a stream. With 1 input and 110 units on one core, `update` takes 37 (LSTM)
        and 48 (GRU) microseconds, and torch.lstm_cell takes 23. The same cells with preallocated memory take 16 and
        14, so the LSTM and the paper's GRU are run like this on a CPU.
        """
        weight, make = self.layers[0].weight_hh, IN_PLACE.get(self.cell.name)
        if make is None or weight.device.type != "cpu" or weight.dtype != self.state_dtype:
            row = torch.zeros(1, dtype=torch.long, device=self.device)
            return lambda x: self.update(state, row, x)
        parts = (state.h,) if state.c is None else (state.h, state.c)
        steps = [make(w, *part) for w, *part in zip(self.layers, *parts, strict=True)]
        increment, top = state.increment.view(1, 1), parts[-1][-1]
        gate = None
        if self.gate is not None:
            bias = self.gate.bias if self.gate.shift is None else self.gate.bias + self.gate.shift
            gate = bias.view(1, 1).to(top), top, self.gate.weight.t().to(top)

        def step_layers(x: Tensor) -> None:
            for step in steps:
                x = step(x)
            if gate is None:
                increment.zero_()
            else:
                torch.addmm(*gate, out=increment).sigmoid_()

        return step_layers

    def logits(self, h: Tensor) -> Tensor:
        """Return logits [N, num_labels] for the top layer's h [N, H], without dropout.

        Raises:
            AttributeError: the model has no classifier.
        """
        if self.head is None:
            raise AttributeError("SkipRNNModel has no classifier, so there are no logits. Use the state's h.")
        with torch.no_grad():
            return self.head(h.to(self.dtype))


def lstm_in_place(w: LayerWeights, h: Tensor, c: Tensor) -> Callable[[Tensor], Tensor]:
    """Return `LSTMCell.step` for one row: a function that takes x [1, I], overwrites h and c [1, H], and returns h."""
    w_x, w_h, bias = w.weight_ih.t(), w.weight_hh.t(), _bias(w)
    activations, tanh_g, tanh_c = torch.empty_like(bias), torch.empty_like(h), torch.empty_like(h)
    i, f, g, o = activations.chunk(4, dim=1)

    def step(x: Tensor) -> Tensor:
        torch.addmm(bias, x, w_x, out=activations).addmm_(h, w_h)
        torch.tanh(g, out=tanh_g)
        activations.sigmoid_()  # one call for all four is faster than three calls
        c.mul_(f).addcmul_(i, tanh_g)
        torch.tanh(c, out=tanh_c)
        return torch.mul(o, tanh_c, out=h)

    return step


def gru_in_place(w: LayerWeights, h: Tensor) -> Callable[[Tensor], Tensor]:
    """Return `GRUCell.step` for one row: a function that takes x [1, I], overwrites h [1, H], and returns it."""
    units = h.shape[1]
    w_x, w_rz, w_n, bias = w.weight_ih.t(), w.weight_hh[: 2 * units].t(), w.weight_hh[2 * units :].t(), _bias(w)
    activations, rh = torch.empty_like(bias), torch.empty_like(h)
    rz, n = activations.split((2 * units, units), dim=1)
    r, z = rz.chunk(2, dim=1)

    def step(x: Tensor) -> Tensor:
        torch.addmm(bias, x, w_x, out=activations)
        rz.addmm_(h, w_rz).sigmoid_()
        torch.mul(r, h, out=rh)
        n.addmm_(rh, w_n).tanh_()
        return torch.lerp(n, h, z, out=h)

    return step


IN_PLACE: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {"lstm": lstm_in_place, "gru": gru_in_place}


def _bias(w: LayerWeights) -> Tensor:
    """Return the bias as a row [1, G*H]; zeros if there is none."""
    rows = w.weight_hh.shape[0]
    return w.weight_hh.new_zeros(1, rows) if w.bias is None else w.bias.view(1, rows)


def check_values(state: SkipRNNState, nan_passes: bool) -> None:
    """Raise ValueError if a state holds values that no model returns: a stream would be wrong."""
    h, c, increment, steps = state
    whole = steps.isfinite() & (steps >= 0) & (steps == steps.floor())
    for name, part, right, wanted in (
        ("h", h, h.isfinite(), "finite"),
        ("c", c, None if c is None else c.isfinite(), "finite"),
        ("increment", increment, (increment >= 0) & (increment <= 1), "in [0, 1]"),
        ("steps_since_update", steps, whole, "a whole number, 0 or more"),
    ):
        if part is None or right is None:
            continue
        wrong = ~(right | part.isnan()) if nan_passes and part is not steps else ~right
        if bool(wrong.any()):
            raise ValueError(
                f"state.{name} must be {wanted}; got {part[wrong][0].item()}. The state is damaged, or an input made "
                "it NaN: use an earlier state, or start again."
            )


def as_count(value: Any, name: str) -> int:
    """Return a whole number, of any library's type, as an int.

    Raises:
        ValueError: it is not a whole number; nothing is rounded.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number; got {value!r}.") from None


def detached(weights: Weights) -> Weights:
    """Return the weights in the same memory, without gradients."""
    parts: dict[str, Any] = {name: w.detach() for name, w in weights._asdict().items() if isinstance(w, Tensor)}
    return weights._replace(**parts)


def as_tensor(x: Any, device: torch.device, where: str) -> Tensor:
    """Convert a tensor, array, number, or list of these to a tensor without a graph.

    Raises:
        ValueError: it is none of these, or its storage was shrunk; `where` names it in the message.
    """
    if isinstance(x, Tensor):
        check_storage(where, x)
        return x.detach().to(device)
    try:
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor):
            return torch.stack([part.detach() for part in x]).to(device)
        array = np.asarray(x)
        return torch.tensor(array, device=device) if array.ndim else torch.as_tensor(x, device=device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} must be an array of numbers; got {type(x).__name__} ({error}).") from error
