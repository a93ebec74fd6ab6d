"""One update of one row: what a stream pays when it reads. On a CPU in memory made once, without a graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cells_skip_rnn import Cell, GateWeights, LayerWeights, state_dtype
from .event_forward_skip_rnn import update


class RowUpdate:
    """The state of one row, and its update by the cell's step. Runs everywhere."""

    def __init__(self, layers: Sequence[LayerWeights], gate: GateWeights | None, cell: Cell) -> None:
        self.layers, self.gate, self.cell = layers, gate, cell
        self.h: list[Tensor] = []  # a layer [1, H]
        self.c: list[Tensor] = []  # likewise; empty for a GRU

    def load(self, h: Tensor, c: Tensor | None) -> None:
        """Take over a state: h, c [L, 1, H]."""
        self.h, self.c = list(h.unbind()), [] if c is None else list(c.unbind())

    def update(self, x: Tensor) -> Tensor | None:
        """Update from x [1, I]; the increment [1], or None where nothing is learned."""
        return update(x, self.h, self.c, self.layers, self.gate, self.cell)


class InPlaceRowUpdate(RowUpdate):
    """The same for an LSTM or the paper's GRU in float32 or float64 on a CPU, with a third of the calls."""

    def __init__(self, layers: Sequence[LayerWeights], gate: GateWeights | None, cell: Cell) -> None:
        super().__init__(layers, gate, cell)
        kind = LSTMInPlace if cell.name == "lstm" else GRUInPlace
        self.steps = [kind(w) for w in layers]
        self.h = [step.h for step in self.steps]
        self.c = [step.c for step in self.steps if step.c is not None]
        top = (self.c or self.h)[-1]
        self.increment = torch.empty_like(top[:, :1])
        if gate is not None:
            self.gate_operands = gate.bias.view(1, 1).to(top), top, gate.weight.t().to(top)

    def load(self, h: Tensor, c: Tensor | None) -> None:
        for own, new in zip(self.h + self.c, [*h, *(() if c is None else c)], strict=True):
            own.copy_(new)

    def update(self, x: Tensor) -> Tensor | None:
        for step in self.steps:
            x = step(x)
        if self.gate is None:
            return None
        return torch.addmm(*self.gate_operands, out=self.increment).sigmoid_().view(1)


class LSTMInPlace:
    """cells_skip_rnn.LSTMCell for one row."""

    def __init__(self, w: LayerWeights) -> None:
        units = w.weight_hh.shape[1]
        self.w_x, self.w_h = w.weight_ih.t(), w.weight_hh.t()
        self.bias = _bias(w)
        self.pre = torch.empty_like(self.bias)
        self.i, self.f, self.g, self.o = self.pre.split(units, dim=1)
        self.h, self.tanh_g, self.tanh_c = (torch.zeros_like(self.i) for _ in range(3))
        self.c: Tensor | None = torch.zeros_like(self.i)

    def __call__(self, x: Tensor) -> Tensor:
        c = self.c
        assert c is not None
        torch.addmm(self.bias, x, self.w_x, out=self.pre).addmm_(self.h, self.w_h)
        torch.tanh(self.g, out=self.tanh_g)
        self.pre.sigmoid_()  # all four at once costs less than three calls
        c.mul_(self.f).addcmul_(self.i, self.tanh_g)
        torch.tanh(c, out=self.tanh_c)
        return torch.mul(self.o, self.tanh_c, out=self.h)


class GRUInPlace:
    """cells_skip_rnn.GRUCell for one row."""

    c: Tensor | None = None

    def __init__(self, w: LayerWeights) -> None:
        units = w.weight_hh.shape[1]
        self.w_x = w.weight_ih.t()
        self.w_rz, self.w_n = w.weight_hh[: 2 * units].t(), w.weight_hh[2 * units :].t()
        self.bias = _bias(w)
        self.pre = torch.empty_like(self.bias)
        self.rz, self.n = self.pre.split((2 * units, units), dim=1)
        self.r, self.z = self.rz.split(units, dim=1)
        self.h, self.rh = torch.zeros_like(self.n), torch.empty_like(self.n)

    def __call__(self, x: Tensor) -> Tensor:
        torch.addmm(self.bias, x, self.w_x, out=self.pre)
        self.rz.addmm_(self.h, self.w_rz).sigmoid_()
        torch.mul(self.r, self.h, out=self.rh)
        self.n.addmm_(self.rh, self.w_n).tanh_()
        return torch.lerp(self.n, self.h, self.z, out=self.h)


def _bias(w: LayerWeights) -> Tensor:
    rows = w.weight_hh.shape[0]
    return w.weight_hh.new_zeros(1, rows) if w.bias is None else w.bias.view(1, rows)


def row_update(layers: Sequence[LayerWeights], gate: GateWeights | None, cell: Cell) -> RowUpdate:
    """The fastest one for these weights."""
    weight = layers[0].weight_hh
    in_place = weight.device.type == "cpu" and weight.dtype == state_dtype(weight) and cell.name in ("lstm", "gru")
    return (InPlaceRowUpdate if in_place else RowUpdate)(layers, gate, cell)
