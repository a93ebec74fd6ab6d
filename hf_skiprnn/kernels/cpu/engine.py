"""The native CPU engine: its libraries, and calls of their C interface on checked tensors.

Three libraries are built of one source (portable, AVX2, AVX-512) with the package, where a compiler is found; the
widest that this CPU runs is used. HF_SKIPRNN_CPU_ISA=portable|avx2|avx512 forces one.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_skiprnn.kernels.operands import check_operands
from hf_skiprnn.model.cells_skip_rnn import CELLS

ABI = 4  # csrc/call.h
INSTRUCTION_SETS = ("portable", "avx2", "avx512")  # by `skip_rnn_cpu_level`
ISA_VARIABLE = "HF_SKIPRNN_CPU_ISA"
REMEDY = (
    "With a C++17 compiler (g++ or clang++) on this machine, reinstall: "
    "`pip install --no-cache-dir --force-reinstall --no-deps hf_skiprnn`, or `pip install -e .` in a checkout. "
    "Everything works without the engine on the 'events' backend."
)


class Call(ctypes.Structure):
    """SkipRnnCall of csrc/call.h, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("size", "is_double", "cell", "batch", "steps", "inputs", "units", "layers")
        ),
        *((name, ctypes.c_int64) for name in ("threads", "every", "rows")),
        *((name, ctypes.c_void_p) for name in ("x", "ids", "mask", "forced", "weights", "gate_weight", "gate_bias")),
        *(
            (name, ctypes.c_void_p)
            for name in ("h0", "c0", "increment0", "steps_since_update0", "gate_shift", "cancel")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("sequence", "h", "c", "increment", "steps_since_update", "num_updates", "update_gates")
        ),
        *((name, ctypes.c_void_p) for name in ("updates", "counts", "checkpoints", "products")),
        *(
            (name, ctypes.c_void_p)
            for name in ("grad_sequence", "grad_h", "grad_c", "grad_increment", "grad_steps_since_update")
        ),
        *((name, ctypes.c_void_p) for name in ("grad_num_updates", "grad_update_gates", "grad_x", "grad_weights")),
        *((name, ctypes.c_void_p) for name in ("grad_gate_weight", "grad_gate_bias")),
        *((name, ctypes.c_void_p) for name in ("grad_h0", "grad_c0", "grad_increment0", "grad_steps_since_update0")),
        ("grad_gate_shift", ctypes.c_void_p),
    ]


CELL_NUMBERS = {name: number for number, name in enumerate(CELLS)}
# The results of a forward call, in order: the operators' first seven, and a training forward's records.
RESULTS = (
    *("sequence", "h", "c", "increment", "steps_since_update", "num_updates", "update_gates"),
    *("updates", "counts", "checkpoints", "products"),
)
RECORDS = ("increment", "updates", "counts", "checkpoints", "products")  # what a backward call reads of them
COTANGENTS = tuple(f"grad_{name}" for name in RESULTS[:7])


def engine() -> ctypes.CDLL:
    """The library that this process uses.

    Raises:
        RuntimeError: the engine was not built, is older than its source, or cannot run here; with the remedy.
    """
    return _engine(os.environ.get(ISA_VARIABLE))


def unavailable_reason() -> str | None:
    """Why `engine` raises, or None where it does not."""
    try:
        engine()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def _engine(wanted: str | None) -> ctypes.CDLL:
    best = _load("portable").skip_rnn_cpu_level()
    if wanted is None:
        return _load(INSTRUCTION_SETS[best])
    if wanted not in INSTRUCTION_SETS:
        raise RuntimeError(f"{ISA_VARIABLE} must be one of {', '.join(INSTRUCTION_SETS)}; got {wanted!r}.")
    if INSTRUCTION_SETS.index(wanted) > best:
        raise RuntimeError(f"{ISA_VARIABLE}={wanted}, but this CPU runs {INSTRUCTION_SETS[best]} at most. Unset it.")
    return _load(wanted)


