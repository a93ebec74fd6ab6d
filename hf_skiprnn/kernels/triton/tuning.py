"""Which of a few choices (triton_tiling.py) is fastest on this GPU: tried once, kept in memory and on disk.

They are tried on a problem of the tuner's own, with 64 rows and 256 steps that are all updates. So neither B nor T nor
any data enter the key, nothing of the caller's is written, and no other input changes what was chosen. A choice may
change the order of additions, hence the last bits: HF_SKIPRNN_AUTOTUNE=0 takes the first of `choices` everywhere.

A key has a file of its own beside Triton's cache (TRITON_CACHE_DIR), replaced as a whole, so that processes may write
at the same time; one that cannot be read, or that holds no choice of today's, is tuned again.
"""

import functools
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from transformers.utils import logging
from triton import knobs
from triton.errors import TritonError

from hf_skiprnn.model.cells_skip_rnn import CELLS, state_dtype

from .tiling import INLINE_INPUTS, INTERPRETED, SHARES, Choice, choices, precision

VARIABLE = "HF_SKIPRNN_AUTOTUNE"
ROWS, STEPS, REPEATS = 64, 256, 5  # of a trial
Key = tuple[str, ...]
Prepare = Callable[[], Callable[[Choice], object]]

logger = logging.get_logger(__name__)
_chosen: dict[Key, Choice] = {}
_lock = threading.RLock()


def choose(part: str, weights: Sequence[Tensor], cell: str, width: int, prepare: Prepare) -> Choice:
    """The fastest choice for one part of a scan.

    Args:
        part: "forward" or "backward".
        weights: four a layer.
        cell: its name.
        width: of the inputs, I.
        prepare: makes what runs the part on a problem of its own; called only where choices are tried.
    """
    units, layers, dtype = weights[1].shape[1], len(weights) // 4, weights[1].dtype
    candidates = choices(units, CELLS[cell].num_gates, layers, dtype)
    if len(candidates) == 1 or not is_enabled():
        return candidates[0]
    key = key_of(part, layers, weights[1], cell, width)
    with _lock:
        if key not in _chosen:
            found = read(key, candidates)
            if found is None:
                if torch.cuda.is_current_stream_capturing():  # nothing can be timed here
                    return candidates[0]
                found = _try(key, candidates, prepare)
            _chosen[key] = found
        return _chosen[key]


def key_of(part: str, layers: int, weight_hh: Tensor, cell: str, width: int, *others: str) -> Key:
    """Of a part of a scan: all that its kernels depend on but B, T and data."""
    units, dtype = weight_hh.shape[1], weight_hh.dtype
    inline = "inline" if width <= INLINE_INPUTS else "wide"
    sizes = (cell, str(units), str(layers), str(dtype), precision(dtype), inline, str(SHARES))
    return (part, *sizes, *others, *_place(weight_hh))


def is_enabled() -> bool:
    """Whether choices are tried at all."""
    return not INTERPRETED and os.environ.get(VARIABLE, "1") != "0"


def trial(
    weights: Sequence[Tensor], cell: str, width: int
) -> tuple[Tensor, list[Tensor], list[Tensor], tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """Inputs, weights, gate and state of a problem like the caller's, on which every step is an update."""
    operand, kept = weights[1].dtype, state_dtype(weights[1])
    units, layers = weights[1].shape[1], len(weights) // 4
    width = min(width, INLINE_INPUTS + 1)  # wider inputs are multiplied before the kernel
    inputs = weights[0].new_zeros((ROWS, STEPS, width), dtype=operand)
    like = [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights]
    like[0] = like[0][:, :width].contiguous()
    gate = [inputs.new_zeros((1, units), dtype=kept), inputs.new_full((1,), 20.0, dtype=kept)]
    h = inputs.new_zeros((layers, ROWS, units), dtype=kept)
    c = torch.zeros_like(h) if CELLS[cell].has_cell_state else None
    return inputs, like, gate, (h, c, h.new_ones(ROWS), h.new_zeros(ROWS))


def between_events(run: Callable[[], object]) -> float:
    """Milliseconds of a run on the device; waits for it."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def milliseconds(run: Callable[[], object]) -> float:
    """The shortest of a few runs, between device events; infinite where it does not run, as with too little memory."""
    try:
        run()  # compiles
        times = [between_events(run) for _ in range(REPEATS)]
    except (RuntimeError, TritonError) as error:
        logger.info("A choice for the Triton engine does not run here: %s", error)
        return float("inf")
    return min(times)


def _try(key: Key, candidates: list[Choice], prepare: Prepare) -> Choice:
    logger.info("Tuning the Triton engine's %s pass for %s, once on this machine.", key[0], " ".join(key[1:4]))
    run = prepare()
    times = {choice: milliseconds(functools.partial(run, choice)) for choice in candidates}
    best = min(times, key=times.__getitem__)
    if times[best] < float("inf"):  # else the caller meets the first one's error
        write(key, best, times)
    return best


@functools.cache
def _engine() -> str:
    """A hash of the engine's sources."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _place(weight: Tensor) -> Key:
    """What else a time depends on: the device, Triton, this engine."""
    return torch.cuda.get_device_name(weight.device), triton.__version__, _engine()


def path_of(key: Key) -> Path:
    """The key's file."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return Path(knobs.cache.dir) / "hf_skiprnn" / f"{name}.json"


def read(key: Key, candidates: Sequence[Choice]) -> Choice | None:
    """What its file says; None where there is none, it cannot be read, or it holds something else."""
    try:
        held = json.loads(path_of(key).read_text(encoding="utf-8"))
        choice = Choice(**held["choice"])
        return choice if tuple(held["key"]) == key and choice in candidates else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(key: Key, best: Choice, times: dict[Choice, float]) -> None:
    """Keep a choice; without its file, every process tunes for itself."""
    tried = [{"choice": choice._asdict(), "milliseconds": time} for choice, time in times.items()]
    replace({"key": key, "choice": best._asdict(), "tried": tried})


def agreed(key: Key) -> bool:
    """Whether its file says that the kernels agreed with plain PyTorch (triton_trust.py)."""
    try:
        held = json.loads(path_of(key).read_text(encoding="utf-8"))
        return tuple(held["key"]) == key and held["agrees"] is True
    except (OSError, ValueError, TypeError, KeyError):
        return False


def write_agreement(key: Key) -> None:
    """Keep that they agreed; without its file, every process compares."""
    replace({"key": key, "agrees": True})


def replace(held: dict[str, Any]) -> None:
    """Replace the file of the key that is held."""
    path = path_of(held["key"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(held, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        logger.info("What was tuned is not kept: %s", error)
