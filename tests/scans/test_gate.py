"""When the gate opens: ties, awkward increments, and the interval to the next update in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import FAST_SCANS, LONG_SCANS
from scan_problems import Case, make_problem
from survival.ledger import SCALE

from hf_skiprnn.model.cells_skip_rnn import gate_opens, steps_to_update


def test_interval_in_closed_form_is_the_first_open_gate() -> None:
    increments = torch.cat(
        (
            torch.rand(4000),
            torch.rand(4000) * 0.02,
            0.5 / torch.arange(1, 300),  # ties: k * D is 0.5 up to its rounding
            torch.tensor([math.nan, 0.0, 1.0, 0.5, 0.25, 1e-30, 1e-45, -0.1, math.inf]),
        )
    )
    for start in (0, 3):
        for remaining in (0, 1, 40, 400):
            steps = torch.full_like(increments, start)
            got = steps_to_update(increments, steps, torch.full_like(increments, remaining).long())
            opens = torch.stack([gate_opens(steps + k, increments) for k in range(1, remaining + 1)] or [steps < 0], 1)
            opens = torch.cat((opens[:, :remaining], torch.ones(len(increments), 1, dtype=torch.bool)), 1)
            assert torch.equal(got, opens.byte().argmax(1) + 1)


def test_ties_open_the_gate() -> None:
    """k * D = 0.5 exactly is an update (equation 6: n * D >= 0.5)."""
    assert gate_opens(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.25, 0.125])).all()
    below = torch.tensor(0.5).nextafter(torch.tensor(0.0))
    assert not gate_opens(torch.tensor(1.0), below)


@pytest.mark.parametrize("scan", FAST_SCANS)
def test_increments_at_ties_zero_and_nan(scan) -> None:
    """From a state with an awkward increment, the first update comes where the definition says."""
    increments = [0.0, -0.0, 1e-45, 1e-30, 0.25, 0.5, 1 / 3, 0.1, 0.05, 1 / 12, 1.0, math.inf, math.nan, -1.0]
    steps, batch = 20, len(increments)
    for steps_since_update in (0.0, 3.0):
        problem = make_problem(Case(batch=batch, steps=steps, gate_bias=-50.0), dtype=torch.float32)
        state = problem.state._replace(
            increment=torch.tensor(increments), steps_since_update=torch.full((batch,), steps_since_update)
        )
        with torch.no_grad():
            got = replace(problem, state=state).run(scan).update_gates.bool()
        k = steps_since_update + torch.arange(1, steps + 1)
        opens = gate_opens(k.unsqueeze(0), torch.tensor(increments).unsqueeze(1))
        first = torch.where(opens.any(1), opens.int().argmax(1), steps)
        for row in range(batch):
            assert not got[row, : first[row]].any(), increments[row]
            assert first[row] == steps or got[row, first[row]], increments[row]


@given(increment=st.floats(2**-20, 1, width=32), steps_since_update=st.integers(0, 5), steps=st.integers(1, 400))
@settings(max_examples=40 * SCALE)
@pytest.mark.parametrize("scan", LONG_SCANS)
def test_the_first_update_is_where_the_product_says(scan, increment, steps_since_update, steps) -> None:
    problem = make_problem(Case(batch=1, steps=steps, gate_bias=-50.0, hidden=2, inputs=1), dtype=torch.float32)
    state = problem.state._replace(
        increment=torch.tensor([increment]), steps_since_update=torch.tensor([float(steps_since_update)])
    )
    with torch.no_grad():
        gates = replace(problem, state=state).run(scan).update_gates[0].bool()
    opens = gate_opens(steps_since_update + torch.arange(1.0, steps + 1), torch.tensor(increment))
    assert gates.any() == opens.any()
    assert int(gates.int().argmax()) == int(opens.int().argmax())


def test_gates_are_decided_in_float32_in_every_precision() -> None:
    just_below = torch.tensor(0.5, dtype=torch.float64) - 1e-12  # rounds to 0.5 in float32
    assert gate_opens(torch.tensor(1.0, dtype=torch.float64), just_below)
