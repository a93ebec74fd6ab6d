"""The GPU scan in Triton, as PyTorch operators. It has not been run on a GPU yet, so it must be selected by name.

`triton_scan` has the signature of every backend (dense_scan_skip_rnn.py). One launch computes all updates of a block of
rows. The backward pass goes from update to update, and computes the terms of skipped steps in large batches. Products
have the weights' precision (float32 in IEEE or TF32, by torch's own switch); states, increments and sums have float32;
or everything has float64. There are only first derivatives.

For its backward pass a scan keeps the state after every update, with memory for one at every step:
L * B * (T + 1) * H numbers, twice for an LSTM. Shapes are static and no pass waits for the device, so scans can be
captured in CUDA graphs and traced by torch.compile. Kernels compile, and are tuned, at their first use.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_skiprnn.kernels.operands import (
    cotangents,
    no_second_derivative,
    scan_output,
    split_gradients,
    unpack_saved,
)
from hf_skiprnn.model.cells_skip_rnn import GateWeights, LayerWeights
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState

from .buffers import check, empty_results

logger = logging.get_logger(__name__)

Ten = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
OLDEST_GPU = (8, 0)  # Ampere: the first with bfloat16 and TF32 tensor cores
UNTESTED = (
    "The 'triton' backend has not been run on a GPU yet: its kernels are tested interpreted on a CPU, and compiled. "
    "Check its results, and its speed, against the 'events' backend."
)


def unavailable_reason(device: int = 0) -> str | None:
    """Return why the Triton engine cannot run on a CUDA device, and what to do; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux; CUDA builds of torch bring it along)."
    if not torch.cuda.is_available():
        return (
            "There is no CUDA GPU here, or torch is built without CUDA. Use 'events', or 'cpu' for inputs on the CPU."
        )
    if torch.version.hip is not None:
        return "The Triton engine is not tested on AMD GPUs. Use 'events'."
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 is the least. Use 'events'."
    return None


@torch.library.custom_op("hf_skiprnn::triton_forward", mutates_args=())
def triton_forward(
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
    record: bool,
) -> Ten:
    """Run the scan; with `record`, also return the records of its backward pass. See `empty_results`."""
    from .forward_pass import forward

    logger.warning_once(UNTESTED)
    state = (h, c, increment, steps_since_update)
    with torch.accelerator.device_index(inputs.device.index):  # Triton launches on the current device
        return tuple(forward(inputs, weights, gate, state, mask, forced, cell, sequence, record))  # type: ignore[return-value]  # ten of them


@triton_forward.register_fake
def _(inputs, weights, gate, h, c, increment, steps_since_update, mask, forced, cell, sequence, capped, record):  # type: ignore[no-untyped-def]  # as the operator
    state = (h, c, increment, steps_since_update)
    check(inputs, weights, gate, state, mask, forced, cell)
    return tuple(empty_results(inputs, weights, state, sequence, record))


@torch.library.custom_op("hf_skiprnn::triton_backward", mutates_args=())
def triton_backward(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    increment: Tensor,
    steps_since_update: Tensor,
    mask: Tensor | None,
    records: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    cell: str,
    capped: int,
    grad_inputs: bool,
) -> list[Tensor]:
    """Return the gradients of inputs (empty unless wanted), h, c, increment, steps_since_update, gate and weights.

    `records` and `grads`: see `BackwardPass`.
    """
    from .backward_pass import BackwardPass

    state = (h, c, increment, steps_since_update)
    with torch.accelerator.device_index(inputs.device.index):
        return BackwardPass(inputs, weights, gate, state, mask, records, grads, cell, capped, grad_inputs).gradients()


@triton_backward.register_fake
def _(inputs, weights, gate, h, c, increment, steps_since_update, mask, records, grads, cell, capped, grad_inputs):  # type: ignore[no-untyped-def]  # as the operator
    state = (h, c, increment, steps_since_update)
    like = [h.new_empty(0) if part is None else part.new_empty(part.shape) for part in (*state, *gate, *weights)]
    return [inputs.new_zeros(inputs.shape if grad_inputs else (0,)), *like]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, gate, h, c, increment, steps_since_update, mask, _, ctx.cell, ctx.sequence, ctx.capped, record = inputs
    if not record:
        return
    ctx.num_gate, ctx.num_weights = len(gate), len(weights)
    ctx.save_for_backward(x, *weights, *gate, h, c, increment, steps_since_update, mask, *output[6:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, weights, gate, state, mask, records = unpack_saved(ctx)
    of_results, needed = cotangents(grads, state[1] is not None, ctx.sequence), bool(ctx.needs_input_grad[0])
    operator = torch.ops.hf_skiprnn.triton_backward
    results = operator(x, weights, gate, *state, mask, records, of_results, ctx.cell, ctx.capped, needed)
    return *split_gradients(results, state, len(gate), needed), None, None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise no_second_derivative("triton")


triton_forward.register_autograd(_backward, setup_context=_setup)
triton_backward.register_autograd(_no_second_derivative)


def triton_scan(
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
    """Run the Triton scan on a CUDA GPU; the arguments are those of every backend (dense_scan_skip_rnn.py).

    Products take the weights' precision; the state, increments, counters and sums are at least float32.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message says which.
        RuntimeError: a second derivative was asked for, or the rows have shifts of the gate of their own.
    """
    if getattr(gate, "shift", None) is not None:
        raise RuntimeError(
            "Scan backend 'triton' has no shift of the gate for each row (gate_shift, update_rate, gate_noise). Use "
            "'events', or model.set_gate_shift(number) for all rows."
        )
    flat = [part for layer in layers for part in layer]
    operand = next((part.dtype for part in flat if part is not None), inputs.dtype)
    kept = torch.promote_types(operand, torch.float32)
    weights = [inputs.new_empty(0, dtype=operand) if part is None else part for part in flat]
    gates = [part.to(kept) for part in (gate or ())[:3] if part is not None]
    start = [None if part is None else part.to(kept) for part in state]
    operands = (inputs, *weights, *gates, *start)
    record = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in operands)
    results = torch.ops.hf_skiprnn.triton_forward(
        *(inputs.to(operand), weights, gates, *start, mask, forced_gates),
        *(cell, sequence, getattr(gate, "capped", 0), record),
    )
    return scan_output(results, state.c is not None, sequence, gate is not None)
