"""The gate's options, a shift for each row and averaged gradients: every backend agrees with the definition."""

import pytest
import torch
from scan_cases import FAST_SCANS, SCANS
from scan_problems import Case, assert_close, assert_same_values, gradients, make_problem
from tolerances import LARGE

from hf_skiprnn.model.cells_skip_rnn import CELLS, GateWeights
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan

CASES = [
    *(Case(cell=cell, shifted=True, steps=40, state=state) for cell in CELLS for state in ("fresh", "running")),
    Case(shifted=True, layers=2, mask="ragged", sequence=True, batch=6),
    Case(shifted=True, gate="forced", batch=3),
    Case(shifted=True, batch=1, steps=1),
    Case(shifted=True, batch=0),
    Case(shifted=True, gate_bias=-6.0, steps=300),
    *(
        Case(cell=cell, capped=4, gate_bias=-2.5, steps=60, state=state)
        for cell in CELLS
        for state in ("fresh", "running")
    ),
    Case(capped=2, shifted=True, layers=2, mask="ragged", sequence=True, gate_bias=-2.5, batch=6, steps=60),
    Case(capped=4, gate="forced", batch=3),
    Case(capped=2, gate_bias=-6.0, steps=300),
    Case(capped=4, gate_bias=3.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scan", FAST_SCANS)
def test_outputs_gates_and_every_gradient_are_the_definitions(scan, case: Case) -> None:
    problem = make_problem(case)
    want, got = problem.run(dense_scan), problem.run(scan)
    assert_same_values(got, want, LARGE.values)
    grads = gradients(problem, got)
    assert ("update_gate.shift" in grads) == case.shifted
    for name, grad in gradients(problem, want).items():
        assert_close(name, grads[name], grad, LARGE.gradients)


@pytest.mark.parametrize("scan", SCANS)
def test_a_rows_shift_is_its_bias(scan) -> None:
    problem = make_problem(Case(shifted=True, batch=5, steps=60))
    together = problem.run(scan)
    for row, shift in enumerate(problem.gate.shift):
        alone = problem.to(torch.float64)
        alone.inputs, alone.state = problem.inputs[row : row + 1], problem.state.reorder(torch.tensor([row]))
        alone.gate = GateWeights(problem.gate.weight, problem.gate.bias + shift)
        out = alone.run(scan)
        assert torch.equal(out.update_gates, together.update_gates[row : row + 1])
        torch.testing.assert_close(out.state.h, together.state.h[:, row : row + 1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("scan", SCANS)
def test_capped_gradients_are_summed_ones_where_intervals_are_short(scan) -> None:
    """4 D is at least 1 there. Where intervals are long they differ, and values do not."""
    for bias, same in ((9.0, True), (-4.0, False)):
        summed, limited = (make_problem(Case(gate_bias=bias, capped=capped)) for capped in (0, 4))
        out, of_capped = summed.run(scan), limited.run(scan)
        assert torch.equal(out.state.h, of_capped.state.h)
        assert torch.equal(out.num_updates, of_capped.num_updates)
        want, got = gradients(summed, out), gradients(limited, of_capped)
        assert all(torch.equal(got[name], grad) for name, grad in want.items()) == same


@pytest.mark.parametrize("scan", SCANS)
def test_capped_gradients_stay_small_through_long_intervals(scan) -> None:
    """An interval of k steps has k gates, and each one's gradient grows with its place in it."""
    norms = {}
    for capped in (0, 2, 4):
        problem = make_problem(Case(gate_bias=-4.0, steps=400, hidden=16, capped=capped))
        norms[capped] = gradients(problem, problem.run(scan))["update_gate.weight"].norm()
    assert norms[2] < norms[4] < norms[0] / 5
