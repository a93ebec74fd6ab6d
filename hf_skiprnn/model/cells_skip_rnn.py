"""The paper in code: one LSTM step, one GRU step, and the gate (Campos et al., ICLR 2018, arXiv 1708.06834).

| code                | paper        | meaning                                                                       |
|---------------------|--------------|-------------------------------------------------------------------------------|
| update_gate         | u_t, eq. 2   | 1 where the state is updated, 0 where it is copied                            |
| update_prob         | u~_t, eq. 5  | gate pre-activation, rounded to give u_t; here k * increment, see below       |
| increment           | D_t, eq. 4   | sigmoid(W_p s_t + b_p), emitted at an update and held until the next          |
| steps_since_update  | k            | steps since the last update; the k-th step after it has update_prob = k * D   |
| h, c                | s_t          | the state: h, c for an LSTM, h alone for a GRU                                |
| GateWeights         | W_p, b_p     | applied to the top layer: c for an LSTM, h for a GRU (as in the authors' code)|

Between two updates the accumulator of eq. 5 only adds up the held increment, so it equals k * D; the minimum of
eq. 5 has no effect below the threshold 0.5. The comparison with 0.5 is made in float32 in every precision.

Shapes: B rows, T steps, I inputs, H units, G gates of the cell (4 or 3), L layers, N any number of rows.
"""

import math
import sys
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_COUNT = 2**24  # float32 cannot count further, so a gate that is closed after so many steps never opens
NEVER = sys.maxsize  # the number of steps to skip if the gate never opens again
# Of config.gate_gradient: du / d(update_prob) is min(1, a D) with a of this table; 0: 1.
GATE_GRADIENTS = {"sum": 0, "capped": 4, "mean": 2}
OPEN = 0.5 - 2.0**-26  # half-way between 0.5 and the float32 below; rounds to 0.5, as the tie goes to the even last bit


class LayerWeights(NamedTuple):
    """One layer's weights, gates stacked in torch's order: i f g o (LSTM), r z n (GRU)."""

    weight_ih: Tensor  # [G*H, I]
    weight_hh: Tensor  # [G*H, H]
    bias: Tensor | None = None  # [G*H]
    bias_hh_n: Tensor | None = None  # [H], only GRU with the reset gate after the product


class GateWeights(NamedTuple):
    """The update gate's linear layer: W_p and b_p of eq. 4."""

    weight: Tensor  # [1, H]
    bias: Tensor  # [1]
    shift: Tensor | None = None  # [B], a number for each row that is added to the bias; or [], one for all rows
    capped: int = 0  # GATE_GRADIENTS[config.gate_gradient]; see `gate_slope`

    def of_rows(self, rows: Tensor) -> "GateWeights":
        """Return the gate of some rows of the batch ([N], integer)."""
        return self if self.shift is None or not self.shift.dim() else self._replace(shift=self.shift[rows])


class Step(NamedTuple):
    """One layer's new state, and the activations that its backward pass needs."""

    h: Tensor  # [N, H]
    c: Tensor | None  # [N, H]
    activations: tuple[Tensor, ...]  # each [N, H]: the cell's own gates and candidate, after their nonlinearities


class StepGradient(NamedTuple):
    """Cotangents of one layer's step. Gradients of the weights are matrix products of these with inputs and states."""

    inputs: Tensor  # [N, G*H], cotangent of the input product W_ih x (+ bias)
    recurrent: Tensor  # [N, G*H], cotangent of the recurrent product W_hh h
    h: Tensor  # [N, H], cotangent of the previous h
    c: Tensor | None  # [N, H], cotangent of the previous c


class Cell(Protocol):
    """A recurrent cell: the transition S of eq. 1 for one layer, and its backward pass.

    The input product and the recurrent product are separate arguments, because all steps between two updates share one
    recurrent product.
    """

    name: str
    num_gates: int
    has_cell_state: bool

    def recurrent_product(self, w: LayerWeights, h: Tensor) -> Tensor:
        """Compute the part of the step that depends only on the state h: [N, H] -> [N, .]."""
        ...

    def step(self, w: LayerWeights, x_product: Tensor, h_product: Tensor, h: Tensor, c: Tensor | None) -> Step:
        """Compute the next state from the input product [N, G*H], the recurrent product and the state [N, H]."""
        ...

    def backward(
        self, w: LayerWeights, step: Step, h: Tensor, c: Tensor | None, grad_h: Tensor, grad_c: Tensor | None
    ) -> StepGradient:
        """Compute the cotangents of the step's inputs from those of its outputs; h, c: the state before the step."""
        ...

    def recurrent_operands(self, step: Step, h: Tensor) -> tuple[Tensor, ...]:
        """Return what W_hh multiplies, one tensor for each of the cell's gates: G tensors [N, H]."""
        ...


