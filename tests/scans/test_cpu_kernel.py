"""The native CPU scan against the definition, and around it: instruction sets, threads, operators, bad input."""

import itertools
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import Case, Problem, assert_close, assert_same_values, cotangents, gradients, make_problem
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from hf_skiprnn.kernels.cpu import engine as cpu_engine
from hf_skiprnn.kernels.cpu.operators import cpu_scan, cpu_scan_tokens
from hf_skiprnn.model.cells_skip_rnn import CELLS, GateWeights, LayerWeights, gate_opens
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState

pytestmark = pytest.mark.skipif(
    cpu_engine.unavailable_reason() is not None, reason=str(cpu_engine.unavailable_reason())
)

EXACT = 1e-10  # float64, against the largest value: thousands of additions in another order
SINGLE = 2e-5  # float32 against float64, by the norm of a row
SINGLE_GRADIENT = 2e-4

SHAPES = {
    "one input": Case(inputs=1),
    "wide": Case(inputs=300, hidden=20, steps=31),
    "input products kept": Case(inputs=70, hidden=33),
    "one unit": Case(hidden=1),
    "whole vectors": Case(hidden=16, inputs=16),
    "many units": Case(hidden=130, steps=9),
    "no rows": Case(batch=0),
    "no steps": Case(steps=0),
    "one step": Case(steps=1),
    "63 steps": Case(steps=63, batch=30),
    "500 steps": Case(steps=500, batch=2, gate_bias=-3.0),
    "skips almost all": Case(steps=300, gate_bias=-8.0),
    "never skips": Case(steps=40, gate_bias=9.0),
    "no bias": Case(bias=False, layers=2),
    "reads no step of the second checkpoint": Case(steps=33, gate="always", batch=3),
}


