"""How a scan is cut into programs: from shapes, precision, device and a choice that has neither B nor T in it.

Neither enters a kernel's compiled form either: a new length compiles nothing anew, and a new batch size at most one of
the few sizes of a row block. Triton keeps what it has compiled on disk; triton_tuning.py keeps the choices.
"""

import functools
import os
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
# Programs that share a row block wait for each other; "0" gives every row block a program of its own.
SHARES = os.environ.get("HF_SKIPRNN_TRITON_SHARE", "1") != "0"
INLINE_INPUTS = 16  # wider inputs are multiplied in one large product before the scan
FUSED: dict[str, object] = {"enable_fp_fusion": True}  # multiply-adds round once; Triton's default is about to change
LANGUAGE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Choice(NamedTuple):
    """What the shapes leave open, to be found by trying."""

    warps: int
    block_units: int  # at least, where units are cut; a resident kernel takes all
    block_k: int  # likewise
    stages: int  # of products whose weights pass through the caches: how many tiles are on their way


class Tiling(NamedTuple):
    """One launch."""

    resident: bool  # weights and state stay on chip
    rows: int  # of the batch, a program
    block_rows: int  # of its tiles: at least `rows`
    block_units: int
    block_k: int
    split: int  # programs that share a row block's units
    warps: int
    stages: int

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
        return FUSED | {"num_warps": self.warps, "num_stages": self.stages} | cooperative


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


def padded_units(units: int) -> int:
    """H as a tile takes it."""
    return int(max(16, triton.next_power_of_2(units)))


def is_resident(units: int, gates: int, layers: int, dtype: torch.dtype) -> bool:
    """Whether the recurrent weights stay on chip."""
    return layers == 1 and gates * padded_units(units) ** 2 * dtype.itemsize <= RESIDENT_BYTES


def is_shared(units: int, gates: int, dtype: torch.dtype) -> bool:
    """Whether several programs share a row block where there are multiprocessors to spare."""
    return SHARES and not INTERPRETED and gates * units * units * dtype.itemsize > SHARED_BYTES


def choices(units: int, gates: int, layers: int, dtype: torch.dtype) -> list[Choice]:
    """Those worth trying for H units and L layers of weights in `dtype`; the first is taken where none are tried."""
    padded = padded_units(units)
    if is_resident(units, gates, layers, dtype):
        few, many = (8, 16) if padded > 64 else (4, 8) if padded > 32 else (4, 2)
        return [Choice(few, padded, padded, 1), Choice(many, padded, padded, 1)]
    block_units = 16 if is_shared(units, gates, dtype) else min(padded, 32)
    block_k = min(padded, 64 if dtype.itemsize == 2 else 32)
    first = Choice(4, block_units, block_k, 3)
    others = [
        first._replace(warps=2),
        first._replace(block_k=min(padded, 2 * block_k)),
        first._replace(warps=8, block_units=min(padded, 2 * block_units)),
    ]
    return list(dict.fromkeys([first, *others]))


def tiling(
    batch: int, units: int, gates: int, layers: int, dtype: torch.dtype, processors: int, choice: Choice | None = None
) -> Tiling:
    """For a scan of B rows, H units and L layers of weights in `dtype`, on a device with that many multiprocessors.

    It is the same for every precision of float32 but for the rows of a tile, and the same for every T.
    """
    warps, block_units, block_k, stages = choice or choices(units, gates, layers, dtype)[0]
    if is_resident(units, gates, layers, dtype):
        # As few rows as keep every multiprocessor busy: the tensor cores take 16 at the price of one, and a block
        # waits for its slowest row.
        rows = min(16, triton.next_power_of_2(triton.cdiv(batch, processors)))
        block_rows = rows if dtype == torch.float32 and precision(dtype) == "ieee" else 16
        return Tiling(True, rows, block_rows, block_units, block_k, 1, warps, stages)
    blocks = triton.cdiv(batch, 16)
    if not is_shared(units, gates, dtype) or blocks >= processors:
        return Tiling(False, 16, 16, min(padded_units(units), max(32, block_units)), block_k, 1, warps, stages)
    split = min(processors // blocks, triton.cdiv(units, block_units))
    block_units = min(64, max(block_units, triton.next_power_of_2(triton.cdiv(units, split))))
    split = min(split, triton.cdiv(units, block_units))
    return Tiling(False, 16, 16, block_units, block_k, split, warps, stages)
