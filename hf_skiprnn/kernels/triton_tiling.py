"""How a scan is cut into programs: from shapes, precision and device alone, so that one input gives one result.

Neither B nor T enters a kernel's compiled form: a new length compiles nothing anew, and a new batch size at most one of
the few sizes of a row block. Triton keeps what it has compiled on disk.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
# Of recurrent weights in one program: they stay in its registers (256 KiB a multiprocessor) for the whole scan.
RESIDENT_BYTES = 128 << 10
# Above it a step's weights take longer to read (64 bytes a cycle) than programs take to meet (1-2 us).
SHARED_BYTES = 96 << 10
INLINE_INPUTS = 16  # wider inputs are multiplied in one large product before the scan
FUSED: dict[str, object] = {"enable_fp_fusion": True}  # multiply-adds round once; Triton's default is about to change
LANGUAGE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Tiling(NamedTuple):
    """One launch."""

    resident: bool  # weights and state stay on chip
    rows: int  # of the batch, a program
    block_rows: int  # of its tiles: at least `rows`
    block_units: int
    block_k: int
    split: int  # programs that share a row block's units
    warps: int

    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {
            "ROWS": self.rows,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_UNITS": self.block_units,
            "BLOCK_K": self.block_k,
            "SPLIT": self.split,
        }

    def options(self) -> dict[str, object]:
        """Of the launch."""
        cooperative: dict[str, object] = {"launch_cooperative_grid": True} if self.split > 1 else {}
        return FUSED | {"num_warps": self.warps} | cooperative


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs that run at the same time; 2 when interpreted, so that small batches have several row blocks."""
    if INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """Of float32 products, by torch's own switch (torch.backends.cuda.matmul.fp32_precision, allow_tf32)."""
    is_single = dtype == torch.float32
    return "tf32" if is_single and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tiling(batch: int, units: int, gates: int, layers: int, dtype: torch.dtype, processors: int) -> Tiling:
    """For a scan of B rows, H units and L layers of weights in `dtype`, on a device with that many multiprocessors.

    It is the same for every precision of float32 but for the rows of a tile, and the same for every T.
    """
    padded = max(16, triton.next_power_of_2(units))
    size = dtype.itemsize
    if layers == 1 and gates * padded * padded * size <= RESIDENT_BYTES:
        # As few rows as keep every multiprocessor busy: the tensor cores take 16 at the price of one, and a block
        # waits for its slowest row.
        rows = min(16, triton.next_power_of_2(triton.cdiv(batch, processors)))
        block_rows = rows if dtype == torch.float32 and precision(dtype) == "ieee" else 16
        return Tiling(True, rows, block_rows, padded, padded, 1, 8 if padded > 64 else 4)
    blocks = triton.cdiv(batch, 16)
    block_k = min(padded, 64 if size == 2 else 32)
    split, block_units = 1, min(padded, 32)
    if not INTERPRETED and gates * units * units * size > SHARED_BYTES and blocks < processors:
        split = min(processors // blocks, triton.cdiv(units, 16))
        block_units = min(64, max(16, triton.next_power_of_2(triton.cdiv(units, split))))
        split = min(split, triton.cdiv(units, block_units))
    return Tiling(False, 16, 16, block_units, block_k, split, 4)