def state_dtype(weight: Tensor) -> torch.dtype:
    """The precision of states, increments and counters: the weight's, but at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x @ weight.T + bias, the product in the weight's precision, the sum in the state's: [N, K] -> [N, M]."""
    out = F.linear(x.to(weight.dtype), weight).to(state_dtype(weight))
    return out if bias is None else out + bias


def increment_of(gate: GateWeights, top: Tensor) -> Tensor:
    """Return D = sigmoid(W_p top + b_p + shift), eq. 4: [N, H] -> [N]."""
    z = F.linear(top, gate.weight.to(top.dtype), gate.bias.to(top.dtype)).squeeze(-1)
    return torch.sigmoid(z if gate.shift is None else z + gate.shift.to(z.dtype))


def gate_opens(steps_since_update: Tensor, increment: Tensor) -> Tensor:
    """Return whether the k-th step (1, 2, ...) after an update is one: float32(k * D) >= 0.5, or D is NaN."""
    return ~(steps_since_update.float() * increment.float() < 0.5)


def gate_slope(increment: Tensor, capped: int) -> Tensor:
    """Return du / d(update_prob), which replaces the derivative of the rounding: [N], without gradient.

    It is 1, the straight-through estimator (section 3.1); or, if `capped` is not 0, min(1, capped D). An
    interval has about 0.5 / D gates. Those of a longer interval than capped / 2 steps then count as so many together.
    """
    increment = increment.detach()
    return (capped * increment).clamp(max=1) if capped else torch.ones_like(increment)


def steps_to_update(increment: Tensor, steps_since_update: Tensor, remaining: Tensor) -> Tensor:
    """Return the first n in 1 .. remaining for which `gate_opens(k + n, D)`, else remaining + 1: [N] int64.

    The gate opens at step ceil(0.5 / D) after the update (N_skip of section 3.1). The quotient is rounded, so it may be
    wrong by one; it is corrected with the product k * D, which defines the gate. If D is NaN, n is 1. remaining: at
    most LARGEST_COUNT.
    """
    d, k = increment.float(), steps_since_update.long()
    n = torch.where(d > 0, torch.ceil(0.5 / d), torch.inf) - k
    n = torch.where(d.isnan(), 1.0, n).clamp(1, LARGEST_COUNT).long()
    n = torch.where(gate_opens(k + n, d), n, n + 1)
    n = torch.where((n > 1) & gate_opens(k + n - 1, d), n - 1, n)
    return n.minimum(remaining + 1)


def steps_to_skip(increment: float, steps_since_update: float) -> int:
    """Return the number of steps to skip before the next update, or NEVER: `steps_to_update` - 1 for one row.

    Streams use it, because tensor operations would take longer than the step itself. Both arguments are float32 values,
    so their product is exact in a Python float; rounded to float32 it is at least 0.5 exactly if it is at least OPEN.
    """
    if increment * LARGEST_COUNT < OPEN:
        return NEVER
    if increment != increment:  # NaN
        return 0
    return max(math.ceil(OPEN / increment) - int(steps_since_update), 1) - 1


class LSTMCell:
    """The LSTM: i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c')."""

    name = "lstm"
    num_gates = 4
    has_cell_state = True

    def recurrent_product(self, w: LayerWeights, h: Tensor) -> Tensor:
        return product(h, w.weight_hh)

    def step(self, w: LayerWeights, x_product: Tensor, h_product: Tensor, h: Tensor, c: Tensor | None) -> Step:
        assert c is not None
        i, f, g, o = (x_product + h_product).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return Step(o * c.tanh(), c, (i, f, g, o))

    def backward(
        self, w: LayerWeights, step: Step, h: Tensor, c: Tensor | None, grad_h: Tensor, grad_c: Tensor | None
    ) -> StepGradient:
        assert c is not None
        assert step.c is not None
        assert grad_c is not None
        i, f, g, o = step.activations
        tanh_c = step.c.tanh()
        grad_c = grad_c + grad_h * o * (1 - tanh_c * tanh_c)
        grad_pre = torch.cat(
            (
                grad_c * g * i * (1 - i),
                grad_c * c * f * (1 - f),
                grad_c * i * (1 - g * g),
                grad_h * tanh_c * o * (1 - o),
            ),
            dim=-1,
        )
        return StepGradient(grad_pre, grad_pre, product(grad_pre, w.weight_hh.T), grad_c * f)

    def recurrent_operands(self, step: Step, h: Tensor) -> tuple[Tensor, ...]:
        return h, h, h, h


