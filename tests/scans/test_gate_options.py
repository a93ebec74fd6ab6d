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
    *(Case(cell=cell, averages=True, steps=60, state=state) for cell in CELLS for state in ("fresh", "running")),
    Case(averages=True, shifted=True, layers=2, mask="ragged", sequence=True, batch=6, steps=60),
    Case(averages=True, gate="forced", batch=3),
    Case(averages=True, gate_bias=-6.0, steps=300),
    Case(averages=True, gate_bias=3.0),
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
def test_averaged_gradients_are_summed_ones_where_every_step_is_read(scan) -> None:
    """2 D is at least 1 there. Where steps are skipped they differ, and values do not."""
    for bias, same in ((9.0, True), (-2.0, False)):
        summed, averaged = (make_problem(Case(gate_bias=bias, averages=averages)) for averages in (False, True))
        out, of_mean = summed.run(scan), averaged.run(scan)
        assert torch.equal(out.state.h, of_mean.state.h)
        assert torch.equal(out.num_updates, of_mean.num_updates)
        want, got = gradients(summed, out), gradients(averaged, of_mean)
        assert all(torch.equal(got[name], grad) for name, grad in want.items()) == same


@pytest.mark.parametrize("scan", SCANS)
def test_averaged_gradients_stay_small_through_long_intervals(scan) -> None:
    """An interval of k steps has k gates, and each one's gradient grows with its place in it."""
    norms = {}
    for averages in (False, True):
        problem = make_problem(Case(gate_bias=-4.0, steps=400, hidden=16, averages=averages))
        norms[averages] = gradients(problem, problem.run(scan))["update_gate.weight"].norm()
    assert norms[True] < norms[False] / 5
