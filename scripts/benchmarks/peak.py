"""Measure what one core reaches: the bounds that the benchmarks compare with.

    python -m scripts.benchmarks.peak    # print multiply-adds, and bytes read from each cache

A matrix product of PyTorch cannot be used for this: MKL reaches only 88 % of the peak on a core with AVX-512.
"""

import ctypes
import os
import subprocess
from pathlib import Path

from .rows import ROOT, instruction_set

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = {
    "portable": ("-DBYTES=16",),
    "avx2": ("-DBYTES=32", "-mavx2", "-mfma"),
    "avx512": ("-DBYTES=64", "-mavx512f"),
}


def _measurements() -> ctypes.CDLL:
    isa = instruction_set()
    library = ROOT / "build" / f"peak-{isa}.so"
    library.parent.mkdir(exist_ok=True)
    options = ("-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-o", str(library))
    subprocess.run([os.environ.get("CC", "cc"), *FLAGS[isa], str(SOURCE), *options], check=True)
    functions = ctypes.CDLL(str(library))
    functions.peak_flops.restype = functions.read_bandwidth.restype = ctypes.c_double
    functions.read_bandwidth.argtypes = [ctypes.c_long]
    return functions


def peak_flops() -> float:
    """Measure float32 operations a second on one core, with this process's instruction set.

    Raises:
        subprocess.CalledProcessError: the C compiler (the variable CC; else `cc`) does not compile peak.c.
    """
    return float(_measurements().peak_flops())


def read_bandwidth(size: int) -> float:
    """Measure the bytes a second that one core reads in order, again and again, from `size` bytes.

    Raises:
        subprocess.CalledProcessError: the C compiler does not compile peak.c.
    """
    return float(_measurements().read_bandwidth(size))


if __name__ == "__main__":
    print(f"{instruction_set()}: {peak_flops() / 1e9:.0f} GFLOP/s of multiply-adds on one core")
    for kilobytes in (24, 256, 1024, 16 << 10, 64 << 10):
        print(f"{kilobytes:6} KB: {read_bandwidth(kilobytes << 10) / 1e9:.0f} GB/s")
