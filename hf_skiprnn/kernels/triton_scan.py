"""The GPU scan in Triton, as PyTorch operators.

`triton_scan` has the signature of every backend (scan_skip_rnn.py). A block of rows runs through all its updates in one
launch; the backward pass visits updates only, and what it needs of skipped steps is computed in large batches.
Products are in the weights' precision (float32 in IEEE or TF32, as torch's own switch says), states, increments and
sums in float32, or all in float64. First derivatives only. Nothing waits for the device, shapes are static: it works
in CUDA graphs and under torch.compile. Kernels compile at their first use.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..cells_skip_rnn import GateWeights, LayerWeights, ScanOutput, SkipRNNState
from .triton_checks import check, empty_results

Twelve = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
OLDEST_GPU = (8, 0)  # Ampere: the first with bfloat16 and TF32 tensor cores


def unavailable_reason(device: int = 0) -> str | None:
    """Why the Triton engine cannot run on that CUDA device, and what to do; None where it can."""
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
    since: Tensor,
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
    sequence: bool,
    record: bool,
) -> Twelve:
    """The scan; with `record` also what its backward pass needs. See `empty_results`."""
    from .triton_engine import forward

    state = (h, c, increment, since)
    with torch.accelerator.device_index(inputs.device.index):  # Triton launches on the current device
        results = forward(inputs, weights, gate, state, mask, forced, cell, sequence, record)
    return tuple(results)  # type: ignore[return-value]


@triton_forward.register_fake
def _(inputs, weights, gate, h, c, increment, since, mask, forced, cell, sequence, record):  # type: ignore[no-untyped-def]
    state = (h, c, increment, since)
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
    since: Tensor,
    mask: Tensor | None,
    gates: Tensor,
    states_h: Tensor,
    states_c: Tensor,
    increments: Tensor,
    times: Tensor,
    counts: Tensor,
    grad_sequence: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_increment: Tensor | None,
    grad_since: Tensor | None,
    grad_num_updates: Tensor | None,
    grad_update_gates: Tensor | None,
    cell: str,
    grad_inputs: bool,
) -> list[Tensor]:
    """Gradients of inputs (empty unless asked for), h, c, increment, since, gate and weights, in this order."""
    from .triton_reverse import Reverse

    state, records = (h, c, increment, since), (gates, states_h, states_c, increments, times, counts)
    grads = (grad_sequence, grad_h, grad_c, grad_increment, grad_since, grad_num_updates, grad_update_gates)
    with torch.accelerator.device_index(inputs.device.index):
        return Reverse(inputs, weights, gate, state, mask, records, grads, cell, grad_inputs).gradients()


@triton_backward.register_fake
def _(inputs, weights, gate, h, c, increment, since, *rest):  # type: ignore[no-untyped-def]
    like = [h.new_empty((0,)) if part is None else part.new_empty(part.shape) for part in (h, c, increment, since)]
    parts = [part.new_empty(part.shape) for part in (*gate, *weights)]
    return [inputs.new_zeros(inputs.shape if rest[-1] else (0,)), *like, *parts]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, gate, h, c, increment, since, mask, _, ctx.cell, ctx.sequence, record = inputs
    if not record:
        return
    ctx.num_gate, ctx.num_weights = len(gate), len(weights)
    ctx.save_for_backward(x, *weights, *gate, h, c, increment, since, mask, *output[6:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    weights, rest = rest[: ctx.num_weights], rest[ctx.num_weights :]
    gate, rest = rest[: ctx.num_gate], rest[ctx.num_gate :]
    state, mask, records = rest[:4], rest[4], rest[5:]
    of_sequence, of_h, of_c, *others = grads[:7]
    cotangents = (of_sequence if ctx.sequence else None, of_h, of_c if state[1] is not None else None, *others)
    needed = bool(ctx.needs_input_grad[0])
    operator = torch.ops.hf_skiprnn.triton_backward
    results = operator(x, weights, gate, *state, mask, *records, *cotangents, ctx.cell, needed)
    of_gate, of_weights = results[5 : 5 + len(gate)], results[5 + len(gate) :]
    of_state = [None if part is None else result for part, result in zip(state, results[1:5], strict=True)]
    return results[0] if needed else None, of_weights, of_gate, *of_state, None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "The 'triton' backend has no second derivative (backward was called with create_graph=True). "
        "Use the 'dense' backend: model.set_scan_backend('dense')."
    )


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
    """The Triton scan; arguments as every backend's (scan_skip_rnn.py), on a CUDA GPU.

    Products take the weights' precision; the state, increments, counters and sums are at least float32.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message says which.
        RuntimeError: a second derivative was asked for.
    """
    flat = [part for layer in layers for part in layer]
    operand = next((part.dtype for part in flat if part is not None), inputs.dtype)
    kept = torch.promote_types(operand, torch.float32)
    weights = [inputs.new_empty(0, dtype=operand) if part is None else part for part in flat]
    gates = [part.to(kept) for part in gate or ()]
    start = [None if part is None else part.to(kept) for part in state]
    floats = [inputs, *weights, *gates, *(part for part in start if part is not None)]
    record = torch.is_grad_enabled() and any(part.requires_grad for part in floats)
    results = torch.ops.hf_skiprnn.triton_forward(
        inputs.to(operand), weights, gates, *start, mask, forced_gates, cell, sequence, record
    )
    held, h, c, increment, since, num_updates, update_gates = results[:7]
    if gate is None:  # nothing was chosen, so there is no gradient: as in the dense scan
        since, num_updates, update_gates = since.detach(), num_updates.detach(), update_gates.detach()
    last = SkipRNNState(h, None if state.c is None else c, increment, since)
    return ScanOutput(held if sequence else None, last, num_updates, update_gates)
