"""The dense scan: the paper's loop over all steps in plain PyTorch. It defines what every backend computes.

A scan runs a stack of cells under one shared gate over a sequence. Every backend is a function of this signature:

    scan(inputs, layers, gate, state, *, cell, mask=None, forced_gates=None, sequence=False) -> ScanOutput

inputs        [B, T, I] floating point
layers        LayerWeights of each layer, bottom first
gate          GateWeights; None if the gate is not learned. Then `forced_gates` are the gates; without them every step
              is read
state         SkipRNNState to start from
cell          "lstm" | "gru" | "gru_reset_after"
mask          [B, T] bool, True at real steps; None: all are real. The result is as if masked steps were removed
forced_gates  [B, T] bool, gates to use instead of computed ones. With a learned gate, gradients flow as if the gate had
              computed them. Masked steps are never read
sequence      also return the top layer's h at every step, [B, T, H]
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells_skip_rnn import CELLS, Cell, GateWeights, LayerWeights, gate_opens, gate_slope, increment_of, product
from .outputs_skip_rnn import ScanOutput, SkipRNNState

IMPORTED_IN = os.getpid()  # the process whose threads the native engine shares; a forked child has none of them
Scan = Callable[..., ScanOutput]  # of the signature above


class Engine(NamedTuple):
    """A backend: its scan, and properties that callers need."""

    name: str  # "dense" | "events" | "cpu" | "triton"
    scan: Scan
    scan_tokens: Scan | None = None  # scan_tokens(ids [B, T], table [V, I], ...) embeds only the tokens that are read
    follows_autocast: bool = True  # multiplies in the precision of its weights, which autocast lowers


NO_FORWARD_MODE = (
    "A Skip RNN has no forward-mode derivative (jvp, dual numbers, torch.func.hessian) on any backend. Use reverse "
    "mode (torch.autograd, torch.func.grad, vjp, jacrev) on the 'dense' backend."
)


def refuse_forward_mode(ctx: Any, *tangents: Any) -> Any:
    """Raise RuntimeError: torch calls this for tangents, and its own message would not say what to do."""
    raise RuntimeError(NO_FORWARD_MODE)


class StraightThrough(torch.autograd.Function):
    """The binary gate u_t; its derivative by update_prob is `slope`, see `gate_slope`."""

    generate_vmap_rule = True
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def forward(update_prob: Tensor, opened: Tensor, slope: Tensor) -> Tensor:
        return opened.to(update_prob.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


class Blend(torch.autograd.Function):
    """Compute u * new + (1 - u) * old for u of 0 or 1. If u is 0, a NaN in `new` does not reach the result."""

    generate_vmap_rule = True
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def forward(gate: Tensor, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(gate > 0.5, new, old)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, new, old = ctx.saved_tensors
        grad_gate = grad * (new - old)
        if gate.shape != grad.shape:
            grad_gate = grad_gate.sum(-1, keepdim=True)
        zero = torch.zeros_like(grad)
        return grad_gate, torch.where(gate > 0.5, grad, zero), torch.where(gate > 0.5, zero, grad)


def dense_scan(
    inputs: Tensor,
    layers: Sequence[LayerWeights],
    gate: GateWeights | None,
    state: SkipRNNState,
    *,
    cell: str,
    mask: Tensor | None = None,
    forced_gates: Tensor | None = None,
    sequence: bool = False,
) -> ScanOutput:
    """Compute every step; the gate selects the new state or the old one. Derivatives of any order exist.

    The arguments are described at the top of this file.
    """
    batch, steps, _ = inputs.shape
    real = inputs.new_ones(batch, steps, dtype=torch.bool) if mask is None else mask
    read = real if gate is not None or forced_gates is None else real & forced_gates
    inputs = inputs.masked_fill(~read.unsqueeze(-1), 0)  # a NaN at a step without effect must not reach gradients
    carry = Carry.start(state)
    gates, outputs = [], []
    for t in range(steps):
        forced = None if forced_gates is None else forced_gates[:, t]
        carry, u = _dense_step(CELLS[cell], inputs[:, t], real[:, t], forced, layers, gate, carry)
        gates.append(u)
        outputs.append(carry.h[-1])
    update_gates = torch.stack(gates, 1) if gates else state.increment.new_zeros(batch, 0)
    held = None
    if sequence:
        held = torch.stack(outputs, 1) if outputs else state.h.new_zeros(batch, 0, state.h.shape[-1])
    return ScanOutput(held, carry.end(learned=gate is not None), update_gates.sum(1), update_gates)


DENSE = Engine("dense", dense_scan)


class Carry(NamedTuple):
    """The state inside the loop; the accumulator of eq. 5 is a separate variable."""

    h: tuple[Tensor, ...]  # [B, H] for each layer
    c: tuple[Tensor, ...]  # [B, H] for each layer; empty for a GRU
    increment: Tensor  # [B]
    accumulator: Tensor  # [B], q; its value is k * increment
    steps_since_update: Tensor  # [B], k, without gradient

    @classmethod
    def start(cls, state: SkipRNNState) -> "Carry":
        """Start from a state. The accumulator is steps_since_update * increment, so that gradients flow to both."""
        accumulator = state.steps_since_update * state.increment.detach()
        c = () if state.c is None else state.c.unbind()
        return cls(state.h.unbind(), c, state.increment, accumulator, state.steps_since_update.detach())

    def end(self, learned: bool) -> SkipRNNState:
        """Return the state to continue from: the inverse of `start`."""
        steps_since_update, increment = self.steps_since_update, self.increment.detach()
        if learned:
            unscaled = (self.accumulator - self.accumulator.detach()) / increment.where(increment != 0, torch.inf)
            steps_since_update = steps_since_update + unscaled.where(~unscaled.isnan(), 0)
        c = torch.stack(self.c) if self.c else None
        return SkipRNNState(torch.stack(self.h), c, self.increment, steps_since_update)


def _dense_step(
    cell: Cell,
    x: Tensor,  # [B, I]
    real: Tensor,  # [B] bool
    forced: Tensor | None,  # [B] bool
    layers: Sequence[LayerWeights],
    gate: GateWeights | None,
    carry: Carry,
) -> tuple[Carry, Tensor]:
    """Compute one step; return the new Carry and u [B]."""
    steps_since_update = carry.steps_since_update + 1  # k
    update_prob = carry.accumulator + carry.increment
    opened = real
    if forced is not None:
        opened = opened & forced
    elif gate is not None:
        opened = opened & gate_opens(steps_since_update, carry.increment)
    u = opened.to(update_prob.dtype)
    if gate is not None:
        u = StraightThrough.apply(update_prob, opened, gate_slope(carry.increment, gate.capped)) * real
    u_column = u.unsqueeze(-1)

    h, c = [], []
    for index, w in enumerate(layers):
        old_h, old_c = carry.h[index], carry.c[index] if carry.c else None
        new = cell.step(w, product(x, w.weight_ih, w.bias), cell.recurrent_product(w, old_h), old_h, old_c)
        h.append(Blend.apply(u_column, new.h, old_h))
        if old_c is not None:
            c.append(Blend.apply(u_column, new.c, old_c))
        x = new.h
    top = new.h if new.c is None else new.c
    increment = torch.zeros_like(u) if gate is None else increment_of(gate, top)
    return Carry(
        tuple(h),
        tuple(c),
        Blend.apply(u, increment, carry.increment),
        torch.where(real, Blend.apply(u, torch.zeros_like(u), update_prob), carry.accumulator),
        torch.where(real, steps_since_update.where(~opened, 0), carry.steps_since_update),
    ), u
