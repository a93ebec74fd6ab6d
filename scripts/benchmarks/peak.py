"""Measure the peak of one core in float32 multiply-adds: the bound that the benchmarks compare with.

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


def peak_flops() -> float:
    """Measure float32 operations a second on one core, with this process's instruction set.

    Raises:
        subprocess.CalledProcessError: the C compiler (the variable CC; else `cc`) does not compile peak.c.
    """
    isa = instruction_set()
    library = ROOT / "build" / f"peak-{isa}.so"
    library.parent.mkdir(exist_ok=True)
    options = ("-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-o", str(library))
    subprocess.run([os.environ.get("CC", "cc"), *FLAGS[isa], str(SOURCE), *options], check=True)
    measure = ctypes.CDLL(str(library)).peak_flops
    measure.restype = ctypes.c_double
    return measure()
