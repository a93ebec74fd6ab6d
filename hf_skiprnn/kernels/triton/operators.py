"""The GPU scan in Triton, as PyTorch operators.

`triton_scan` has the signature of every backend (scan_skip_rnn.py). A block of rows runs through all its updates in one
launch; the backward pass visits updates only, and what it needs of skipped steps is computed in large batches.
Products are in the weights' precision (float32 in IEEE or TF32, as torch's own switch says), states, increments and
sums in float32, or all in float64. First derivatives only. No scan waits for the device; between the forward and the
backward one a number is read, see triton_room.py. In CUDA graphs and under torch.compile nothing waits, shapes are
static, and records have room for an update at every step. Kernels compile at their first use.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hf_skiprnn.model.cells_skip_rnn import GateWeights, LayerWeights
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState

from .buffers import check, empty_results
from .room import Needs, chunk_steps, expected_slots, keeps_records_to_itself

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
    slots: int,
) -> Twelve:
    """The scan; with `record` also what its backward pass needs. See `empty_results`.

    `slots`, at least 2, hold a row's initial state and its updates' states; of a row with more updates the first ones
    are lost, and the backward pass scans again. 0 means T + 1, and that no backward pass waits to know.
    """
    from .forward_pass import forward

    state = (h, c, increment, since)
    with torch.accelerator.device_index(inputs.device.index):  # Triton launches on the current device
        results = forward(inputs, weights, gate, state, mask, forced, cell, sequence, record, slots)
    return tuple(results)  # type: ignore[return-value]


@triton_forward.register_fake
def _(inputs, weights, gate, h, c, increment, since, mask, forced, cell, sequence, record, slots):  # type: ignore[no-untyped-def]
    state = (h, c, increment, since)
    check(inputs, weights, gate, state, mask, forced, cell)
    return tuple(empty_results(inputs, weights, state, sequence, record, slots))


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
    rooms: Sequence[int],
) -> list[Tensor]:
    """Gradients of inputs (empty unless asked for), h, c, increment, since, gate and weights, in this order.

    `rooms`: updates of the row with most of them, chunk by chunk; none given: as many as steps.
    """
    from .backward_pass import Reverse

    state, records = (h, c, increment, since), (gates, states_h, states_c, increments, times, counts)
    grads = (grad_sequence, grad_h, grad_c, grad_increment, grad_since, grad_num_updates, grad_update_gates)
    with torch.accelerator.device_index(inputs.device.index):
        return Reverse(inputs, weights, gate, state, mask, records, grads, cell, grad_inputs, rooms).gradients()


@triton_backward.register_fake
def _(inputs, weights, gate, h, c, increment, since, *rest):  # type: ignore[no-untyped-def]
    like = [h.new_empty((0,)) if part is None else part.new_empty(part.shape) for part in (h, c, increment, since)]
    parts = [part.new_empty(part.shape) for part in (*gate, *weights)]
    return [inputs.new_zeros(inputs.shape if rest[-2] else (0,)), *like, *parts]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, gate, h, c, increment, since, mask, forced, ctx.cell, ctx.sequence, record, slots = inputs
    if not record:
        return
    ctx.num_gate, ctx.num_weights, ctx.needs = len(gate), len(weights), None
    if slots and x.shape[0] and x.shape[1]:
        ctx.needs = _needs(x, weights, gate, output[6])
    ctx.save_for_backward(x, *weights, *gate, h, c, increment, since, mask, forced, *output[6:])
    ctx.set_materialize_grads(False)


def _needs(x: Tensor, weights: Sequence[Tensor], gate: Sequence[Tensor], gates: Tensor) -> Needs:
    batch, steps, width = x.shape
    chunk = chunk_steps(batch, steps, width, weights[1].shape[1], len(weights) // 4)
    return Needs(gates, chunk, _teacher(weights, gate))


def _teacher(weights: Sequence[Tensor], gate: Sequence[Tensor]) -> Tensor:
    """By what updates are remembered: the gate's weight, which autocast leaves alone; without one, the lowest W_hh."""
    return gate[0] if gate else weights[1]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    weights, rest = rest[: ctx.num_weights], rest[ctx.num_weights :]
    gate, rest = rest[: ctx.num_gate], rest[ctx.num_gate :]
    state, mask, forced, records = rest[:4], rest[4], rest[5], rest[6:]
    rooms: list[int] = []
    if ctx.needs is not None:
        rooms, most = ctx.needs.read()
        while most >= records[1].shape[2]:  # once, unless torch's switch of precision was thrown in between
            with torch.no_grad():
                again = torch.ops.hf_skiprnn.triton_forward(
                    x, weights, gate, *state, mask, forced, ctx.cell, False, True, most + 1
                )
            records = again[6:]
            rooms, most = _needs(x, weights, gate, records[0]).read()
    of_sequence, of_h, of_c, *others = grads[:7]
    cotangents = (of_sequence if ctx.sequence else None, of_h, of_c if state[1] is not None else None, *others)
    needed = bool(ctx.needs_input_grad[0])
    operator = torch.ops.hf_skiprnn.triton_backward
    results = operator(x, weights, gate, *state, mask, *records, *cotangents, ctx.cell, needed, rooms)
    of_gate, of_weights = results[5 : 5 + len(gate)], results[5 + len(gate) :]
    of_state = [None if part is None else result for part, result in zip(state, results[1:5], strict=True)]
    return results[0] if needed else None, of_weights, of_gate, *of_state, None, None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "The 'triton' backend has no second derivative (backward was called with create_graph=True). "
        "Use the 'dense' backend: model.set_scan_backend('dense')."
    )


triton_forward.register_autograd(_backward, setup_context=_setup)
triton_backward.register_autograd(_no_second_derivative)


def _slots(
    inputs: Tensor, weights: Sequence[Tensor], gate: Sequence[Tensor], forced: Tensor | None, sequence: bool
) -> int:
    """For the records of a scan: see `triton_forward`."""
    reads_all = not gate and forced is None
    if reads_all or torch.compiler.is_compiling() or (inputs.is_cuda and torch.cuda.is_current_stream_capturing()):
        return 0
    steps = inputs.shape[1]
    if sequence or not keeps_records_to_itself():
        return steps + 1
    return expected_slots(_teacher(weights, gate), steps)


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
    gates = [part.to(kept) for part in gate or () if part is not None]
    start = [None if part is None else part.to(kept) for part in state]
    floats = [inputs, *weights, *gates, *(part for part in start if part is not None)]
    record = torch.is_grad_enabled() and any(part.requires_grad for part in floats)
    slots = _slots(inputs, weights, gates, forced_gates, sequence) if record else 0
    results = torch.ops.hf_skiprnn.triton_forward(
        inputs.to(operand), weights, gates, *start, mask, forced_gates, cell, sequence, record, slots
    )
    held, h, c, increment, since, num_updates, update_gates = results[:7]
    if gate is None:  # nothing was chosen, so there is no gradient: as in the dense scan
        since, num_updates, update_gates = since.detach(), num_updates.detach(), update_gates.detach()
    last = SkipRNNState(h, None if state.c is None else c, increment, since)
    return ScanOutput(held if sequence else None, last, num_updates, update_gates)