class GRUCell:
    """The paper's GRU, which resets before the product.

    r, z = sigmoid(.); n = tanh(W x + W_hn (r h)); h' = (1 - z) n + z h.
    """

    name = "gru"
    num_gates = 3
    has_cell_state = False

    def recurrent_product(self, w: LayerWeights, h: Tensor) -> Tensor:
        return product(h, w.weight_hh[: 2 * h.shape[-1]])

    def step(self, w: LayerWeights, x_product: Tensor, h_product: Tensor, h: Tensor, c: Tensor | None) -> Step:
        units = h.shape[-1]
        r, z = (x_product[:, : 2 * units] + h_product).sigmoid().chunk(2, dim=-1)
        n = (x_product[:, 2 * units :] + product(r * h, w.weight_hh[2 * units :])).tanh()
        return Step((1 - z) * n + z * h, None, (r, z, n))

    def backward(
        self, w: LayerWeights, step: Step, h: Tensor, c: Tensor | None, grad_h: Tensor, grad_c: Tensor | None
    ) -> StepGradient:
        units = h.shape[-1]
        r, z, n = step.activations
        grad_n = grad_h * (1 - z) * (1 - n * n)
        grad_rh = product(grad_n, w.weight_hh[2 * units :].T)
        grad_rz = torch.cat((grad_rh * h * r * (1 - r), grad_h * (h - n) * z * (1 - z)), dim=-1)
        previous = grad_h * z + grad_rh * r + product(grad_rz, w.weight_hh[: 2 * units].T)
        grad_pre = torch.cat((grad_rz, grad_n), dim=-1)
        return StepGradient(grad_pre, grad_pre, previous, None)

    def recurrent_operands(self, step: Step, h: Tensor) -> tuple[Tensor, ...]:
        return h, h, step.activations[0] * h


class GRUResetAfterCell:
    """The GRU of torch.nn.GRU and cuDNN, which resets after the product: n = tanh(W x + r (W_hn h + b_hn))."""

    name = "gru_reset_after"
    num_gates = 3
    has_cell_state = False

    def recurrent_product(self, w: LayerWeights, h: Tensor) -> Tensor:
        out = product(h, w.weight_hh)
        return out if w.bias_hh_n is None else out + F.pad(w.bias_hh_n.to(out.dtype), (2 * h.shape[-1], 0))

    def step(self, w: LayerWeights, x_product: Tensor, h_product: Tensor, h: Tensor, c: Tensor | None) -> Step:
        units = h.shape[-1]
        r, z = (x_product[:, : 2 * units] + h_product[:, : 2 * units]).sigmoid().chunk(2, dim=-1)
        m = h_product[:, 2 * units :]
        n = (x_product[:, 2 * units :] + r * m).tanh()
        return Step((1 - z) * n + z * h, None, (r, z, n, m))

    def backward(
        self, w: LayerWeights, step: Step, h: Tensor, c: Tensor | None, grad_h: Tensor, grad_c: Tensor | None
    ) -> StepGradient:
        r, z, n, m = step.activations
        grad_n = grad_h * (1 - z) * (1 - n * n)
        grad_r = grad_n * m * r * (1 - r)
        grad_z = grad_h * (h - n) * z * (1 - z)
        recurrent = torch.cat((grad_r, grad_z, grad_n * r), dim=-1)
        previous = grad_h * z + product(recurrent, w.weight_hh.T)
        return StepGradient(torch.cat((grad_r, grad_z, grad_n), dim=-1), recurrent, previous, None)

    def recurrent_operands(self, step: Step, h: Tensor) -> tuple[Tensor, ...]:
        return h, h, h


CELLS: dict[str, Cell] = {cell.name: cell for cell in (LSTMCell(), GRUCell(), GRUResetAfterCell())}
