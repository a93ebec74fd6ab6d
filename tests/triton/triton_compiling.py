"""Compiles Triton kernels for GPUs that are not there: each launch of the engine becomes a compilation."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_skiprnn.kernels.triton import backward_pass, forward_pass, tiling

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
    forward_pass: ("resident_forward", "streamed_forward"),
    backward_pass: ("segments", "resident_backward", "streamed_backward"),
}


class Arguments:
    """A launch's arguments as the compiler takes them: a type of each, and the values that it knows."""

    def __init__(self) -> None:
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}

    def describe(self, value: Any, *path: int) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(self.describe(part, *path, index) for index, part in enumerate(value)))
        if isinstance(value, torch.Tensor):
            self.attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if isinstance(value, triton.language.constexpr) or value is None:
            self.constants[path] = value
            return "constexpr"
        return "i32"


class Compiler:
    """Stands where a kernel does: a launch compiles it for every target, and the arguments stay as they are.

    Of a tuned kernel the candidates `configs` are compiled.
    """

    def __init__(self, kernel: Any, targets: tuple[int, ...], configs: Sequence[int], compiled: dict[str, Any]):
        candidates = getattr(kernel, "configs", None)
        self.kernel = kernel if candidates is None else kernel.fn
        self.options = [candidates[i].all_kwargs() for i in configs if i < len(candidates)] if candidates else [{}]
        self.targets, self.compiled = targets, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> "Compiler":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        params = self.kernel.params
        values = dict(zip(self.kernel.arg_names, args, strict=False))
        launch = {name: value for name, value in kwargs.items() if name not in self.kernel.arg_names}
        arguments = Arguments()
        signature = {}
        for index, param in enumerate(params):
            value = values.get(param.name, kwargs.get(param.name))
            assert param.is_constexpr or param.do_not_specialize or not isinstance(value, int), param.name
            value = triton.language.constexpr(value) if param.is_constexpr else value
            signature[param.name] = arguments.describe(value, index)
        if "results" in values:  # what follows goes by them: as if every step were an update
            values["results"].counts.fill_(values["T"])
            values["gates"].fill_(1)
        for target in self.targets:
            for options in self.options:
                source = ASTSource(self.kernel, signature, arguments.constants, arguments.attributes)
                result = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch | options)
                warps = f"{result.metadata.num_warps} warps, {result.metadata.num_stages} stages"
                self.compiled[f"{self.kernel.__name__} sm_{target} {warps}"] = result


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
def compiling(*targets: int, resident: bool = True, configs: Sequence[int] = (0,)) -> Iterator[dict[str, Any]]:
    """Inside, scans on the CPU compute nothing, but compile what they would launch on a GPU of 132 multiprocessors."""
    compiled: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(module, name, Compiler(getattr(module, name), targets, configs, compiled))
        patch.setattr(forward_pass, "multiprocessors", lambda device: 132)
        if not resident:
            patch.setattr(tiling, "RESIDENT_BYTES", 0)
        yield compiled
