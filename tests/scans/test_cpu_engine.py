"""The native CPU engine: instruction sets, precision, threads, memory layouts, tokens."""

import platform
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from scan_cases import NEEDS_NATIVE
from scan_problems import (
    Case,
    Problem,
    assert_close,
    assert_is_the_definition,
    assert_same_values,
    cotangents,
    everything,
    gradients,
    make_problem,
)
from tolerances import EXACT, SINGLE
from torch import Tensor

from hf_skiprnn.kernels.cpu import library
from hf_skiprnn.kernels.cpu.operators import cpu_scan, cpu_scan_tokens
from hf_skiprnn.model.cells_skip_rnn import CELLS, GateWeights, LayerWeights
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.outputs_skip_rnn import SkipRNNState

pytestmark = NEEDS_NATIVE


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("cell", list(CELLS))
def test_every_instruction_set(cell: str, instruction_set: str) -> None:
    for case in (
        Case(layers=2, sequence=True, mask="ragged"),
        Case(inputs=300, hidden=20, steps=31),
        Case(hidden=130, steps=9),
    ):
        assert_is_the_definition(make_problem(replace(case, cell=cell)), cpu_scan)


@pytest.mark.parametrize("inputs", [1, 70])
@pytest.mark.parametrize("cell", list(CELLS))
def test_single_precision_under_replayed_gates(cell: str, inputs: int, instruction_set: str) -> None:
    problem = make_problem(Case(cell=cell, inputs=inputs, steps=60, hidden=40, batch=9, sequence=True, layers=2))
    with torch.no_grad():
        gates = problem.run(dense_scan).update_gates.bool()
    want = problem.run(dense_scan, forced_gates=gates)
    copy = problem.to(torch.float32)
    got = copy.run(cpu_scan, forced_gates=gates)
    assert torch.equal(got.update_gates.bool(), gates)
    for name, mine, theirs in (("h", got.state.h, want.state.h), ("sequence", got.sequence, want.sequence)):
        assert_close_by_row(name, mine, theirs, SINGLE.values)
    wanted = gradients(problem, want)
    for name, grad in gradients(copy, got).items():
        assert_close_by_row(f"gradient of {name}", grad, wanted[name], SINGLE.gradients)


