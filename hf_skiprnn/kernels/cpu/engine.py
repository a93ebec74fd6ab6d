"""Calls of the native CPU engine on checked tensors."""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hf_skiprnn.kernels.operands import check_memory, check_operands
from hf_skiprnn.model.cells_skip_rnn import CELLS, state_dtype

from .library import Call, instruction_set, run

CELL_NUMBERS = {name: number for number, name in enumerate(CELLS)}
# The results of a forward call, in order: the operators' first seven, and a training forward's records.
RESULTS = (
    *("sequence", "h", "c", "increment", "steps_since_update", "num_updates", "update_gates"),
    *("updates", "counts", "checkpoints", "products"),
)
RECORDS = ("increment", "updates", "counts", "checkpoints", "products")  # the results that a backward call reads
COTANGENTS = tuple(f"grad_{name}" for name in RESULTS[:7])


class Blocking(NamedTuple):
    """How the backward pass divides its work; the forward pass keeps its records accordingly."""

    every: int  # updates between two checkpoints
    rows: int  # number of rows that are recomputed together
    keeps_products: bool  # the lowest layer's input products are computed once, for forward and backward

    @classmethod
    def of(cls, batch: int, inputs: int, units: int, layers: int) -> "Blocking":
        """Choose by the shape alone, so that gradients do not depend on the number of threads."""
        rows = max(1, min((batch + 1) // 2, 12))
        wide = max(inputs, units) > 256
        return cls(max(16, min(128, 512 // rows)) if wide else 16, rows, inputs >= 64)


class Pointers:
    """Addresses of tensors' data; keeps the contiguous copies that were needed alive."""

    def __init__(self) -> None:
        self.keep: list[Any] = []

    def of(self, tensor: Tensor | None) -> int | None:
        """Return the address of a tensor's numbers in C order; None for None and for an empty tensor."""
        if tensor is None or not tensor.numel():
            return None
        if not tensor.is_contiguous() or tensor.is_neg():  # the negative bit says that memory holds -x
            tensor = tensor.contiguous().resolve_neg()
            self.keep.append(tensor)
        if not (address := tensor.data_ptr()):  # the native code takes null for "none"
            raise ValueError(f"A tensor of shape {tuple(tensor.shape)} has no memory of its own.")
        return address

    def array(self, tensors: Sequence[Tensor]) -> int:
        """Return the address of an array of the tensors' addresses."""
        array = (ctypes.c_void_p * len(tensors))(*map(self.of, tensors))
        self.keep.append(array)
        return ctypes.addressof(array)


def _call(
    inputs: Tensor,
    ids: Tensor | None,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
    rounded: bool,
) -> tuple[Call, Pointers]:
    """Return a call with its inputs filled in, in the order of Call's fields, and what must live until it returns."""
    pointers = Pointers()
    batch, steps = (inputs if ids is None else ids).shape[:2]
    width, units, layers = inputs.shape[-1], weights[1].shape[1], len(weights) // 4
    every, rows, _ = Blocking.of(batch, width, units, layers)
    call = Call(
        ctypes.sizeof(Call),
        inputs.dtype == torch.float64,
        inputs.dtype == torch.bfloat16,
        CELL_NUMBERS[cell],
        *(batch, steps, width, units, layers),
        *(torch.get_num_threads(), every, rows, 0, instruction_set() == "amx", rounded),
        *map(pointers.of, (inputs, ids, mask, forced)),
        pointers.array(weights),
        *map(pointers.of, gate[:2] or (None, None)),
        *map(pointers.of, state),
        *map(pointers.of, gate[2:]),
    )
    return call, pointers


def _result_shapes(
    batch: int, steps: int, weights: Sequence[Tensor], state: Sequence[Tensor | None]
) -> list[tuple[int, ...]]:
    layers, units = len(weights) // 4, weights[1].shape[1]
    held = (layers, batch, units)
    return [(batch, steps, units), held, held if state[1] is not None else (0,), *[(batch,)] * 3, (batch, steps)]


def _record_shapes(inputs: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor | None]) -> list[tuple[int, ...]]:
    (batch, steps, width), units, layers = inputs.shape, weights[1].shape[1], len(weights) // 4
    blocking = Blocking.of(batch, width, units, layers)
    return [
        (batch, steps),
        (batch,),
        (batch, steps // blocking.every, layers, 1 + (state[1] is not None), units),
        (batch, steps, weights[1].shape[0]) if blocking.keeps_products else (0,),
    ]


def empty_results(
    inputs: Tensor, ids: Tensor | None, weights: Sequence[Tensor], state: Sequence[Tensor | None], sequence: bool
) -> list[Tensor]:
    """Return tensors for the results of a forward call, the first seven of RESULTS, in the state's precision."""
    batch, steps, like = *(inputs if ids is None else ids).shape[:2], cast(Tensor, state[0])
    of_sequence, *others, of_gates = _result_shapes(batch, steps, weights, state)
    shapes = (of_sequence if sequence else (0,), *others)
    return [*(like.new_empty(shape) for shape in shapes), like.new_zeros(of_gates)]


def empty_records(
    inputs: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor | None], *, zeros: bool = False
) -> list[Tensor]:
    """Return tensors for what a training forward keeps: update times, counts, checkpoints, input products.

    Only what belongs to updates is written. `zeros` clears the rest, for results that others see; the times always are.
    """
    updates, counts, *others = _record_shapes(inputs, weights, state)
    new = inputs.new_zeros if zeros else inputs.new_empty
    times = inputs.new_zeros(updates, dtype=torch.int32), inputs.new_empty(counts, dtype=torch.int32)
    return [*times, *(new(shape) for shape in others)]


def check(
    inputs: Tensor,
    ids: Tensor | None,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
    training: bool = False,
) -> None:
    """Check everything that the native code relies on but the ids' range. In inference inputs may be bfloat16."""
    if inputs.dtype not in (torch.float32, torch.float64) and (training or inputs.dtype != torch.bfloat16):
        raise ValueError(
            "The native CPU scan reads float32 or float64, in inference also bfloat16; "
            f"got {inputs.dtype}{' in training' * training}."
        )
    for name, part in (("inputs", inputs), ("ids", ids)):
        if part is not None and not part.is_cpu:
            raise ValueError(f"{name} must be on the CPU; got {part.device}. Use another backend there.")
    check_operands(inputs, weights, gate, state, mask, forced, cell, kept=state_dtype(inputs), ids=ids)


def forward(
    inputs: Tensor,
    ids: Tensor | None,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
    sequence: bool,
    training: bool = False,
    zeros: bool = False,
    rounded: bool = False,
) -> list[Tensor]:
    """Run a forward call and return its results in the order of RESULTS, in training with `empty_records`.

    `rounded`: inputs and weights are float32, but each number is a bfloat16 number.
    """
    check(inputs, ids, weights, gate, state, mask, forced, cell, training)
    if ids is not None and ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < len(inputs)):
        raise IndexError(f"ids must be in 0 .. {len(inputs) - 1}; got {int(ids.min())} .. {int(ids.max())}.")
    results = empty_results(inputs, ids, weights, state, sequence)
    if training:
        results += empty_records(inputs, weights, state, zeros=zeros)
    call, keep = _call(inputs, ids, weights, gate, state, mask, forced, cell, rounded)
    for name, result in zip(RESULTS, results, strict=False):  # records come in training only
        setattr(call, name, keep.of(result))
    run("skip_rnn_forward", call, results[6])
    return results


def reverse(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    records: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    cell: str,
    capped: int,
    rounded: bool,
    grad_inputs: bool,
) -> list[Tensor]:
    """Run a backward call and return the gradients of inputs (empty unless asked for), state, gate and weights.

    Everything is checked again: since the forward call, weights may have been replaced, or saved tensors changed.
    """
    check(inputs, None, weights, gate, state, mask, None, cell, training=True)
    grads = [None if grad is None else grad.to(inputs.dtype) for grad in grads]
    _check_records(records, grads, inputs, weights, state)
    results = empty_gradients(inputs, weights, gate, state, grad_inputs)
    call, keep = _call(inputs, None, weights, gate, state, mask, None, cell, rounded)
    call.capped = capped
    for name, record in zip(RECORDS, records, strict=True):
        setattr(call, name, keep.of(record))
    for name, grad in zip(COTANGENTS, grads, strict=True):
        setattr(call, name, keep.of(grad))
    of_inputs, *of_state = map(keep.of, results[:5])
    call.grad_x, call.grad_h0, call.grad_c0, call.grad_increment0, call.grad_steps_since_update0 = of_inputs, *of_state
    if gate:
        call.grad_gate_weight, call.grad_gate_bias = map(keep.of, results[5:7])
    if len(gate) > 2:
        call.grad_gate_shift = keep.of(results[7])
    call.grad_weights = keep.array(results[5 + len(gate) :])
    run("skip_rnn_backward", call, results[0])
    return results


def _check_records(
    records: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    inputs: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor | None],
) -> None:
    """Check records and cotangents as `check` does operands, and the numbers that native code takes for positions."""
    batch, steps = inputs.shape[:2]
    shapes = ((batch,), *_record_shapes(inputs, weights, state), *_result_shapes(batch, steps, weights, state))
    dtypes = (inputs.dtype, torch.int32, torch.int32, *[inputs.dtype] * 9)
    names, parts = (*RECORDS, *COTANGENTS), (*records, *grads)
    for name, part, shape, dtype in zip(names, parts, shapes, dtypes, strict=True):
        if part is None:
            continue
        if part.shape != shape or part.dtype != dtype or part.device != inputs.device:
            raise ValueError(
                f"{name} of the backward pass must be {dtype} of shape {shape} on {inputs.device}; "
                f"got {part.dtype} of shape {tuple(part.shape)} on {part.device}. Something has changed a saved tensor."
            )
        check_memory(name, part)
    for name, part, most in (("updates", records[1], steps - 1), ("counts", records[2], steps)):
        if part.numel() and not (0 <= int(part.min()) and int(part.max()) <= most):
            raise ValueError(
                f"{name} of the backward pass must be in 0 .. {most}. Something has changed a saved tensor."
            )


def empty_gradients(
    inputs: Tensor, weights: Sequence[Tensor], gate: Sequence[Tensor], state: Sequence[Tensor | None], grad_inputs: bool
) -> list[Tensor]:
    """Return tensors for the results of `reverse`."""
    like = [inputs.new_empty(part.shape if part is not None else (0,)) for part in (*state, *gate, *weights)]
    return [inputs.new_zeros(inputs.shape if grad_inputs else (0,)), *like]
