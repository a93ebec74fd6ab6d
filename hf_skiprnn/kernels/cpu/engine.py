"""The native CPU engine: its libraries, and calls of their C interface on checked tensors.

Three libraries are built of one source (portable, AVX2, AVX-512) with the package, where a compiler is found; the
widest that this CPU runs is used. HF_SKIPRNN_CPU_ISA=portable|avx2|avx512 forces one.
"""

import ctypes
import functools
import hashlib
import os
import struct
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_skiprnn.kernels.operands import check_memory, check_operands
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
    """Return the library that this process uses.

    Raises:
        RuntimeError: the engine was not built, was built of another source, or cannot run here; with the remedy.
    """
    return _engine(os.environ.get(ISA_VARIABLE))


def unavailable_reason() -> str | None:
    """Return why `engine` raises, or None if it does not."""
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
    path = Path(spec.origin)
    try:
        _refuse_part_of_a_file(path)
        library = ctypes.CDLL(str(path))
        abi, built_of = library.skip_rnn_abi(), library.skip_rnn_source
    except (OSError, AttributeError) as error:  # no library, one for another machine, a folder mounted noexec, ...
        raise RuntimeError(f"The native CPU engine ({isa}) cannot be loaded: {error}. {REMEDY}") from error
    if abi != ABI:
        raise RuntimeError(f"The native CPU engine ({isa}) is of another version of this package. {REMEDY}")
    built_of.restype = ctypes.c_uint64
    source = Path(__file__).parent / "csrc"
    if source.is_dir() and built_of() != source_hash(source):  # only a checkout has the source
        raise RuntimeError(f"The native CPU engine ({isa}) was built of another source than {source}. {REMEDY}")
    for function in (library.skip_rnn_forward, library.skip_rnn_backward):
        function.argtypes, function.restype = [ctypes.POINTER(Call)], ctypes.c_int
    library.skip_rnn_watch_interrupt.restype = ctypes.c_void_p
    library.skip_rnn_stop_watching.restype = None
    return library


def source_hash(folder: Path) -> int:
    """Return the hash that build_native.py compiles into the libraries: 60 bits of the source's SHA-256."""
    source = b"".join(path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix in (".h", ".cpp"))
    return int(hashlib.sha256(source).hexdigest()[:15], 16)


def _refuse_part_of_a_file(path: Path) -> None:
    """Raise OSError where an ELF file is shorter than its header says. To load one would end the process (SIGBUS)."""
    with path.open("rb") as file:
        header = file.read(64)
        if header[:5] != b"\x7fELF\x02":  # another format: the loader itself refuses it
            return
        size = file.seek(0, os.SEEK_END)
    sections, entry, count = struct.unpack("<40xQ10xHH2x", header.ljust(64))
    if size < (end := sections + entry * count):  # the table of sections ends the file
        raise OSError(f"{path} is cut off: it has {size} bytes of {end}")


class Blocking(NamedTuple):
    """How the backward pass divides its work; the forward pass keeps its records accordingly."""

    every: int  # updates between two checkpoints
    rows: int  # recomputed together
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
) -> tuple[Call, Pointers]:
    """Return a call with its inputs filled in, in the order of Call's fields, and what must live until it returns."""
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


CANCELLED = 3  # SkipRnnStatus of csrc/call.h
LONG = 1 << 23  # multiply-adds; below, a call takes a few milliseconds at most
_is_watching = False


def _run(name: str, call: Call, accumulated: Tensor) -> None:
    """Run skip_rnn_forward or skip_rnn_backward; Ctrl-C ends it.

    The handler of the signal then runs, and usually raises KeyboardInterrupt. If it does not (a trainer's may only ask
    for a checkpoint at the next step), nothing may be lost: the call starts again, from `accumulated` set to zero.
    """
    library = engine()
    function = getattr(library, name)
    work = call.batch * call.steps * call.layers * call.units * (call.units + call.inputs)
    is_main = work >= LONG and threading.current_thread() is threading.main_thread()
    while (status := _watched(library, function, call) if is_main else function(ctypes.byref(call))) == CANCELLED:
        accumulated.zero_()
    if status == 2:
        raise MemoryError("The native CPU scan ran out of memory; use a smaller batch.")
    if status:
        raise RuntimeError(f"The native CPU scan refused its arguments (status {status}); this is a bug in hf_skiprnn.")


def _watched(library: ctypes.CDLL, function: Any, call: Call) -> int:
    """Run a call that SIGINT ends with CANCELLED. Python acts on signals in its main thread only, so only there.

    Python runs signal handlers after calls, never between `try` and the first call in it, so that the native handler is
    removed whenever it was installed. A handler that scans finds the flag set, and its scan is not watched.
    """
    global _is_watching  # noqa: PLW0603 - there is one main thread, and one handler of SIGINT
    if _is_watching:
        return int(function(ctypes.byref(call)))
    watch, stop = library.skip_rnn_watch_interrupt, library.skip_rnn_stop_watching
    try:
        _is_watching = True
        call.cancel = watch()
        return int(function(ctypes.byref(call)))
    finally:
        call.cancel = None
        _is_watching = False
        stop()


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
    """Return tensors for the results of a forward call, the first seven of RESULTS."""
    batch, steps = (inputs if ids is None else ids).shape[:2]
    of_sequence, *others, of_gates = _result_shapes(batch, steps, weights, state)
    shapes = (of_sequence if sequence else (0,), *others)
    return [*(inputs.new_empty(shape) for shape in shapes), inputs.new_zeros(of_gates)]


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
) -> list[Tensor]:
    """Run a forward call and return its results in the order of RESULTS, in training with `empty_records`."""
    check(inputs, ids, weights, gate, state, mask, forced, cell)
    if ids is not None and ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < len(inputs)):
        raise IndexError(f"ids must be in 0 .. {len(inputs) - 1}; got {int(ids.min())} .. {int(ids.max())}.")
    results = empty_results(inputs, ids, weights, state, sequence)
    if training:
        results += empty_records(inputs, weights, state, zeros=zeros)
    call, keep = _call(inputs, ids, weights, gate, state, mask, forced, cell)
    for name, result in zip(RESULTS, results, strict=False):  # records come in training only
        setattr(call, name, keep.of(result))
    _run("skip_rnn_forward", call, results[6])
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
    grad_inputs: bool,
) -> list[Tensor]:
    """Run a backward call and return the gradients of inputs (empty unless asked for), state, gate and weights.

    Everything is checked again: since the forward call, weights may have been replaced, or saved tensors changed.
    """
    check(inputs, None, weights, gate, state, mask, None, cell)
    grads = [None if grad is None else grad.to(inputs.dtype) for grad in grads]
    _check_records(records, grads, inputs, weights, state)
    results = empty_gradients(inputs, weights, gate, state, grad_inputs)
    call, keep = _call(inputs, None, weights, gate, state, mask, None, cell)
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
    _run("skip_rnn_backward", call, results[0])
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
