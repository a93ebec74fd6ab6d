"""Compiles Triton kernels for GPUs that are not there: each launch of the engine becomes a compilation."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_skiprnn.kernels.triton import backward_pass as triton_reverse
from hf_skiprnn.kernels.triton import forward_pass as triton_engine
from hf_skiprnn.kernels.triton import tiling as triton_tiling
from hf_skiprnn.model.cells_skip_rnn import CELLS

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
        if "counts" in values:  # what follows goes by them: as if every step were an update
            values["counts"].fill_(values["T"])
            values["gates"].fill_(1)
            if values["RECORD"]:
                values["times"].copy_(torch.arange(values["T"]))
        for target in self.targets:
            source = ASTSource(self.kernel, signature, fixed, attributes)
            result = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            self.compiled[f"{self.kernel.__name__} sm_{target} {values.get('CELL', '')}"] = result


class Usage(NamedTuple):
    """Of a compiled kernel."""

    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program


def usage(kernel: Any, folder: Path) -> Usage:
    """By NVIDIA's tool, which Triton brings along."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", file], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return Usage(int(found[1]), int(found[2]), kernel.metadata.shared)


@contextmanager
def compiling(*targets: int, resident: bool = True, choice: int = 0) -> Iterator[dict[str, Any]]:
    """Inside, scans on the CPU compute nothing, but compile what they would launch on a GPU of 132 multiprocessors.

    `choice` is the index among the tuner's candidates, the last if there are fewer.
    """
    compiled: dict[str, Any] = {}

    def pick(weights: list[torch.Tensor], cell: str, width: int) -> triton_tiling.Choice:
        units, layers = weights[1].shape[1], len(weights) // 4
        found = triton_tiling.choices(units, CELLS[cell].num_gates, layers, weights[1].dtype)
        return found[min(choice, len(found) - 1)]

    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            for name in names:  # the others do not know the choice
                wanted = targets if choice == 0 or "ward" in name else ()
                patch.setattr(module, name, Compiler(getattr(module, name), wanted, compiled))
            patch.setattr(module, "multiprocessors", lambda device: 132)
            patch.setattr(module, "best_choice", pick)
        if not resident:
            patch.setattr(triton_tiling, "RESIDENT_BYTES", 0)
        yield compiled
