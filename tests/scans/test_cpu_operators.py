"""The native CPU scan as PyTorch operators: compilers, exporters, autocast, checkpointing, processes that fork."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scan_cases import NEEDS_NATIVE
from scan_problems import Case, Problem, assert_close, assert_same_values, everything, make_problem
from tolerances import SINGLE
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from hf_skiprnn.kernels.cpu.operators import cpu_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput

pytestmark = NEEDS_NATIVE


CASES = [Case(inputs=70), Case(cell="gru", mask="ragged", sequence=True, layers=2)]
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")


def arguments(problem: Problem) -> tuple[object, ...]:
    """The arguments of the training operator."""
    weights = [problem.inputs.new_empty(0) if part is None else part for w in problem.layers for part in w]
    gate = [part for part in problem.gate or () if isinstance(part, Tensor)]
    options = (problem.mask, problem.forced_gates, problem.case.cell, problem.case.sequence, problem.case.capped)
    return (problem.inputs, weights, gate, *problem.state, *options)


@pytest.mark.parametrize("case", [*CASES, Case(inputs=300, hidden=20, shifted=True, steps=140, gate_bias=0.0)], ids=str)
def test_operators_pass_opcheck(case: Case) -> None:
    """Every check: opcheck compares whole outputs of two runs, so none may hold memory that nothing has written."""
    problem = make_problem(case)
    training = torch.ops.hf_skiprnn.cpu_training.default
    torch.library.opcheck(training, arguments(problem))
    x, weights, gate, *rest, _ = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, arguments(problem))
    torch.library.opcheck(torch.ops.hf_skiprnn.cpu_inference.default, (x, None, weights, gate, *rest))
    results = training(x, weights, gate, *rest, case.capped)
    state, mask = rest[:4], rest[4]
    grads = [torch.randn_like(part) if part.numel() else None for part in results[:7]]
    backward = (x, weights, gate, *state, mask, results[3], *results[7:], *grads, case.cell, case.capped, True)
    torch.library.opcheck(torch.ops.hf_skiprnn.cpu_backward.default, backward)


@pytest.mark.parametrize(
    ("case", "backend"),
    [(CASES[1], "aot_eager"), pytest.param(CASES[0], "inductor", marks=NEEDS_COMPILER)],
    ids=str,
)
def test_compiles_without_a_graph_break(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # its disk cache does not know our sources
    problem = make_problem(case, dtype=torch.float32)

    def loss(problem_inputs: Tensor) -> tuple[Tensor, ScanOutput]:
        out = replace(problem, inputs=problem_inputs * 2).run(cpu_scan)
        return out.state.h.sin().sum() + out.num_updates.sum(), out

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    leaves = list(problem.leaves().values())
    grads = [torch.autograd.grad(f(problem.inputs)[0], leaves, allow_unused=True) for f in (loss, compiled)]
    for name, mine, theirs in zip(problem.leaves(), *grads, strict=True):
        assert_close(name, mine, theirs, SINGLE.values)
    with torch.no_grad():
        assert_same_values(compiled(problem.inputs)[1], loss(problem.inputs)[1], SINGLE.values)


def test_inference_exports() -> None:
    problem = make_problem(Case(sequence=True), dtype=torch.float32)
    for leaf in problem.leaves().values():
        leaf.requires_grad_(False)

    class Scan(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = replace(problem, inputs=x).run(cpu_scan)
            assert out.sequence is not None
            return out.sequence, out.num_updates

    with torch.no_grad():
        x = problem.inputs.detach()
        steps = torch.export.Dim("steps", min=2, max=1000)
        exported = torch.export.export(Scan(), (x,), dynamic_shapes={"x": {1: steps}})
        longer = torch.cat((x, x), 1)
        for mine, theirs in zip(exported.module()(longer), Scan()(longer), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    problem = make_problem(Case())
    want = torch.autograd.grad(problem.run(cpu_scan).state.h.sin().sum(), problem.inputs)[0]

    def run(x: Tensor) -> Tensor:
        return replace(problem, inputs=x).run(cpu_scan).state.h

    h = torch.utils.checkpoint.checkpoint(run, problem.inputs, use_reentrant=reentrant)
    problem.inputs.grad = None
    h.sin().sum().backward()
    assert torch.equal(problem.inputs.grad, want)


def test_second_derivative_is_refused() -> None:
    problem = make_problem(Case())
    h = problem.run(cpu_scan).state.h
    with pytest.raises(RuntimeError, match="Use the 'dense' backend"):
        torch.autograd.grad(h.sum(), problem.inputs, create_graph=True)
    h = torch.ops.hf_skiprnn.cpu_training(*arguments(problem))[1]
    (grad,) = torch.autograd.grad(h.sum(), problem.inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="Use the 'dense' backend"):
        grad.sum().backward()


def test_autocast_leaves_the_scan_in_float32() -> None:
    problem = make_problem(Case(steps=40), dtype=torch.float32)
    want = everything(problem, cpu_scan)
    with torch.autocast("cpu", torch.bfloat16):
        got = everything(problem, cpu_scan)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("first", ["want = total()", "want = torch.ones(3000, 3000).add_(1).sum()"])
def test_runs_in_a_forked_child(first: str) -> None:
    """As a DataLoader's workers do, after the parent's threads have run: for a scan, or only for another operation."""
    code = (
        "import os, sys, torch; sys.path[:0] = sys.argv[1:]\n"
        "from scan_problems import Case, make_problem, gradients\n"
        "from hf_skiprnn.kernels.cpu.operators import cpu_scan\n"
        "torch.set_num_threads(2)\n"
        "problem = make_problem(Case(batch=20))\n"
        "def total():\n"
        "    out = problem.run(cpu_scan)\n"
        "    return sum(float(g.sum()) for g in gradients(problem, out).values())\n"
        f"{first}\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    print(total())\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "print(total())\n"
    )
    tests = Path(__file__).parent
    command = [sys.executable, "-u", "-c", code, tests, tests.parent]
    done = subprocess.run(command, check=True, timeout=120, stdout=subprocess.PIPE, text=True)
    child, parent = done.stdout.split()
    assert child == parent


class Rows(torch.utils.data.Dataset[Tensor]):
    """Rows that are scanned where they are loaded."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return replace(self.problem, inputs=self.problem.inputs + index).run(cpu_scan).state.h


def test_runs_in_forked_workers_of_a_data_loader() -> None:
    torch.set_num_threads(2)  # the parent's team has run before the fork
    rows = Rows(make_problem(Case(batch=20)))
    want = [rows[index] for index in range(len(rows))]
    loader = DataLoader(rows, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for mine, theirs in zip(loader, want, strict=True):
        assert torch.equal(mine, theirs)
