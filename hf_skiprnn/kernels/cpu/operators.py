"""The native CPU scan, as PyTorch operators.

`cpu_scan` has the signature of every backend (dense_scan_skip_rnn.py). A row jumps from update to update, so that
skipped steps cost nothing. The backward pass recomputes a few rows at a time from checkpoints instead of storing all
activations. It computes in float64 if any operand is float64, otherwise in float32, with `torch.get_num_threads()`
threads. There is no second derivative.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hf_skiprnn.model.cells_skip_rnn import GateWeights, LayerWeights
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState

from .engine import (
    check,
    empty_gradients,
    empty_records,
    empty_results,
    forward,
    reverse,
    unavailable_reason,
)

__all__ = ["EagerScan", "cpu_scan", "cpu_scan_tokens", "unavailable_reason"]

Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Eleven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("hf_skiprnn::cpu_inference", mutates_args=(), device_types="cpu")
def cpu_inference(
    inputs: Tensor,
    ids: Tensor | None,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    increment: Tensor,
    steps_since_update: Tensor,
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
    sequence: bool,
) -> Seven:
    """Run a scan for inference. With token ids [B, T], `inputs` is the table [V, I] that they index."""
    state = (h, c, increment, steps_since_update)
    return cast(Seven, tuple(forward(inputs, ids, weights, gate, state, mask, forced, cell, sequence)))


@cpu_inference.register_fake
def _(inputs, ids, weights, gate, h, c, increment, steps_since_update, mask, forced, cell, sequence):  # type: ignore[no-untyped-def]  # typed as the operator
    check(inputs, ids, weights, gate, (h, c, increment, steps_since_update), mask, forced, cell)
    return tuple(empty_results(inputs, ids, weights, (h, c, increment, steps_since_update), sequence))


@torch.library.custom_op("hf_skiprnn::cpu_training", mutates_args=(), device_types="cpu")
def cpu_training(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    increment: Tensor,
    steps_since_update: Tensor,
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
    sequence: bool,
) -> Eleven:
    """Run a scan for training: results, then records (update times, counts, checkpoints, input products)."""
    state = (h, c, increment, steps_since_update)
    results = forward(inputs, None, weights, gate, state, mask, forced, cell, sequence, training=True)
    return cast(Eleven, tuple(results))


@cpu_training.register_fake
def _(inputs, weights, gate, h, c, increment, steps_since_update, mask, forced, cell, sequence):  # type: ignore[no-untyped-def]  # typed as the operator
    state = (h, c, increment, steps_since_update)
    check(inputs, None, weights, gate, state, mask, forced, cell)
    return (*empty_results(inputs, None, weights, state, sequence), *empty_records(inputs, weights, state))


@torch.library.custom_op("hf_skiprnn::cpu_backward", mutates_args=(), device_types="cpu")
def cpu_backward(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    increment: Tensor,
    steps_since_update: Tensor,
    mask: Tensor | None,
    last_increment: Tensor,
    updates: Tensor,
    counts: Tensor,
    checkpoints: Tensor,
    products: Tensor,
    grad_sequence: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_increment: Tensor | None,
    grad_steps_since_update: Tensor | None,
    grad_num_updates: Tensor | None,
    grad_update_gates: Tensor | None,
    cell: str,
    grad_inputs: bool,
) -> list[Tensor]:
    """Return gradients in this order: inputs (empty unless asked for), the four parts of the state, gate, weights."""
    state, records = (h, c, increment, steps_since_update), (last_increment, updates, counts, checkpoints, products)
    grads = (
        grad_sequence,
        grad_h,
        grad_c,
        grad_increment,
        grad_steps_since_update,
        grad_num_updates,
        grad_update_gates,
    )
    check(inputs, None, weights, gate, state, mask, None, cell)
    return reverse(inputs, weights, gate, state, mask, records, grads, cell, grad_inputs)


@cpu_backward.register_fake
def _(inputs, weights, gate, h, c, increment, steps_since_update, *rest):  # type: ignore[no-untyped-def]  # typed as the operator
    return empty_gradients(inputs, weights, gate, (h, c, increment, steps_since_update), rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, gate, h, c, increment, steps_since_update, mask, _, ctx.cell, ctx.sequence = inputs
    ctx.num_gate, ctx.num_weights = len(gate), len(weights)
    ctx.save_for_backward(x, *weights, *gate, h, c, increment, steps_since_update, mask, output[3], *output[7:])
    ctx.set_materialize_grads(False)


def _saved(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return the arguments of `reverse` from what `_setup` saved."""
    x, *rest = ctx.saved_tensors
    weights, rest = rest[: ctx.num_weights], rest[ctx.num_weights :]
    gate, rest = rest[: ctx.num_gate], rest[ctx.num_gate :]
    state, mask, records = rest[:4], rest[4], rest[5:]
    of_sequence, of_h, of_c, *others = grads[:7]
    cotangents = (of_sequence if ctx.sequence else None, of_h, of_c if state[1] is not None else None, *others)
    return x, weights, gate, state, mask, records, cotangents, ctx.cell, ctx.needs_input_grad[ctx.first]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    ctx.first = 0
    x, weights, gate, state, mask, records, cotangents, *flags = _saved(ctx, grads)
    operator = torch.ops.hf_skiprnn.cpu_backward
    results = operator(x, weights, gate, *state, mask, *records, *cotangents, *flags)
    of_gate, of_weights = results[5 : 5 + len(gate)], results[5 + len(gate) :]
    of_state = [None if part is None else result for part, result in zip(state, results[1:5], strict=True)]
    return results[0] if flags[-1] else None, of_weights, of_gate, *of_state, None, None, None, None


