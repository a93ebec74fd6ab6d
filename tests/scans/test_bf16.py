"""A model in bfloat16 on the CPU: the native engine reads its weights as they are, and computes in float32.

Its results are those of the same numbers in float32, bit for bit; with AMX, which adds in another order, up to
rounding. In training, weights are widened; AMX then multiplies their upper halves. Where weights are large they stay
bfloat16 in memory; others are widened when they are packed. 431 units are large on every machine: 2.1 MB for a GRU, in
float32.
"""

from dataclasses import replace

import pytest
import torch
from scan_cases import NEEDS_NATIVE
from scan_problems import Case, assert_close, assert_rows_alone, assert_same_values, gradients, low, make_problem

from hf_skiprnn.kernels.cpu import library, operators
from hf_skiprnn.kernels.cpu.engine import forward
from hf_skiprnn.kernels.cpu.operators import cpu_scan, cpu_scan_tokens
from hf_skiprnn.model.cells_skip_rnn import CELLS

pytestmark = NEEDS_NATIVE
SMALL, LARGE = Case(inputs=9, hidden=19, layers=2, steps=30), Case(inputs=5, hidden=431, steps=5)
ROUNDING = 3e-6  # of sums of up to 431 float32 numbers
CASES = (SMALL, replace(SMALL, inputs=3, bias=False), LARGE, replace(LARGE, hidden=230, layers=3, inputs=2, steps=4))


