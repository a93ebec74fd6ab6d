"""Compiles Triton kernels for GPUs that are not there: each launch of the engine becomes a compilation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_skiprnn.kernels import triton_engine, triton_reverse, triton_tiling

TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
KERNELS = {
    triton_engine: ("resident_forward", "streamed_forward"),
    triton_reverse: ("transition", "segments", "resident_backward", "streamed_backward"),
}


class Compiler:
    """Stands where a kernel does: a launch compiles it for every target, and the arguments stay as they are."""

    def __init__(self, kernel: Any, targets: tuple[int, ...], compiled: dict[str, Any]):
        self.kernel, self.targets, self.compiled = kernel, targets, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> "Compiler":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
        options = {name: value for name, value in kwargs.items() if name not in names}
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        assert all(
            p.do_not_specialize for p in self.kernel.params if isinstance(values[p.name], int) and not p.is_constexpr
        )
        signature, fixed, attributes = {}, {}, {}
        for index, name in enumerate(names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                signature[name], attributes[index,] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif name in constants:
                signature[name], fixed[index,] = "constexpr", value
            else:
                signature[name] = "i32"
        if "counts" in values:
            values["counts"].zero_()  # what follows indexes by it
        for target in self.targets:
            source = ASTSource(self.kernel, signature, fixed, attributes)
            result = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            self.compiled[f"{self.kernel.__name__} sm_{target} {values.get('CELL', '')}"] = result


@contextmanager
def compiling(*targets: int, resident: bool = True) -> Iterator[dict[str, Any]]:
    """Inside, scans on the CPU compute nothing, but compile what they would launch on a GPU of 132 multiprocessors."""
    compiled: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(module, name, Compiler(getattr(module, name), targets, compiled))
            patch.setattr(module, "multiprocessors", lambda device: 132)
        if not resident:
            patch.setattr(triton_tiling, "RESIDENT_BYTES", 0)
        yield compiled
