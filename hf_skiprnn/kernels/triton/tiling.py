"""How a scan is cut into programs: from shapes, precision and device, never from data or from the length T.

So a new length compiles nothing anew, and a new batch size at most one of the few sizes of a row block. What shapes
leave open (warps, stages) `triton.autotune` finds out when a kernel is first launched, and keeps on disk beside
Triton's compiled kernels. Inside a CUDA graph nothing can be timed: run the model once before it is captured.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
# Of recurrent weights in one program: they stay in its registers (256 KiB a multiprocessor) for the whole scan.
RESIDENT_BYTES = 128 << 10
# Above it a step's weights take longer to read (64 bytes a cycle) than programs take to meet (1-2 us).
SHARED_BYTES = 96 << 10
# Programs that share a row block wait for each other; "0" gives every row block a program of its own.
SHARES = os.environ.get("HF_SKIPRNN_TRITON_SHARE", "1") != "0"
INLINE_INPUTS = 16  # wider inputs are multiplied in one large product before the scan
FUSED: dict[str, object] = {"enable_fp_fusion": True}  # multiply-adds round once; Triton's default is about to change
LANGUAGE = {getattr(torch, name): getattr(tl, name) for name in ("float16", "bfloat16", "float32", "float64")}
# What is tried of every kernel; the first serves where nothing is.
RESIDENT = [triton.Config({}, num_warps=warps, num_stages=1) for warps in (8, 16)]
STREAMED = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((4, 3), (8, 3), (2, 3), (4, 2))]


def tuned(
    configs: list[triton.Config], resets: Sequence[str] = (), restores: Sequence[str] = ()
) -> Callable[[Any], Any]:
    """Return a decorator: a kernel is timed with each of `configs`, once for every Form, and Triton keeps the fastest.

    Before every trial the arguments `resets` are zeroed; `restores`, which the kernel reads and writes, are put back.
    Interpreted, the first config alone serves.
    """
    decorator: Callable[[Any], Any] = triton.autotune(
        configs[:1] if INTERPRETED else configs,
        key=["F"],
        reset_to_zero=list(resets),
        restore_value=list(restores),
        cache_results=True,
    )
    return decorator


class Tiling(NamedTuple):
    """One launch."""

    resident: bool  # weights and state stay on chip
    rows: int  # of the batch, a program
    block_rows: int  # of its tiles: at least `rows`
    block_units: int
    block_k: int
    split: int  # programs that share a row block's units

    def options(self) -> dict[str, object]:
        """Of the launch."""
        return FUSED | ({"launch_cooperative_grid": True} if self.split > 1 else {})


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at the same time; 2 when interpreted, so that small batches have several row blocks."""
    if INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """How float32 products round, by torch's own switch (torch.backends.cuda.matmul.fp32_precision, allow_tf32)."""
    is_single = dtype == torch.float32
    return "tf32" if is_single and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def padded_units(units: int) -> int:
    """H as a tile takes it: a power of two, at least 16."""
    return int(max(16, triton.next_power_of_2(units)))


def is_resident(units: int, gates: int, layers: int, dtype: torch.dtype) -> bool:
    """Whether the recurrent weights stay on chip."""
    return layers == 1 and gates * padded_units(units) ** 2 * dtype.itemsize <= RESIDENT_BYTES


def tiling(batch: int, units: int, gates: int, layers: int, dtype: torch.dtype, processors: int) -> Tiling:
    """The cut of a scan of B rows, H units and L layers of weights in `dtype`, on that many multiprocessors."""
    padded = padded_units(units)
    if is_resident(units, gates, layers, dtype):
        # As few rows as keep every multiprocessor busy: the tensor cores take 16 at the price of one, and a block
        # waits for its slowest row.
        rows = min(16, triton.next_power_of_2(triton.cdiv(batch, processors)))
        block_rows = rows if dtype == torch.float32 and precision(dtype) == "ieee" else 16
        return Tiling(True, rows, block_rows, padded, padded, 1)
    block_k = min(padded, 64 if dtype.itemsize == 2 else 32)
    blocks = triton.cdiv(batch, 16)
    shares = SHARES and not INTERPRETED and gates * units * units * dtype.itemsize > SHARED_BYTES
    if not shares or blocks >= processors:
        return Tiling(False, 16, 16, min(padded, 32), block_k, 1)
    split = min(processors // blocks, triton.cdiv(units, 16))
    block_units = min(64, max(16, triton.next_power_of_2(triton.cdiv(units, split))))
    return Tiling(False, 16, 16, block_units, block_k, min(split, triton.cdiv(units, block_units)))