@functools.cache
def _load(isa: str) -> ctypes.CDLL:
    spec = find_spec(f"{__package__}._cpu_{isa}")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"The native CPU engine is not built (no {isa} library). {REMEDY}")
    sources = list((Path(__file__).parent / "csrc").glob("*"))  # only in a checkout
    built = Path(spec.origin).stat().st_mtime
    if any(source.stat().st_mtime > built for source in sources):
        raise RuntimeError(f"The native CPU engine ({isa}) is older than its source. {REMEDY}")
    library = ctypes.CDLL(spec.origin)
    if library.skip_rnn_abi() != ABI:
        raise RuntimeError(f"The native CPU engine ({isa}) is of another version of this package. {REMEDY}")
    for function in (library.skip_rnn_forward, library.skip_rnn_backward):
        function.argtypes, function.restype = [ctypes.POINTER(Call)], ctypes.c_int
    return library


class Blocking(NamedTuple):
    """How the backward pass divides its work; the forward pass keeps its records accordingly."""

    every: int  # updates between two checkpoints
    rows: int  # recomputed together
    keeps_products: bool  # the lowest layer's input products are computed once, for forward and backward

    @classmethod
    def of(cls, batch: int, inputs: int, units: int, layers: int) -> "Blocking":
        """From the shape alone: gradients then do not depend on the number of threads."""
        rows = max(1, min((batch + 1) // 2, 12))
        wide = max(inputs, units) > 256
        return cls(max(16, min(128, 512 // rows)) if wide else 16, rows, inputs >= 64)


Optional = Tensor | None


class Pointers:
    """Addresses of tensors' data, and contiguous copies that live as long as this does."""

    def __init__(self) -> None:
        self.keep: list[Any] = []

    def of(self, tensor: Optional) -> int | None:
        """Of its numbers in order; None for None and for an empty tensor."""
        if tensor is None:
            return None
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.keep.append(tensor)
        return tensor.data_ptr() or None

    def array(self, tensors: Sequence[Tensor]) -> int:
        """Of an array of their addresses."""
        array = (ctypes.c_void_p * len(tensors))(*map(self.of, tensors))
        self.keep.append(array)
        return ctypes.addressof(array)


def _call(
    inputs: Tensor,
    ids: Optional,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Optional],
    mask: Optional,
    forced: Optional,
    cell: str,
) -> tuple[Call, Pointers]:
    """The call's inputs, and what must live until it returns. The arguments stand in the order of Call's fields."""
    pointers = Pointers()
    batch, steps = (inputs if ids is None else ids).shape[:2]
    width, units, layers = inputs.shape[-1], weights[1].shape[1], len(weights) // 4
    every, rows, _ = Blocking.of(batch, width, units, layers)
    call = Call(
        ctypes.sizeof(Call),
        inputs.dtype == torch.float64,
        CELL_NUMBERS[cell],
        *(batch, steps, width, units, layers),
        *(torch.get_num_threads(), every, rows),
        *map(pointers.of, (inputs, ids, mask, forced)),
        pointers.array(weights),
        *map(pointers.of, gate[:2] or (None, None)),
        *map(pointers.of, state),
        *map(pointers.of, gate[2:]),
    )
    return call, pointers


def _run(function: Any, call: Call) -> None:
    status = function(ctypes.byref(call))
    if status == 2:
        raise MemoryError("The native CPU scan ran out of memory; use a smaller batch.")
    if status:
        raise RuntimeError(f"The native CPU scan refused its arguments (status {status}); this is a bug in hf_skiprnn.")


def empty_results(
    inputs: Tensor, ids: Optional, weights: Sequence[Tensor], state: Sequence[Optional], sequence: bool
) -> list[Tensor]:
    """Return empty tensors for the results of a forward call, the first seven of RESULTS."""
    batch, steps = (inputs if ids is None else ids).shape[:2]
    layers, units = len(weights) // 4, weights[1].shape[1]
    return [
        inputs.new_empty((batch, steps, units) if sequence else (0,)),
        inputs.new_empty(layers, batch, units),
        inputs.new_empty((layers, batch, units) if state[1] is not None else (0,)),
        inputs.new_empty(batch),
        inputs.new_empty(batch),
        inputs.new_empty(batch),
        inputs.new_zeros(batch, steps),
    ]


def empty_records(inputs: Tensor, weights: Sequence[Tensor], state: Sequence[Optional]) -> list[Tensor]:
    """Empty tensors for what a training forward keeps: update times, counts, checkpoints, input products."""
    (batch, steps, width), units, layers = inputs.shape, weights[1].shape[1], len(weights) // 4
    blocking = Blocking.of(batch, width, units, layers)
    return [
        inputs.new_empty(batch, steps, dtype=torch.int32),
        inputs.new_empty(batch, dtype=torch.int32),
        inputs.new_empty(batch, steps // blocking.every, layers, 1 + (state[1] is not None), units),
        inputs.new_empty((batch, steps, weights[1].shape[0]) if blocking.keeps_products else (0,)),
    ]


def check(
    inputs: Tensor,
    ids: Optional,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Optional],
    mask: Optional,
    forced: Optional,
    cell: str,
) -> None:
    """Check everything that the native code relies on but the ids' range."""
    if inputs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"The native CPU scan computes in float32 or float64; got {inputs.dtype}.")
    for name, part in (("inputs", inputs), ("ids", ids)):
        if part is not None and not part.is_cpu:
            raise ValueError(f"{name} must be on the CPU; got {part.device}. Use another backend there.")
    check_operands(inputs, weights, gate, state, mask, forced, cell, kept=inputs.dtype, ids=ids)


def forward(
    inputs: Tensor,
    ids: Optional,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Optional],
    mask: Optional,
    forced: Optional,
    cell: str,
    sequence: bool,
    training: bool = False,
) -> list[Tensor]:
    """A forward call: its results, in the order of RESULTS, in training with the records."""
    check(inputs, ids, weights, gate, state, mask, forced, cell)
    if ids is not None and ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < len(inputs)):
        raise IndexError(f"ids must be in 0 .. {len(inputs) - 1}; got {int(ids.min())} .. {int(ids.max())}.")
    results = empty_results(inputs, ids, weights, state, sequence)
    if training:
        results += empty_records(inputs, weights, state)
    call, keep = _call(inputs, ids, weights, gate, state, mask, forced, cell)
    for name, result in zip(RESULTS, results, strict=False):  # records come in training only
        setattr(call, name, keep.of(result))
    _run(engine().skip_rnn_forward, call)
    return results


def reverse(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Optional],
    mask: Optional,
    records: Sequence[Tensor],
    grads: Sequence[Optional],
    cell: str,
    grad_inputs: bool,
) -> list[Tensor]:
    """A backward call: gradients of inputs (empty unless asked for), state, gate and weights."""
    results = empty_gradients(inputs, weights, gate, state, grad_inputs)
    call, keep = _call(inputs, None, weights, gate, state, mask, None, cell)
    for name, record in zip(RECORDS, records, strict=True):
        setattr(call, name, keep.of(record))
    grads = [None if grad is None else grad.to(inputs.dtype) for grad in grads]
    for name, grad in zip(COTANGENTS, grads, strict=True):
        setattr(call, name, keep.of(grad))
    of_inputs, *of_state = map(keep.of, results[:5])
    call.grad_x, call.grad_h0, call.grad_c0, call.grad_increment0, call.grad_steps_since_update0 = of_inputs, *of_state
    if gate:
        call.grad_gate_weight, call.grad_gate_bias = map(keep.of, results[5:7])
    if len(gate) > 2:
        call.grad_gate_shift = keep.of(results[7])
    call.grad_weights = keep.array(results[5 + len(gate) :])
    _run(engine().skip_rnn_backward, call)
    return results


def empty_gradients(
    inputs: Tensor, weights: Sequence[Tensor], gate: Sequence[Tensor], state: Sequence[Optional], grad_inputs: bool
) -> list[Tensor]:
    """Tensors for the results of `reverse`."""
    like = [inputs.new_empty(part.shape if part is not None else (0,)) for part in (*state, *gate, *weights)]
    return [inputs.new_zeros(inputs.shape if grad_inputs else (0,)), *like]
