"""The native CPU engine's libraries: which one this process uses, and calls of its C interface.

If a compiler is found, three libraries (portable, AVX2, AVX-512) are built from one source with the package; on ARM the
portable one alone, with NEON; on Windows none. The widest one that this CPU can run is used. On newer Intel processors
the AVX-512 library also uses AMX, for models in bfloat16.
HF_SKIPRNN_CPU_ISA=portable|avx2|avx512|amx selects another instruction set.
"""

import ctypes
import functools
import hashlib
import os
import struct
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_skiprnn.model.dense_scan_skip_rnn import IMPORTED_IN

ABI = 8  # csrc/call.h
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "amx")  # by `skip_rnn_cpu_level`
LIBRARIES = {"amx": "avx512"}  # of a set that has no library of its own
ISA_VARIABLE = "HF_SKIPRNN_CPU_ISA"
REMEDY = (
    "With a C++17 compiler (g++ or clang++) on this machine, reinstall: "
    "`pip install --no-cache-dir --force-reinstall --no-deps hf_skiprnn`, or `pip install -e .` in a checkout. "
    "Everything works without the engine on the 'events' backend."
)
NOT_FOR_WINDOWS = "There is no native CPU engine for Windows. Everything works without it on the 'events' backend."


class Call(ctypes.Structure):
    """SkipRnnCall of csrc/call.h, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("size", "is_double", "is_bf16", "cell", "batch", "steps", "inputs", "units", "layers")
        ),
        *((name, ctypes.c_int64) for name in ("threads", "every", "rows", "capped", "amx", "rounded")),
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


def engine() -> ctypes.CDLL:
    """Return the library that this process uses.

    Raises:
        RuntimeError: the engine was not built, was built of another source, or cannot run here; with the remedy.
    """
    isa = instruction_set()
    return _load(LIBRARIES.get(isa, isa))


def instruction_set() -> str:
    """Return which of INSTRUCTION_SETS this process uses; raises as `engine` does."""
    return _instruction_set(os.environ.get(ISA_VARIABLE))


def unavailable_reason() -> str | None:
    """Return why `engine` raises, or None if it does not."""
    try:
        engine()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def _instruction_set(wanted: str | None) -> str:
    best = _load("portable").skip_rnn_cpu_level()
    if wanted is None:  # a compiler may not know the newest set
        return next(isa for isa in reversed(INSTRUCTION_SETS[: best + 1]) if _find(LIBRARIES.get(isa, isa)))
    if wanted not in INSTRUCTION_SETS:
        raise RuntimeError(f"{ISA_VARIABLE} must be one of {', '.join(INSTRUCTION_SETS)}; got {wanted!r}.")
    if INSTRUCTION_SETS.index(wanted) > best:
        raise RuntimeError(
            f"{ISA_VARIABLE}={wanted}, but this machine runs {INSTRUCTION_SETS[best]} at most. Unset it."
        )
    return wanted


def _find(isa: str) -> Path | None:
    """Return the file of a library, or None if it was not built."""
    spec = find_spec(f"{__package__}._cpu_{isa}")
    return None if spec is None or spec.origin is None else Path(spec.origin)


@functools.cache
def _load(isa: str) -> ctypes.CDLL:
    path = _find(isa)
    if path is None:
        if sys.platform == "win32":
            raise RuntimeError(NOT_FOR_WINDOWS)
        raise RuntimeError(f"The native CPU engine is not built (no {isa} library). {REMEDY}")
    try:
        _refuse_part_of_a_file(path)
        library = ctypes.CDLL(str(path))
        abi, built_of, use_team_of = library.skip_rnn_abi(), library.skip_rnn_source, library.skip_rnn_use_team_of
    except (OSError, AttributeError) as error:  # no library, one for another machine, a folder mounted noexec, ...
        raise RuntimeError(f"The native CPU engine ({isa}) cannot be loaded: {error}. {REMEDY}") from error
    if abi != ABI:
        raise RuntimeError(f"The native CPU engine ({isa}) is of another version of this package. {REMEDY}")
    built_of.restype = ctypes.c_uint64
    source = Path(__file__).parent / "csrc"
    if source.is_dir() and built_of() != source_hash(source):  # only a checkout has the source
        raise RuntimeError(f"The native CPU engine ({isa}) was built of another source than {source}. {REMEDY}")
    use_team_of(IMPORTED_IN)
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
    """Raise OSError if an ELF file is shorter than its header says: loading it would kill the process (SIGBUS)."""
    with path.open("rb") as file:
        header = file.read(64)
        if header[:5] != b"\x7fELF\x02":  # another format: the loader itself refuses it
            return
        size = file.seek(0, os.SEEK_END)
    sections, entry, count = struct.unpack("<40xQ10xHH2x", header.ljust(64))
    if size < (end := sections + entry * count):  # the table of sections ends the file
        raise OSError(f"{path} is cut off: it has {size} bytes of {end}")


CANCELLED = 3  # SkipRnnStatus of csrc/call.h
LONG = 1 << 23  # multiply-adds; below, a call takes a few milliseconds at most
_is_watching = False


def run(name: str, call: Call, accumulated: Tensor) -> None:
    """Run skip_rnn_forward or skip_rnn_backward; Ctrl-C ends it.

    Python's signal handler then runs, and usually raises KeyboardInterrupt. If it does not (a trainer's handler may
    only request a checkpoint after the step), the call runs again from the start, with `accumulated` set to zero.
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
    """Run a call; SIGINT ends it with status CANCELLED. For the main thread, as only there Python handles signals.

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