def assert_close_by_row(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Difference of a row against the norm of the largest row: a small row next to it has no digits of its own."""
    assert got.dtype == torch.float32, name
    difference = torch.linalg.vector_norm(got.detach().double() - want.detach(), dim=-1).max()
    scale = torch.linalg.vector_norm(want.detach(), dim=-1).max()
    assert difference <= tolerance * scale, f"{name}: {float(difference / scale):.1e} of the largest row"


@pytest.mark.parametrize("inputs", [1, 70])
@pytest.mark.parametrize("cell", list(CELLS))
def test_the_number_of_threads_changes_no_bit(cell: str, inputs: int) -> None:
    case = Case(cell=cell, inputs=inputs, batch=37, steps=60, hidden=19, layers=2, sequence=True, mask="ragged")
    problem = make_problem(case, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(everything(problem, cpu_scan))
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            assert torch.equal(mine, first)


@pytest.mark.parametrize("inputs", [1, 70])
@pytest.mark.parametrize("cell", list(CELLS))
def test_the_rest_of_the_batch_changes_no_bit(cell: str, inputs: int, instruction_set: str) -> None:
    case = Case(cell=cell, inputs=inputs, batch=29, steps=50, hidden=35, layers=2, sequence=True)
    problem = make_problem(case, dtype=torch.float32)
    whole = problem.run(cpu_scan)
    grads = torch.autograd.grad([p for p, _ in cotangents(whole)], problem.inputs, [g for _, g in cotangents(whole)])[0]
    for rows in ([0], [28], [3, 4], [5, 1, 9, 20, 21, 22, 23], list(range(14))):
        part = replace(problem, inputs=problem.inputs[rows], state=problem.state.reorder(torch.tensor(rows)))
        out = part.run(cpu_scan)
        assert out.sequence is not None
        assert whole.sequence is not None
        assert torch.equal(out.sequence, whole.sequence[rows])
        assert torch.equal(out.state.h, whole.state.h[:, rows])
        assert torch.equal(out.update_gates, whole.update_gates[rows])
        pairs = cotangents(whole)
        mine = [part for part in (out.sequence, *out.state, out.num_updates, out.update_gates) if part is not None]
        by_row = [c[:, rows] if c.dim() == 3 and c.shape[0] == 2 else c[rows] for _, c in pairs]
        (grad,) = torch.autograd.grad(mine, problem.inputs, by_row)
        assert torch.equal(grad[rows], grads[rows])


def test_strides_and_alignment() -> None:
    problem = make_problem(Case(inputs=5, hidden=12, layers=2, sequence=True))
    want = everything(problem, cpu_scan)

    def elsewhere(x: Tensor) -> Tensor:
        """The same numbers, every other element of memory that starts off alignment."""
        memory = torch.empty(2 * x.numel() + 1, dtype=x.dtype)
        view = memory[1:].as_strided(x.shape, [2 * s for s in x.stride()])
        return view.copy_(x.detach()).requires_grad_()

    moved = replace(
        problem,
        inputs=elsewhere(problem.inputs),
        layers=[LayerWeights(*(None if part is None else elsewhere(part) for part in w)) for w in problem.layers],
        gate=problem.gate and GateWeights(*map(elsewhere, problem.gate[:2])),
        state=SkipRNNState(*(None if part is None else elsewhere(part) for part in problem.state)),
    )
    for mine, theirs in zip(everything(moved, cpu_scan), want, strict=True):
        assert torch.equal(mine, theirs)


def test_expanded_state_gets_its_gradient() -> None:
    problem = make_problem(Case(batch=5))
    initial = torch.randn(1, 1, 7, dtype=torch.float64, requires_grad=True)
    grads = []
    for scan in (dense_scan, cpu_scan):
        state = problem.state._replace(h=initial.expand(1, 5, 7))
        (grad,) = torch.autograd.grad(replace(problem, state=state).run(scan).state.h.sin().sum(), initial)
        grads.append(grad)
    assert_close("initial_h", grads[1], grads[0], EXACT.gradients)


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ISA_VARIABLE, "sse9")
    assert "must be one of" in str(library.unavailable_reason())
    with pytest.raises(RuntimeError, match="sse9"):
        make_problem(Case()).run(cpu_scan)


@pytest.mark.parametrize(
    ("isa", "foreign"),
    [("portable", r"%[yz]mm|%k[0-7]|\tv[a-z]"), ("avx2", r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")],
)
def test_a_library_holds_no_instructions_of_a_wider_one(isa: str, foreign: str) -> None:
    """A compiler's settings (-march=native in CXXFLAGS) or a shared template must not leak into them."""
    spec, objdump = find_spec(f"hf_skiprnn.kernels.cpu._cpu_{isa}"), shutil.which("objdump")
    if objdump is None or platform.machine() != "x86_64" or spec is None or spec.origin is None:
        pytest.skip("needs objdump and a library for x86-64")
    code = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", spec.origin], check=True, capture_output=True, text=True
    )
    found = [line for line in code.stdout.splitlines() if re.search(foreign, line)]
    assert not found, found[:3]
    assert len(code.stdout.splitlines()) > 1000


def test_half_precision_weights_run_in_float32() -> None:
    problem = make_problem(Case(steps=40), dtype=torch.float32)

    def convert(p: Problem, dtype: torch.dtype) -> Problem:
        layers = [LayerWeights(*(None if part is None else part.to(dtype) for part in w)) for w in p.layers]
        return replace(p, inputs=p.inputs.to(dtype), layers=layers)

    low = convert(problem, torch.bfloat16)
    same = convert(low, torch.float32)
    out = low.run(cpu_scan)
    assert out.state.h.dtype == torch.float32
    assert_same_values(out, same.run(cpu_scan), 0)


@pytest.mark.parametrize("cell", list(CELLS))
def test_tokens_are_looked_up_where_they_are_read(cell: str) -> None:
    problem = make_problem(Case(cell=cell, inputs=9, batch=5, steps=40, sequence=True, mask="ragged"))
    table = torch.randn(11, 9, dtype=torch.float64)
    ids = torch.randint(0, 11, (5, 40))
    with torch.no_grad():
        want = replace(problem, inputs=table[ids]).run(cpu_scan)
        run = partial(cpu_scan_tokens, gate=problem.gate, state=problem.state, cell=cell, mask=problem.mask)
        assert_same_values(run(ids, table, problem.layers, sequence=True), want, 0)
        unread = torch.ones(11, dtype=torch.bool)
        unread[ids[want.update_gates.bool()]] = False
        table[unread] = torch.nan
        assert_same_values(run(ids, table, problem.layers, sequence=True), want, 0)
        with pytest.raises(IndexError, match=r"0 \.\. 10; got 0 \.\. 11"):
            run(ids.clone().index_fill_(1, torch.tensor([3]), 11), table, problem.layers)
    with pytest.raises(RuntimeError, match="has no gradient"):
        run(ids, table, problem.layers)