@pytest.mark.parametrize("isa", library.INSTRUCTION_SETS)
@pytest.mark.parametrize("cell", list(CELLS))
def test_results_are_those_of_the_same_numbers_in_float32(cell: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    for case in CASES:
        for batch, mask, threads in (
            (1, "none", 1),
            (2, "right", 1),
            (4, "ragged", 2),
            (5, "none", 1),
            (17, "left", 3),
        ):
            torch.set_num_threads(threads)
            some = replace(case, cell=cell, batch=batch, mask=mask, sequence=True, shifted=batch == 4)
            problem = low(make_problem(some, dtype=torch.float32))
            with torch.no_grad():
                got, want = problem.run(cpu_scan), low(problem, torch.float32).run(cpu_scan)
            assert got.state.h.dtype == torch.float32
            assert_same_values(got, want, ROUNDING if isa == "amx" else 0)


@pytest.mark.parametrize("cell", list(CELLS))
def test_with_amx_neither_threads_nor_other_rows_change_a_bit(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depths around tiles of 32, one to 29 rows, inputs ahead of time or at once."""
    monkeypatch.setenv(library.ISA_VARIABLE, "amx")
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    for inputs, hidden, layers in ((1, 128, 2), (70, 129, 2), (64, 160, 1), (33, 200, 1)):
        case = Case(cell=cell, inputs=inputs, hidden=hidden, layers=layers, steps=40, batch=29, sequence=True)
        problem = low(make_problem(case, dtype=torch.float32))
        with torch.inference_mode():
            torch.set_num_threads(1)
            whole = problem.run(cpu_scan)
            monkeypatch.setenv(library.ISA_VARIABLE, "avx512")
            without = problem.run(cpu_scan)
            monkeypatch.setenv(library.ISA_VARIABLE, "amx")
            assert not torch.equal(whole.sequence, without.sequence)  # it was used
            same = (whole.update_gates == without.update_gates).all(1)
            assert same.float().mean() > 0.9  # a row in 29 may meet a tie within rounding
            assert_close("sequence", whole.sequence[same], without.sequence[same], ROUNDING)
            torch.set_num_threads(2)
            assert_same_values(problem.run(cpu_scan), whole, 0)
            assert_rows_alone(problem, whole, cpu_scan)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_with_amx_a_number_that_is_not_finite_is_no_other(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first state of one row: its results are those without AMX, and other rows do not notice."""
    case = Case(cell="gru", inputs=3, hidden=130, steps=1, batch=4, state="running")
    problem = low(make_problem(case, dtype=torch.float32))
    problem.state.h.data[0, 2, 5] = value
    results = []
    for isa in ("amx", "avx512"):
        monkeypatch.setenv(library.ISA_VARIABLE, isa)
        if reason := library.unavailable_reason():
            pytest.skip(reason)
        with torch.inference_mode():
            results.append(problem.run(cpu_scan).state.h)
    torch.testing.assert_close(*results, equal_nan=True, atol=ROUNDING, rtol=0)
    assert results[0][0, [0, 1, 3]].isfinite().all()


def test_nothing_is_converted_before_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, seen = low(make_problem(SMALL, dtype=torch.float32)), []
    monkeypatch.setattr(operators, "forward", lambda *args: (seen.append(args), forward(*args))[1])
    with torch.no_grad():
        problem.run(cpu_scan)
    inputs, _, weights = seen[0][:3]
    assert inputs is problem.inputs
    assert {part.dtype for part in weights} == {torch.bfloat16}


def test_tokens_and_the_operator_read_bfloat16_too() -> None:
    problem = low(make_problem(replace(SMALL, sequence=True), dtype=torch.float32))
    table, ids = torch.randn(11, 9).bfloat16(), torch.randint(0, 11, (4, 30))
    with torch.no_grad():
        want = replace(problem, inputs=table[ids]).run(cpu_scan)
        options = {"cell": problem.case.cell, "sequence": True}
        assert_same_values(cpu_scan_tokens(ids, table, problem.layers, problem.gate, problem.state, **options), want, 0)
        compiled = torch.compile(cpu_scan, backend="aot_eager")
        got = compiled(table[ids], problem.layers, problem.gate, problem.state, **options)
        assert_same_values(got, want, 0)


def test_training_computes_with_the_weights_in_float32() -> None:
    problem = make_problem(replace(SMALL, sequence=True), dtype=torch.float32)
    rounded = low(problem)
    for part in (rounded.inputs, *(part for w in rounded.layers for part in w if part is not None)):
        part.requires_grad_()
    wide = low(rounded, torch.float32).to(torch.float32)
    wanted = gradients(wide, wide.run(cpu_scan))
    for name, grad in gradients(rounded, rounded.run(cpu_scan)).items():
        assert torch.equal(grad, wanted[name].to(grad.dtype)), name


@pytest.mark.parametrize("cell", list(CELLS))
def test_gradients_with_amx_are_those_of_the_same_numbers(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, before they are rounded: depths around tiles, a few updates and many, narrow and wide inputs."""
    of = operators.Operands.of
    for inputs, hidden, layers, batch in ((1, 128, 2, 29), (70, 129, 2, 5), (33, 200, 1, 3), (300, 144, 1, 29)):
        case = Case(cell=cell, inputs=inputs, hidden=hidden, layers=layers, batch=batch, steps=50, gate_bias=-1.0)
        problem = low(low(make_problem(replace(case, sequence=True, mask="ragged"))), torch.float32).to(torch.float32)
        found = []
        for isa, threads in (("avx512", 1), ("amx", 1), ("amx", 2)):
            monkeypatch.setenv(library.ISA_VARIABLE, isa)
            if reason := library.unavailable_reason():
                pytest.skip(reason)
            torch.set_num_threads(threads)
            monkeypatch.setattr(operators.Operands, "of", lambda *args: of(*args)._replace(rounded=True))
            out = problem.run(cpu_scan)
            found.append((out.update_gates.detach(), gradients(problem, out)))
        (gates, want), (_, got), (_, threaded) = found
        assert all(torch.equal(gates, others) for others, _ in found)  # no gate of these problems is near its threshold
        assert not torch.equal(got["layers.0.weight_hh"], want["layers.0.weight_hh"])  # it was used
        for name in want:
            assert_close(name, got[name], want[name], 3e-5)
            assert torch.equal(got[name], threaded[name]), name


def test_with_amx_a_shorter_last_segment_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 42 updates of twelve rows, 35 to 40 took more working memory than all of them."""
    monkeypatch.setenv(library.ISA_VARIABLE, "amx")
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    for steps in (35, 38, 40):
        case = Case(inputs=8, hidden=288, batch=24, steps=steps, gate="always", sequence=True)
        problem = low(make_problem(case, dtype=torch.float32))
        problem.layers[0].weight_hh.requires_grad_()
        problem.run(cpu_scan).sequence.square().mean().backward()
        assert problem.layers[0].weight_hh.grad.isfinite().all()


def test_a_training_operator_refuses_bfloat16() -> None:
    problem = low(make_problem(SMALL, dtype=torch.float32))
    flat = [torch.empty(0, dtype=torch.bfloat16) if part is None else part for w in problem.layers for part in w]
    gate = list((problem.gate or ())[:2])
    with torch.no_grad(), pytest.raises(ValueError, match=r"got torch\.bfloat16 in training"):
        torch.ops.hf_skiprnn.cpu_training(problem.inputs, flat, gate, *problem.state, None, None, "lstm", False, 0)
