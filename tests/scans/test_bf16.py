"""A model in bfloat16 on the CPU: the native engine reads its weights as they are, and computes in float32.

Its results are those of the same numbers in float32, bit for bit. Where weights are large they stay bfloat16 in memory;
others are widened when they are packed. 431 units are large on every machine: 2.1 MB for a GRU, in float32.
"""

from dataclasses import replace

import pytest
import torch
from scan_cases import NEEDS_NATIVE
from scan_problems import Case, assert_same_values, gradients, low, make_problem

from hf_skiprnn.kernels.cpu import library, operators
from hf_skiprnn.kernels.cpu.engine import forward
from hf_skiprnn.kernels.cpu.operators import cpu_scan, cpu_scan_tokens
from hf_skiprnn.model.cells_skip_rnn import CELLS

pytestmark = NEEDS_NATIVE
SMALL, LARGE = Case(inputs=9, hidden=19, layers=2, steps=30), Case(inputs=5, hidden=431, steps=5)
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
            assert_same_values(got, want, 0)


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


def test_a_training_operator_refuses_bfloat16() -> None:
    problem = low(make_problem(SMALL, dtype=torch.float32))
    flat = [torch.empty(0, dtype=torch.bfloat16) if part is None else part for w in problem.layers for part in w]
    gate = list((problem.gate or ())[:2])
    with torch.no_grad(), pytest.raises(ValueError, match=r"got torch\.bfloat16 in training"):
        torch.ops.hf_skiprnn.cpu_training(problem.inputs, flat, gate, *problem.state, None, None, "lstm", False, False)
