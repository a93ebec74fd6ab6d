"""Divide a scan into programs, by shapes, precision and device, but never by data or by the length T.

So a new length compiles no kernel, and a new batch size compiles at most one for each size of a row block.
`triton.autotune` chooses the numbers of warps and stages when a kernel is first launched, and stores them on disk
beside Triton's compiled kernels. Nothing can be timed in a CUDA graph, so run the model once before you capture it.
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
# Programs that share a row block wait for each other. "0" switches sharing off: every row block has one program.
SHARES = os.environ.get("HF_SKIPRNN_TRITON_SHARE", "1") != "0"
INLINE_INPUTS = 16  # wider inputs are multiplied in one large product before the scan
FUSED: dict[str, object] = {"enable_fp_fusion": True}  # multiply-adds round once; Triton's default is about to change
LANGUAGE = {getattr(torch, name): getattr(tl, name) for name in ("float16", "bfloat16", "float32", "float64")}
# The configs that are timed for every kernel. The first one is used if nothing is timed.
RESIDENT = [triton.Config({}, num_warps=warps, num_stages=1) for warps in (8, 16)]
STREAMED = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((4, 3), (8, 3), (2, 3), (4, 2))]


def tuned(
    configs: list[triton.Config], resets: Sequence[str] = (), restores: Sequence[str] = ()
) -> Callable[[Any], Any]:
    """Return a decorator that times a kernel with each of `configs`, once for every Form, and keeps the fastest.

    Before every trial, and before the launch that counts, the arguments `resets` are set to zero, and `restores`, which
    the kernel reads and writes, get their old values back. A trial may round otherwise than the launch that counts, and
    so have other updates. The interpreter only uses the first config. The key is `form_name`, because Triton stores the
    results on disk as JSON.
    """
    decorator: Callable[[Any], Any] = triton.autotune(
        configs[:1] if INTERPRETED else configs,
        key=["FORM"],
        reset_to_zero=list(resets),
        restore_value=list(restores),
        cache_results=True,
    )
    return decorator


class Tiling(NamedTuple):
    """The division of a scan into programs, for one launch."""

    resident: bool  # weights and state stay on chip
    rows: int  # rows of the batch for each program
    block_rows: int  # rows of its tiles: at least `rows`
    block_units: int
    block_k: int
    split: int  # number of programs that share the units of a row block

    def options(self) -> dict[str, object]:
        """Return the options of the launch."""
        return FUSED | ({"launch_cooperative_grid": True} if self.split > 1 else {})


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run at once; 2 in the interpreter, so that small batches have several row blocks."""
    if INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """Return the precision of float32 products by torch's switch: torch.backends.cuda.matmul.fp32_precision."""
    is_single = dtype == torch.float32
    return "tf32" if is_single and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def padded_units(units: int) -> int:
    """Return H rounded up to the size of a tile: a power of two, at least 16."""
    return int(max(16, triton.next_power_of_2(units)))


def is_resident(units: int, gates: int, layers: int, dtype: torch.dtype) -> bool:
    """Return whether the recurrent weights stay on chip."""
    return layers == 1 and gates * padded_units(units) ** 2 * dtype.itemsize <= RESIDENT_BYTES


def tiling(batch: int, units: int, gates: int, layers: int, dtype: torch.dtype, processors: int) -> Tiling:
    """Return the Tiling of a scan of B rows, H units and L layers in `dtype` on `processors` multiprocessors."""
    padded = padded_units(units)
    if is_resident(units, gates, layers, dtype):
        # A block waits for its slowest row, so take as few rows as keep every multiprocessor busy. Tensor cores compute
        # 16 rows in the time of one.
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
