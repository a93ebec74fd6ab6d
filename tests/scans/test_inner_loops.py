"""The native engine's products keep their sums in registers: no inner loop of a built library stores to the stack.

A broadcast or a sum that the compiler keeps on the stack makes every multiply-add wait for a store. The results are
right, so that no other test notices, and the speed is a fraction.
"""

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest


class Machine(NamedTuple):
    """How a kind of processor's disassembly looks."""

    jump: str  # its target's address is the first group
    leaves: str  # jumps, calls and returns: an innermost loop has one, at its end
    multiply: str  # of vectors: what marks a product's loop
    stack_store: str


MACHINES = {
    "x86_64": Machine(
        jump=r"j\w+\s+([0-9a-f]+)",
        leaves=r"j\w+\s|call|ret",
        multiply=r"v?(fn?m(add|sub)\w*|mul)p[sd]\s",
        stack_store=r"(v?mov\w*|push\w*)\s.*,-?(0x[0-9a-f]+)?\(%r[sb]p[,)]|push",
    ),
    "aarch64": Machine(
        jump=r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\w+,|b)\s+([0-9a-f]+)",
        leaves=r"b\.|bl?r?\s|cbn?z|tbn?z|ret",
        multiply=r"fmla\s+v",
        stack_store=r"st[rpu]\w*\s.*\[(sp|x29)",
    ),
}
LIBRARIES = ("portable", "avx2", "avx512")


def product_loops(disassembly: str, machine: Machine) -> Iterator[list[str]]:
    """Instructions of every innermost loop that multiplies at least four vectors a round."""
    addresses: list[int] = []
    instructions: list[str] = []
    for line in disassembly.splitlines():
        if match := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
            addresses.append(int(match[1], 16))
            instructions.append(match[2])
    index_of = {address: index for index, address in enumerate(addresses)}
    for end, instruction in enumerate(instructions):
        match = re.match(machine.jump, instruction)
        start = index_of.get(int(match[1], 16)) if match else None
        if start is None or start > end:
            continue
        loop = instructions[start : end + 1]
        if any(re.match(machine.leaves, text) for text in loop[:-1]):
            continue
        if sum(bool(re.match(machine.multiply, text)) for text in loop) >= 4:
            yield loop


def stack_stores(loop: list[str], machine: Machine) -> list[str]:
    return [text for text in loop if re.match(machine.stack_store, text)]


@pytest.mark.parametrize("isa", LIBRARIES)
def test_no_inner_loop_stores_to_the_stack(isa):
    machine, objdump = MACHINES.get(platform.machine()), shutil.which("objdump")
    spec = find_spec(f"hf_skiprnn.kernels.cpu._cpu_{isa}")
    if machine is None:
        pytest.skip(f"does not know the instructions of {platform.machine()}")
    if objdump is None:
        pytest.skip("needs objdump (binutils)")
    if spec is None or spec.origin is None:
        pytest.skip(f"the {isa} library is not built")
    disassembly = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", Path(spec.origin)], check=True, capture_output=True, text=True
    ).stdout
    loops = list(product_loops(disassembly, machine))
    assert len(loops) >= 20  # at least the tiles' sizes in float32 and float64: the pattern above still finds them
    bad = ["\n".join(loop) for loop in loops if stack_stores(loop, machine)]
    assert not bad, f"{len(bad)} of {len(loops)} loops store to the stack:\n" + "\n\n".join(bad)


X86_LOOP = """
    10:\tvbroadcastss (%rax),%ymm4
    14:\t{}
    18:\tvfmadd231ps (%rcx),%ymm4,%ymm0
    1c:\tvfmadd231ps 0x20(%rcx),%ymm4,%ymm1
    20:\tvfmadd231ps 0x40(%rcx),%ymm4,%ymm2
    24:\tvfmadd231ps 0x68(%rsp),%ymm4,%ymm3
    28:\tadd    $0x80,%rcx
    2c:\tcmp    %rdx,%rcx
    30:\tjne    10 <f+0x10>
"""


@pytest.mark.parametrize(
    ("instruction", "stores"),
    [
        ("vmovlps %xmm5,0x68(%rsp)", 1),  # gcc 12, of a broadcast written as a loop over lanes
        ("vmovaps %ymm0,-0x7170(%rbp)", 1),
        ("mov    %rsi,(%rsp)", 1),
        ("vmovups 0x68(%rsp),%ymm5", 0),  # a load
        ("mov    -0x70b0(%rbp),%rsi", 0),
        ("vmovups %ymm5,(%rdi)", 0),
    ],
)
def test_a_store_to_the_stack_is_found(instruction, stores):
    machine = MACHINES["x86_64"]
    (loop,) = product_loops(X86_LOOP.format(instruction), machine)
    assert len(stack_stores(loop, machine)) == stores


def test_a_store_to_the_stack_is_found_on_arm():
    machine = MACHINES["aarch64"]
    lines = ["ldp\tq1, q2, [x1], #32", "stp\tq8, q7, [sp, #160]", *["fmla\tv4.4s, v1.4s, v0.s[0]"] * 4]
    text = "\n".join(f"   {4 * i:x}:\t{line}" for i, line in enumerate([*lines, "cmp\tx1, x3", "b.ne\t0 <f>"]))
    (loop,) = product_loops(text, machine)
    assert len(stack_stores(loop, machine)) == 1
