"""The native CPU scan, as PyTorch operators.

`cpu_scan` has the signature of every backend (dense_scan_skip_rnn.py). A row jumps from update to update, so that
skipped steps cost nothing. The backward pass recomputes a few rows at a time from checkpoints instead of storing all
activations. It computes in float64 if any operand is float64, otherwise in float32, with `torch.get_num_threads()`
threads. There is no second derivative.
"""

import functools
from collections.abc import Sequence
from types import NoneType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import KeyPath, keystr, tree_map_with_path
from transformers.utils import logging

from hf_skiprnn.kernels.operands import (
    ABSENT,
    PLAIN_TYPES,
    cotangents,
    no_second_derivative,
    refuse_transforms,
    scan_output,
    split_gradients,
    unpack_saved,
)
from hf_skiprnn.model.cells_skip_rnn import GateWeights, LayerWeights
from hf_skiprnn.model.dense_scan_skip_rnn import Engine
from hf_skiprnn.model.event_scan_skip_rnn import event_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState

from .engine import check, empty_gradients, empty_records, empty_results, forward, reverse
from .library import unavailable_reason

__all__ = ["CPU", "CPU_OR_EVENTS", "EagerScan", "cpu_scan", "cpu_scan_tokens", "unavailable_reason"]

logger = logging.get_logger(__name__)

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
    capped: int,
) -> Eleven:
    """Run a scan for training: results, then records (update times, counts, checkpoints, input products)."""
    state = (h, c, increment, steps_since_update)
    results = forward(inputs, None, weights, gate, state, mask, forced, cell, sequence, training=True, zeros=True)
    return cast(Eleven, tuple(results))


@cpu_training.register_fake
def _(inputs, weights, gate, h, c, increment, steps_since_update, mask, forced, cell, sequence, capped):  # type: ignore[no-untyped-def]  # typed as the operator
    state = (h, c, increment, steps_since_update)
    check(inputs, None, weights, gate, state, mask, forced, cell, training=True)
    return (*empty_results(inputs, None, weights, state, sequence), *empty_records(inputs, weights, state, zeros=True))


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
    capped: int,
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
    return reverse(inputs, weights, gate, state, mask, records, grads, cell, capped, False, grad_inputs)


