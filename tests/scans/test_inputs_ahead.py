"""Inference multiplies inputs of steps ahead of time where that is faster (csrc/inputs.h). No choice changes a result.

The engine chooses by measured times. It always tries where the updates are known ahead: under given gates and without a
gate. It tries where a learned gate has kept its rhythm. tests/native/fuzz.cpp makes it always try.
"""

from dataclasses import replace

import pytest
import torch
from scan_cases import NEEDS_NATIVE
from scan_problems import Case, Problem, assert_rows_alone, assert_same_values, low, make_problem
from tolerances import EXACT

from hf_skiprnn.kernels.cpu import library
from hf_skiprnn.kernels.cpu.operators import cpu_scan
from hf_skiprnn.model.cells_skip_rnn import CELLS, GateWeights
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan

pytestmark = NEEDS_NATIVE
WIDE = Case(inputs=70, hidden=24, steps=150, sequence=True)


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    if reason := library.unavailable_reason():
        pytest.skip(reason)


def changing(case: Case, dtype: torch.dtype = torch.float64) -> Problem:
    """Return a problem whose learned gate is busy, then slow, then irregular.

    The first input drives unit 0 of the lowest layer, this one those above, and the gate reads only unit 0.
    """
    problem = make_problem(case)
    with torch.no_grad():
        for part, scale in ((problem.layers[0].weight_ih, 1.0), (problem.layers[0].weight_hh, 0.1)):
            part[:: case.hidden] *= scale
        problem.layers[0].weight_ih[:: case.hidden, 0] = 2.0
        for upper in problem.layers[1:]:
            upper.weight_ih[:: case.hidden, 0] = 4.0
        third = case.steps // 3
        problem.inputs[:, :third, 0], problem.inputs[:, third : 2 * third, 0] = 5.0, -5.0
        problem.inputs[:, 2 * third :, 0] *= 4.0
        gate = GateWeights(torch.zeros(1, case.hidden).double(), torch.tensor([-0.8]).double())
        gate.weight[0, 0] = 1.5
    return replace(problem, gate=gate).to(dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("cell", list(CELLS))
def test_a_gate_that_changes_its_rate(cell: str) -> None:
    for batch, layers, mask in ((1, 1, "none"), (1, 2, "ragged"), (5, 2, "right"), (30, 1, "none"), (30, 3, "ragged")):
        problem = changing(replace(WIDE, cell=cell, batch=batch, layers=layers, mask=mask))
        with torch.inference_mode():
            want = problem.run(dense_scan)
            assert_same_values(problem.run(cpu_scan), want, EXACT.values)
        if mask == "none":
            shares = [float(part.mean()) for part in want.update_gates.split(50, 1)]
            assert max(shares) - min(shares) > 0.25


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("gate", ["learned", "always", "planned", "forced"])
def test_given_gates_and_steady_ones(gate: str) -> None:
    """A learned gate of 0 weights keeps its rhythm: every step, every second, every fifth."""
    for batch, mask, bias in ((1, "none", 3.0), (3, "ragged", -1.0), (30, "left", -2.1)):
        problem = make_problem(replace(WIDE, cell="gru", gate=gate, batch=batch, mask=mask, layers=2, state="running"))
        if gate == "learned":
            problem = replace(problem, gate=GateWeights(torch.zeros(1, 24).double(), torch.tensor([bias]).double()))
        with torch.inference_mode():
            assert_same_values(problem.run(cpu_scan), problem.run(dense_scan), EXACT.values)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("cell", list(CELLS))
def test_neither_threads_nor_other_rows_nor_bfloat16_change_a_bit(cell: str) -> None:
    problem = changing(replace(WIDE, cell=cell, batch=29, layers=2, steps=90), torch.float32)
    with torch.inference_mode():
        torch.set_num_threads(1)
        whole = problem.run(cpu_scan)
        torch.set_num_threads(2)
        assert_same_values(problem.run(cpu_scan), whole, 0)
        assert_rows_alone(problem, whole, cpu_scan)
        rounded = low(problem)
        assert_same_values(rounded.run(cpu_scan), low(rounded, torch.float32).run(cpu_scan), 0)