@pytest.fixture(params=cpu_engine.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(cpu_engine.ISA_VARIABLE, request.param)
    if reason := cpu_engine.unavailable_reason():
        pytest.skip(reason)
    return request.param


def assert_is_the_definition(problem: Problem) -> None:
    want, copy = problem.run(dense_scan), problem.to(torch.float64)
    got = copy.run(cpu_scan)
    assert_same_values(got, want, EXACT)
    wanted = gradients(problem, want)
    for name, grad in gradients(copy, got).items():
        assert_close(f"gradient of {name}", grad, wanted[name], EXACT)
    with torch.inference_mode():
        assert_same_values(copy.run(cpu_scan), want, EXACT)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("gate", ["learned", "always", "planned", "forced"])
@pytest.mark.parametrize("cell", list(CELLS))
def test_values_and_every_gradient(cell: str, gate: str, layers: int) -> None:
    for mask, state, sequence in itertools.product(
        ("none", "right", "left", "ragged"), ("fresh", "running"), (False, True)
    ):
        case = Case(cell=cell, gate=gate, layers=layers, mask=mask, state=state, sequence=sequence)
        assert_is_the_definition(make_problem(case))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", list(CELLS))
def test_awkward_shapes(cell: str, shape: str) -> None:
    for mask, sequence in itertools.product(("none", "ragged"), (False, True)):
        assert_is_the_definition(make_problem(replace(SHAPES[shape], cell=cell, mask=mask, sequence=sequence), seed=3))


@pytest.mark.parametrize("cell", list(CELLS))
def test_every_instruction_set(cell: str, instruction_set: str) -> None:
    for case in (Case(layers=2, sequence=True, mask="ragged"), SHAPES["wide"], SHAPES["many units"]):
        assert_is_the_definition(make_problem(replace(case, cell=cell)))


@pytest.mark.parametrize("inputs", [1, 70])
@pytest.mark.parametrize("cell", list(CELLS))
def test_single_precision_under_replayed_gates(cell: str, inputs: int, instruction_set: str) -> None:
    problem = make_problem(Case(cell=cell, inputs=inputs, steps=120, hidden=40, batch=9, sequence=True, layers=2))
    with torch.no_grad():
        gates = problem.run(dense_scan).update_gates.bool()
    want = problem.run(dense_scan, forced_gates=gates)
    copy = problem.to(torch.float32)
    got = copy.run(cpu_scan, forced_gates=gates)
    assert torch.equal(got.update_gates.bool(), gates)
    for name, mine, theirs in (("h", got.state.h, want.state.h), ("sequence", got.sequence, want.sequence)):
        assert_close_by_row(name, mine, theirs, SINGLE)
    wanted = gradients(problem, want)
    for name, grad in gradients(copy, got).items():
        assert_close_by_row(f"gradient of {name}", grad, wanted[name], SINGLE_GRADIENT)


def assert_close_by_row(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Difference of a row against the norm of the largest row: a small row next to it has no digits of its own."""
    assert got.dtype == torch.float32, name
    difference = torch.linalg.vector_norm(got.detach().double() - want.detach(), dim=-1).max()
    scale = torch.linalg.vector_norm(want.detach(), dim=-1).max()
    assert difference <= tolerance * scale, f"{name}: {float(difference / scale):.1e} of the largest row"


def test_increments_at_ties_zero_and_nan() -> None:
    """A state whose increment is awkward: the first update comes when the definition says."""
    increments = [0.0, -0.0, 1e-45, 1e-30, 0.25, 0.5, 1 / 3, 0.1, 0.05, 1 / 12, 1.0, torch.inf, torch.nan, -1.0]
    steps, batch = 30, len(increments)
    for since in (0.0, 1.0, 3.0):
        problem = make_problem(Case(batch=batch, steps=steps, gate_bias=-50.0), dtype=torch.float32)
        state = problem.state._replace(
            increment=torch.tensor(increments), steps_since_update=torch.full((batch,), since)
        )
        got = replace(problem, state=state).run(cpu_scan).update_gates.bool()
        k = since + torch.arange(1, steps + 1)
        opens = gate_opens(k.unsqueeze(0), torch.tensor(increments).unsqueeze(1))
        first = torch.where(opens.any(1), opens.int().argmax(1), steps)
        for row in range(batch):
            assert not got[row, : first[row]].any(), increments[row]
            assert first[row] == steps or got[row, first[row]], increments[row]


@given(
    increment=st.floats(min_value=2**-20, max_value=1.0, width=32),
    since=st.integers(0, 5),
    steps=st.integers(1, 400),
)
def test_first_update_is_where_the_product_says(increment: float, since: int, steps: int) -> None:
    problem = make_problem(Case(batch=1, steps=steps, gate_bias=-50.0, hidden=2, inputs=1), dtype=torch.float32)
    state = problem.state._replace(increment=torch.tensor([increment]), steps_since_update=torch.tensor([float(since)]))
    with torch.no_grad():
        got = replace(problem, state=state).run(cpu_scan)
    opens = gate_opens(since + torch.arange(1.0, steps + 1), torch.tensor(increment))
    assert got.update_gates[0].bool().any() == opens.any()
    if opens.any():
        assert int(got.update_gates[0].argmax()) == int(opens.int().argmax())


def test_nan_inputs_reach_the_state_and_end() -> None:
    problem = make_problem(Case(steps=50, sequence=True), dtype=torch.float32)
    poisoned = problem.inputs.detach().clone()
    poisoned[1, 7], poisoned[2, 0], poisoned[3] = torch.nan, torch.inf, torch.nan
    problem = replace(problem, inputs=poisoned.requires_grad_())
    forced = torch.ones(4, 50, dtype=torch.bool)
    out = problem.run(cpu_scan, forced_gates=forced)
    assert out.state.h[:, 0].isfinite().all()
    assert out.state.h[:, 1].isnan().all()
    assert out.state.h[:, 3].isnan().all()
    free = problem.run(cpu_scan)
    gradients(problem, free)
    assert free.update_gates[3].all()  # a NaN updates


def test_masked_steps_are_never_read() -> None:
    problem = make_problem(Case(mask="ragged", sequence=True))
    assert problem.mask is not None
    hidden = problem.inputs.detach().masked_fill(~problem.mask.unsqueeze(-1), torch.nan).requires_grad_()
    other = replace(problem, inputs=hidden)
    got, want = other.run(cpu_scan), problem.run(cpu_scan)
    assert_same_values(got, want, 0)
    for mine, theirs in zip(gradients(other, got).values(), gradients(problem, want).values(), strict=True):
        assert torch.equal(mine, theirs)


def everything(problem: Problem) -> list[Tensor]:
    out = problem.run(cpu_scan)
    grads = gradients(problem, out)
    values = [out.sequence, *out.state, out.num_updates, out.update_gates]
    return [*(part.detach() for part in values if part is not None), *grads.values()]


@pytest.mark.parametrize("inputs", [1, 70])
@pytest.mark.parametrize("cell", list(CELLS))
def test_the_number_of_threads_changes_no_bit(cell: str, inputs: int) -> None:
    case = Case(cell=cell, inputs=inputs, batch=37, steps=60, hidden=19, layers=2, sequence=True, mask="ragged")
    problem = make_problem(case, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(everything(problem))
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


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("cell", list(CELLS))
def test_continuing_from_the_state_is_running_through(cell: str, sequence: bool) -> None:
    problem = make_problem(Case(cell=cell, steps=40, sequence=sequence, layers=2))
    whole, state, gates = problem.run(cpu_scan), problem.state, []
    for first, last in ((0, 1), (1, 14), (14, 14), (14, 40)):
        out = replace(problem, inputs=problem.inputs[:, first:last], state=state).run(cpu_scan)
        state, gates = out.state, [*gates, out.update_gates]
    assert torch.equal(torch.cat(gates, 1), whole.update_gates)
    assert_close("h", state.h, whole.state.h, EXACT)
    weighted = [(s.h.sin().sum() + s.increment.sin().sum() + s.steps_since_update.sum()) for s in (state, whole.state)]
    mine, theirs = (torch.autograd.grad(w, list(problem.leaves().values()), allow_unused=True) for w in weighted)
    for name, a, b in zip(problem.leaves(), mine, theirs, strict=True):
        assert_close(name, a, b, EXACT)


def test_strides_and_alignment() -> None:
    problem = make_problem(Case(inputs=5, hidden=12, layers=2, sequence=True))
    want = everything(problem)

    def elsewhere(x: Tensor) -> Tensor:
        """The same numbers, every other element of memory that starts off alignment."""
        memory = torch.empty(2 * x.numel() + 1, dtype=x.dtype)
        view = memory[1:].as_strided(x.shape, [2 * s for s in x.stride()])
        return view.copy_(x.detach()).requires_grad_()

    moved = replace(
        problem,
        inputs=elsewhere(problem.inputs),
        layers=[LayerWeights(*(None if part is None else elsewhere(part) for part in w)) for w in problem.layers],
        gate=problem.gate and GateWeights(*map(elsewhere, problem.gate)),
        state=SkipRNNState(*(None if part is None else elsewhere(part) for part in problem.state)),
    )
    for mine, theirs in zip(everything(moved), want, strict=True):
        assert torch.equal(mine, theirs)


def test_expanded_state_gets_its_gradient() -> None:
    problem = make_problem(Case(batch=5))
    initial = torch.randn(1, 1, 7, dtype=torch.float64, requires_grad=True)
    grads = []
    for scan in (dense_scan, cpu_scan):
        state = problem.state._replace(h=initial.expand(1, 5, 7))
        (grad,) = torch.autograd.grad(replace(problem, state=state).run(scan).state.h.sin().sum(), initial)
        grads.append(grad)
    assert_close("initial_h", grads[1], grads[0], EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, inputs=p.inputs[0]), "inputs must be"),
        (lambda p: replace(p, inputs=p.inputs[..., :2]), "weight_ih"),
        (lambda p: replace(p, layers=[p.layers[0]._replace(bias=p.layers[0].bias[1:])]), "bias"),
        (lambda p: replace(p, layers=[]), "Four weights"),
        (lambda p: replace(p, state=p.state._replace(c=None)), "state of a 'lstm'"),
        (lambda p: replace(p, state=p.state._replace(h=p.state.h[:, :1])), r"state\.h"),
        (lambda p: replace(p, state=p.state._replace(increment=p.state.increment[:1])), r"state\.increment"),
        (lambda p: replace(p, mask=torch.ones(4, 22, dtype=torch.bool)), "mask"),
        (lambda p: replace(p, mask=torch.ones(4, 23)), "mask must be torch.bool"),
        (lambda p: replace(p, forced_gates=torch.ones(3, 23, dtype=torch.bool)), "forced_gates"),
        (lambda p: replace(p, case=replace(p.case, cell="rnn")), "cell must be one of"),
        (lambda p: replace(p, inputs=p.inputs.to("meta")), "on the CPU"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_arguments_are_refused_by_name(change: Callable[[Problem], Problem], message: str, training: bool) -> None:
    problem = change(make_problem(Case()))
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=message):
        problem.run(cpu_scan)


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_engine.ISA_VARIABLE, "sse9")
    assert "must be one of" in str(cpu_engine.unavailable_reason())
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


def test_autocast_leaves_the_scan_in_float32() -> None:
    problem = make_problem(Case(steps=40), dtype=torch.float32)
    want = everything(problem)
    with torch.autocast("cpu", torch.bfloat16):
        got = everything(problem)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_second_derivative_is_refused() -> None:
    problem = make_problem(Case())
    h = problem.run(cpu_scan).state.h
    with pytest.raises(RuntimeError, match="Use the 'dense' backend"):
        torch.autograd.grad(h.sum(), problem.inputs, create_graph=True)
    h = torch.ops.hf_skiprnn.cpu_training(*arguments(problem))[1]
    (grad,) = torch.autograd.grad(h.sum(), problem.inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="Use the 'dense' backend"):
        grad.sum().backward()


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


CASES = [Case(), Case(cell="gru", mask="ragged", sequence=True, layers=2), Case(inputs=70)]
FULL_CHECK = "test_aot_dispatch_dynamic"
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")


def arguments(problem: Problem) -> tuple[object, ...]:
    """Of the training operator."""
    weights = [problem.inputs.new_empty(0) if part is None else part for w in problem.layers for part in w]
    gate = list(problem.gate or ())
    options = (problem.mask, problem.forced_gates, problem.case.cell, problem.case.sequence)
    return (problem.inputs, weights, gate, *problem.state, *options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators_pass_opcheck(case: Case) -> None:
    # Records of steps that are not updates stay unwritten, and the last check compares them: there, every step is one.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for each, which in ((case, checks), (replace(case, gate="always", mask="none", steps=128), (*checks, FULL_CHECK))):
        problem = make_problem(each)
        torch.library.opcheck(torch.ops.hf_skiprnn.cpu_training.default, arguments(problem), test_utils=which)
        x, *rest = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, arguments(problem))
        torch.library.opcheck(torch.ops.hf_skiprnn.cpu_inference.default, (x, None, *rest))


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "aot_eager") for case in CASES), pytest.param(CASES[0], "inductor", marks=NEEDS_COMPILER)],
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
        assert_close(name, mine, theirs, 1e-6)
    with torch.no_grad():
        assert_same_values(compiled(problem.inputs)[1], loss(problem.inputs)[1], 1e-6)


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


def test_runs_in_a_forked_child() -> None:
    """As a DataLoader's workers do, after the parent's threads have run."""
    code = (
        "import os, sys, torch; sys.path[:0] = sys.argv[1:]\n"
        "from scan_cases import Case, make_problem, gradients\n"
        "from hf_skiprnn.kernels.cpu.operators import cpu_scan\n"
        "torch.set_num_threads(2)\n"
        "problem = make_problem(Case(batch=20))\n"
        "def total():\n"
        "    out = problem.run(cpu_scan)\n"
        "    return sum(float(g.sum()) for g in gradients(problem, out).values())\n"
        "want = total()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if total() == want else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    tests = Path(__file__).parent
    subprocess.run([sys.executable, "-c", code, tests, tests.parent], check=True, timeout=120)


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


@given(
    cell=st.sampled_from(list(CELLS)),
    sizes=st.tuples(*(st.integers(low, high) for low, high in ((0, 5), (0, 20), (1, 6), (1, 20), (1, 3)))),
    gate=st.sampled_from(["learned", "always", "planned", "forced"]),
    mask=st.sampled_from(["none", "right", "left", "ragged"]),
    sequence=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_problem(cell: str, sizes: tuple[int, ...], gate: str, mask: str, sequence: bool, seed: int) -> None:
    batch, steps, inputs, hidden, layers = sizes
    shape = {"layers": layers, "batch": batch, "steps": steps, "inputs": inputs, "hidden": hidden}
    case = Case(cell=cell, gate=gate, mask=mask, state="running", sequence=sequence, **shape)
    assert_is_the_definition(make_problem(case, seed))