NO_SECOND_DERIVATIVE = (
    "The 'cpu' backend has no second derivative (backward was called with create_graph=True). "
    "Use the 'dense' backend: model.set_scan_backend('dense')."
)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


cpu_training.register_autograd(_backward, setup_context=_setup)
cpu_backward.register_autograd(_no_second_derivative)
for _operator in (cpu_inference, cpu_training):
    _operator.register_autocast("cpu", torch.float32)


class EagerScan(torch.autograd.Function):
    """The training operator without PyTorch's dispatcher, which would take longer than a short scan."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        num_weights, mask, forced, cell, sequence = options
        weights, gate = tensors[5 : 5 + num_weights], tensors[5 + num_weights :]
        inputs, state = tensors[0], tensors[1:5]
        results = tuple(forward(inputs, None, weights, gate, state, mask, forced, cell, sequence, training=True))
        _setup(ctx, (inputs, weights, gate, *state, mask, forced, cell, sequence), results)
        ctx.mark_non_differentiable(*results[7:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        ctx.first = 1
        arguments = _saved(ctx, grads)
        results = reverse(*arguments)
        of_state = [None if p is None else r for p, r in zip(arguments[3], results[1:5], strict=True)]
        of_gate, of_weights = results[5 : 5 + ctx.num_gate], results[5 + ctx.num_gate :]
        return None, results[0] if arguments[-1] else None, *of_state, *of_weights, *of_gate


class Operands(NamedTuple):
    """The floating point operands of a scan, in the precision in which it computes."""

    inputs: Tensor
    weights: list[Tensor]  # four a layer; an empty tensor where there is none
    gate: list[Tensor]
    state: list[Tensor | None]
    differentiable: bool

    @classmethod
    def of(
        cls, inputs: Tensor, layers: Sequence[LayerWeights], gate: GateWeights | None, state: SkipRNNState
    ) -> "Operands":
        flat = [part for layer in layers for part in layer]
        floats = [part for part in (inputs, *flat, *(gate or ()), *state) if part is not None]
        differentiable = torch.is_grad_enabled() and any(part.requires_grad for part in floats)
        dtypes = {part.dtype for part in floats}
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        missing = inputs.new_empty(0, dtype=dtype)
        if dtypes == {dtype}:
            weights = [missing if part is None else part for part in flat]
            return cls(inputs, weights, [part for part in gate or () if part is not None], list(state), differentiable)
        return cls(
            inputs.to(dtype),
            [missing if part is None else part.to(dtype) for part in flat],
            [part.to(dtype) for part in gate or () if part is not None],
            [None if part is None else part.to(dtype) for part in state],
            differentiable,
        )


def _output(results: Sequence[Tensor], state: SkipRNNState, sequence: bool, learned: bool) -> ScanOutput:
    held, h, c, increment, steps_since_update, num_updates, update_gates = results[:7]
    if not learned:  # gates that nothing has chosen have no gradient, as in the dense scan
        steps_since_update, num_updates, update_gates = (
            steps_since_update.detach(),
            num_updates.detach(),
            update_gates.detach(),
        )
    last = SkipRNNState(h, None if state.c is None else c, increment, steps_since_update)
    return ScanOutput(held if sequence else None, last, num_updates, update_gates)


def _is_eager(inputs: Tensor) -> bool:
    """Whether the engine can be called directly; a compiler or tracer must see the operator instead."""
    is_watched = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]  # torch does not declare it
    return type(inputs) is Tensor and not is_watched


def cpu_scan(
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
    """Run the native scan on the CPU; the arguments are every backend's (dense_scan_skip_rnn.py).

    Raises:
        ValueError: a shape, dtype or device does not fit; the message says which.
        RuntimeError: the engine cannot run (see `unavailable_reason`), or a second derivative was asked for.
    """
    inputs, weights, gates, start, differentiable = Operands.of(inputs, layers, gate, state)
    options = (mask, forced_gates, cell, sequence)
    results: Sequence[Tensor]
    if differentiable and _is_eager(inputs):
        results = EagerScan.apply((len(weights), *options), inputs, *start, *weights, *gates)
    elif differentiable:
        results = torch.ops.hf_skiprnn.cpu_training(inputs, weights, gates, *start, *options)
    elif _is_eager(inputs):
        results = forward(inputs, None, weights, gates, start, *options)
    else:
        results = torch.ops.hf_skiprnn.cpu_inference(inputs, None, weights, gates, *start, *options)
    return _output(results, state, sequence, gate is not None)


def cpu_scan_tokens(
    ids: Tensor,
    table: Tensor,
    layers: Sequence[LayerWeights],
    gate: GateWeights | None,
    state: SkipRNNState,
    *,
    cell: str,
    mask: Tensor | None = None,
    forced_gates: Tensor | None = None,
    sequence: bool = False,
) -> ScanOutput:
    """Run `cpu_scan` on `table[ids]` for inference, and look up only the tokens that are read.

    Args:
        ids: [B, T] int64, rows of the table, also at masked steps.
        table: [V, I] embeddings.
        layers: this and the following are every scan's arguments (dense_scan_skip_rnn.py).
        gate: learned, or None.
        state: to start from.
        cell: "lstm", "gru" or "gru_reset_after".
        mask: [B, T] bool, or None.
        forced_gates: [B, T] bool, or None.
        sequence: whether to return every step's output.

    Raises:
        IndexError: an id is not a row of the table.
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: a gradient is wanted; embed the tokens and use `cpu_scan`.
    """
    table, weights, gates, start, differentiable = Operands.of(table, layers, gate, state)
    if differentiable:
        raise RuntimeError("cpu_scan_tokens has no gradient: call it under torch.no_grad(), or embed and use cpu_scan.")
    options = (mask, forced_gates, cell, sequence)
    if _is_eager(ids):
        return _output(forward(table, ids, weights, gates, start, *options), state, sequence, gate is not None)
    results = torch.ops.hf_skiprnn.cpu_inference(table, ids, weights, gates, *start, *options)
    return _output(results, state, sequence, gate is not None)