@cpu_backward.register_fake
def _(inputs, weights, gate, h, c, increment, steps_since_update, *rest):  # type: ignore[no-untyped-def]  # typed as the operator
    return empty_gradients(inputs, weights, gate, (h, c, increment, steps_since_update), rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, gate, h, c, increment, steps_since_update, mask, _, ctx.cell, ctx.sequence, ctx.capped = inputs
    ctx.num_gate, ctx.num_weights = len(gate), len(weights)
    ctx.save_for_backward(x, *weights, *gate, h, c, increment, steps_since_update, mask, output[3], *output[7:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, weights, gate, state, mask, records = unpack_saved(ctx)
    of_results, needed = cotangents(grads, state[1] is not None, ctx.sequence), bool(ctx.needs_input_grad[0])
    operator = torch.ops.hf_skiprnn.cpu_backward
    results = operator(x, weights, gate, *state, mask, *records, *of_results, ctx.cell, ctx.capped, needed)
    return *split_gradients(results, state, len(gate), needed), None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise no_second_derivative("cpu")


cpu_training.register_autograd(_backward, setup_context=_setup)
cpu_backward.register_autograd(_no_second_derivative)
for _operator in (cpu_inference, cpu_training):
    _operator.register_autocast("cpu", torch.float32)


class EagerScan(torch.autograd.Function):
    """The training operator without PyTorch's dispatcher, which would take longer than a short scan.

    Only here numbers are known to be bfloat16 numbers: a compiler may leave out the rounding in front of an operator.
    """

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        num_weights, mask, forced, cell, sequence, capped, rounded = options
        weights, gate = tensors[5 : 5 + num_weights], tensors[5 + num_weights :]
        inputs, state = tensors[0], tensors[1:5]
        operands = (mask, forced, cell, sequence)
        results = tuple(forward(inputs, None, weights, gate, state, *operands, training=True, rounded=rounded))
        _setup(ctx, (inputs, weights, gate, *state, *operands, capped), results)
        ctx.rounded = rounded
        ctx.mark_non_differentiable(*results[7:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_transforms("cpu")
        if torch.is_grad_enabled():
            raise no_second_derivative("cpu")
        x, weights, gate, state, mask, records = unpack_saved(ctx)
        of_results, needed = cotangents(grads, state[1] is not None, ctx.sequence), ctx.needs_input_grad[1]
        results = reverse(x, weights, gate, state, mask, records, of_results, ctx.cell, ctx.capped, ctx.rounded, needed)
        of_inputs, of_weights, of_gate, *of_state = split_gradients(results, state, len(gate), needed)
        return None, of_inputs, *of_state, *of_weights, *of_gate


class Operands(NamedTuple):
    """The floating point operands of a scan, in the precision in which it computes."""

    inputs: Tensor
    weights: list[Tensor]  # four a layer; an empty tensor where there is none
    gate: list[Tensor]
    state: list[Tensor | None]
    differentiable: bool
    rounded: bool  # inputs and weights are float32, but each number is a bfloat16 number

    @classmethod
    def of(
        cls, inputs: Tensor, layers: Sequence[LayerWeights], gate: GateWeights | None, state: SkipRNNState
    ) -> "Operands":
        flat = [part for layer in layers for part in layer]
        floats = [part for part in (inputs, *flat, *(gate or ())[:3], *state) if part is not None]
        differentiable = torch.is_grad_enabled() and any(part.requires_grad for part in floats)
        dtypes = {part.dtype for part in floats}
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        is_bf16 = dtype == torch.float32 and {p.dtype for p in (inputs, *flat) if p is not None} == {torch.bfloat16}
        # Of inputs and weights: in inference the engine reads bfloat16 where it lies.
        given = torch.bfloat16 if is_bf16 and not differentiable else dtype
        missing = state.increment.new_empty(ABSENT, dtype=given)
        if dtypes == {dtype}:
            weights = [missing if part is None else part for part in flat]
            gates = [part for part in (gate or ())[:3] if part is not None]
            return cls(inputs, weights, gates, list(state), differentiable, False)
        return cls(
            inputs.to(given),
            [missing if part is None else part.to(given) for part in flat],
            [part.to(dtype) for part in (gate or ())[:3] if part is not None],
            [None if part is None else part.to(dtype) for part in state],
            differentiable,
            is_bf16 and differentiable,
        )


class WrappedTensorError(RuntimeError):
    """An operand is a wrapper (torchao, DTensor), whose data has no address; torch's operators may compute with it."""


def _is_watched() -> bool:
    """Return whether a tracer or a mode must see the operator: then the engine cannot be called directly."""
    return bool(torch.jit.is_tracing()) or torch._C._len_torch_dispatch_stack() > 0  # type: ignore[attr-defined]  # torch does not declare it


def _as_plain(path: KeyPath, tensor: Any) -> Any:
    """Return an argument, a tensor as a plain one with the same memory; WrappedTensorError if it has none."""
    if not isinstance(tensor, Tensor) or type(tensor) in PLAIN_TYPES:
        return tensor
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:  # such as torchvision's images: only a name
        return tensor.as_subclass(Tensor)
    raise WrappedTensorError(
        f"The 'cpu' backend reads memory, and arguments{keystr(path)} is a {type(tensor).__name__}, which has none of "
        "its own. Use a plain tensor (a DTensor's is tensor.full_tensor()), or the 'events' or 'dense' backend."
    )


def _scan(
    inputs: Tensor,
    ids: Tensor | None,
    layers: Sequence[LayerWeights],
    gate: GateWeights | None,
    state: SkipRNNState,
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
    sequence: bool,
) -> ScanOutput:
    """Run a scan: directly, or as an operator where something watches."""
    is_direct = not torch.compiler.is_compiling()
    if is_direct:
        refuse_transforms("cpu")
        parts = (inputs, ids, mask, forced, *(gate or ())[:3], *state, *(part for layer in layers for part in layer))
        types = set(map(type, parts)) - {*PLAIN_TYPES, NoneType}
        is_direct = not (_is_watched() or any(issubclass(found, FakeTensor) for found in types))
        if is_direct and types:
            arguments = {"inputs": inputs, "ids": ids, "layers": list(layers), "gate": gate, "state": state}
            arguments |= {"mask": mask, "forced_gates": forced}
            inputs, ids, layers, gate, state, mask, forced = tree_map_with_path(_as_plain, arguments).values()
    inputs, weights, gates, start, differentiable, rounded = Operands.of(inputs, layers, gate, state)
    if differentiable and ids is not None:
        raise RuntimeError("cpu_scan_tokens has no gradient: call it under torch.no_grad(), or embed and use cpu_scan.")
    options = (mask, forced, cell, sequence)
    capped = getattr(gate, "capped", 0)  # the code of a checkpoint of version 0.1.0 has none
    results: Sequence[Tensor]
    if differentiable and is_direct:
        results = EagerScan.apply((len(weights), *options, capped, rounded), inputs, *start, *weights, *gates)
    elif differentiable:
        results = torch.ops.hf_skiprnn.cpu_training(inputs, weights, gates, *start, *options, capped)
    elif is_direct:
        results = forward(inputs, ids, weights, gates, start, *options)
    else:
        results = torch.ops.hf_skiprnn.cpu_inference(inputs, ids, weights, gates, *start, *options)
    return scan_output(results, state.c is not None, sequence, gate is not None)


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
    return _scan(inputs, None, layers, gate, state, mask, forced_gates, cell, sequence)


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
    return _scan(table, ids, layers, gate, state, mask, forced_gates, cell, sequence)


def scan_or_events(
    inputs: Tensor, layers: Sequence[LayerWeights], gate: GateWeights | None, state: SkipRNNState, **options: Any
) -> ScanOutput:
    """Run `cpu_scan`, or the event scan where an operand is a wrapper, which only torch's operators can read.

    Raises:
        WrappedTensorError: torch's operators cannot read it either, such as a DTensor beside plain tensors.
    """
    try:
        return cpu_scan(inputs, layers, gate, state, **options)
    except WrappedTensorError as error:
        if gate is not None:
            gate = GateWeights(*gate)  # the code of a checkpoint of version 0.1.0 has no shift
        try:
            output = event_scan(inputs, layers, gate, state, **options)
        except (RuntimeError, NotImplementedError) as cause:
            raise error from cause
        logger.warning_once("A scan runs in plain PyTorch ('events'), several times slower. %s", error)
        return output


def scan_tokens_or_events(
    ids: Tensor,
    table: Tensor,
    layers: Sequence[LayerWeights],
    gate: GateWeights | None,
    state: SkipRNNState,
    **options: Any,
) -> ScanOutput:
    """Run `cpu_scan_tokens`, or embed all tokens and take `scan_or_events` where an operand is a wrapper."""
    try:
        return cpu_scan_tokens(ids, table, layers, gate, state, **options)
    except WrappedTensorError:
        return scan_or_events(torch.nn.functional.embedding(ids, table), layers, gate, state, **options)


CPU = Engine("cpu", cpu_scan, cpu_scan_tokens, follows_autocast=False)
CPU_OR_EVENTS = CPU._replace(scan=scan_or_events, scan_tokens=scan_tokens_or_events)  # what "auto" takes
