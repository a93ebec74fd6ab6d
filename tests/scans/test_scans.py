"""The scans: the definition against the paper's own graph, and every backend against the definition."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from scan_cases import FAST_SCANS, INTERPRETED, LONG_SCANS, SCANS
from scan_problems import (
    Case,
    Problem,
    assert_close,
    assert_is_the_definition,
    assert_same_gradients,
    assert_same_values,
    gradients,
    make_problem,
)
from survival.ledger import SCALE
from tolerances import EXACT, SINGLE
from torch import Tensor

from hf_skiprnn.model.cells_skip_rnn import CELLS, increment_of, product
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState


def paper_scan(problem: Problem) -> ScanOutput:
    """The authors' graph, from the paper's equations: an accumulator, min, round, and blends by products."""
    cell, state = CELLS[problem.case.cell], problem.state
    h, c = list(state.h), [] if state.c is None else list(state.c)
    increment = state.increment
    accumulator = state.steps_since_update * increment.detach()  # how the state carries it
    gates = []
    for t in range(problem.case.steps):
        update_prob = accumulator + torch.minimum(increment, 1 - accumulator)
        rounded = (update_prob >= 0.5).double()
        u = update_prob + (rounded - update_prob).detach()
        x = problem.inputs[:, t]
        for index, w in enumerate(problem.layers):
            old_h, old_c = h[index], c[index] if c else None
            step = cell.step(w, product(x, w.weight_ih, w.bias), cell.recurrent_product(w, old_h), old_h, old_c)
            h[index] = u[:, None] * step.h + (1 - u[:, None]) * old_h
            if c:
                c[index] = u[:, None] * step.c + (1 - u[:, None]) * old_c
            x = step.h
        increment = u * increment_of(problem.gate, step.c if c else step.h) + (1 - u) * increment
        accumulator = (1 - u) * update_prob
        gates.append(u)
    gates = torch.stack(gates, 1)
    steps = torch.where(increment > 0, accumulator / increment, 0)  # the scans carry the count, the paper the sum
    last = SkipRNNState(torch.stack(h), torch.stack(c) if c else None, increment, steps)
    return ScanOutput(None, last, gates.sum(1), gates)


@pytest.mark.parametrize("state", ["fresh", "running"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", list(CELLS))
def test_dense_scan_is_the_authors_graph(cell: str, layers: int, state: str) -> None:
    problem = make_problem(Case(cell=cell, layers=layers, state=state, steps=31))
    got, want = problem.run(dense_scan), paper_scan(problem)
    assert 0.1 < float(got.update_gates.detach().mean()) < 0.9  # the gates are busy
    assert_close("gates", got.update_gates, want.update_gates, EXACT.values)
    grads = []
    for out in (got, want):
        generator = torch.Generator().manual_seed(3)
        parts = [out.state.h, out.state.c, out.state.increment, out.num_updates, out.update_gates]
        weighted = [
            (p * torch.randn(p.shape, generator=generator, dtype=p.dtype)).sum() for p in parts if p is not None
        ]
        leaves = problem.leaves()
        grads.append(dict(zip(leaves, torch.autograd.grad(sum(weighted), list(leaves.values())), strict=True)))
    for name, want_grad in grads[1].items():
        if state == "fresh" and name in ("state.increment", "state.steps_since_update"):
            continue  # constants there; torch halves the gradient of minimum(1, 1 - 0)
        assert want_grad.abs().max() > 1e-6, name
        assert_close(name, grads[0][name], want_grad, EXACT.gradients)


CASES = [
    Case(cell=cell, layers=layers, gate=gate, mask=mask, state=state, sequence=sequence)
    for cell, layers, gate, mask, state, sequence in itertools.product(
        CELLS,
        [1, 2, 3],
        ["learned", "always", "planned", "forced"],
        ["none", "right", "left", "ragged"],
        ["fresh", "running"],
        [False, True],
    )
]
# Every 11th case holds every pair of two fields' values at least once. `make fuzz` runs all.
FEW_CASES = CASES[::11] if SCALE == 1 else CASES
SMALL_CASES = [replace(case, batch=2, steps=6) for case in CASES[::29]]
AWKWARD = [
    Case(steps=1),
    Case(steps=1, mask="ragged", sequence=True),
    Case(steps=63, batch=30),
    Case(steps=63, hidden=1, inputs=1, cell="gru"),
    Case(steps=500, batch=2, gate_bias=-4.0, sequence=True),
    Case(steps=500, batch=3, gate_bias=-6.0, state="running"),
    Case(steps=300, gate_bias=-8.0),  # skips almost all
    Case(steps=40, gate_bias=9.0, cell="gru"),  # never skips
    Case(batch=1, hidden=17),
    Case(hidden=16, inputs=16, cell="gru"),  # whole vectors
    Case(hidden=130, steps=9, cell="gru_reset_after"),
    Case(inputs=300, hidden=20, steps=31, mask="ragged", sequence=True),
    Case(inputs=70, hidden=33, mask="ragged", cell="gru"),
    Case(steps=33, gate="always", batch=3),  # the second checkpoint of the native engine holds no update
    Case(batch=0),
    Case(steps=0, sequence=True),
    Case(steps=0, batch=0, cell="gru"),
    Case(bias=False, cell="gru_reset_after", layers=2),
]


def cases_and_scans() -> Iterator[pytest.ParameterSet]:
    for scan in FAST_SCANS:
        for case in FEW_CASES + AWKWARD if scan in LONG_SCANS else SMALL_CASES:
            yield pytest.param(case, *scan.values, id=f"{case}-{scan.id}", marks=scan.marks)


@pytest.mark.parametrize(("case", "scan"), list(cases_and_scans()))
def test_fast_scans_equal_dense(case: Case, scan) -> None:
    assert_is_the_definition(make_problem(case, seed=len(str(case))), scan)


@pytest.mark.parametrize("scan", LONG_SCANS)
def test_a_row_that_never_skips_beside_one_that_almost_always_does(scan) -> None:
    problem = make_problem(Case(batch=2, steps=200, gate="forced", sequence=True))
    problem.forced_gates = torch.zeros(2, 200, dtype=torch.bool)
    problem.forced_gates[0] = True
    problem.forced_gates[1, [0, 150]] = True
    assert problem.run(scan).num_updates.tolist() == [200, 2]
    assert_is_the_definition(problem, scan)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("cell", list(CELLS))
def test_float32_under_replayed_gates(cell: str, scan) -> None:
    """Gates are chaotic near a tie in float32: floats are compared under the gates of float64 (house rule 9)."""
    problem = make_problem(Case(cell=cell, layers=2, batch=4, steps=6 if INTERPRETED else 60, sequence=True))
    want = problem.run(dense_scan)
    gates = want.update_gates.detach() > 0.5
    single = problem.to(torch.float32)
    got = single.run(scan, forced_gates=gates)
    assert_same_values(got, want, SINGLE.values)
    assert_same_gradients(gradients(single, got), gradients(problem, want), SINGLE.gradients)


@pytest.mark.parametrize("scan", LONG_SCANS)
@pytest.mark.parametrize("cell", list(CELLS))
def test_float32_gates_agree_but_for_ties(cell: str, scan) -> None:
    problem = make_problem(Case(cell=cell, batch=32, steps=80))
    want = problem.run(dense_scan)
    got = problem.to(torch.float32).run(scan)
    same = (got.update_gates == want.update_gates.float()).all(1)
    assert same.float().mean() > 0.9  # a row in 32 may meet a tie within 1e-6 of 0.5 in 80 steps


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("capped", [0, 2, 4])
@pytest.mark.parametrize("cell", list(CELLS))
def test_gradcheck_of_the_path_through_the_gate(cell: str, capped: int, scan) -> None:
    """The surrogate u = w p + stop(round(p) - w p) with frozen w and offset is smooth: its numeric gradient is ours."""
    problem = make_problem(
        Case(cell=cell, batch=2, steps=18, inputs=2, hidden=3, capped=capped, gate_bias=-2.5 if capped else -1.5)
    )
    out = problem.run(scan)
    offsets = _offsets(problem)
    slopes = torch.stack([w for w, _ in offsets])
    assert (slopes == 1).any()
    assert (slopes < 1).any() == bool(capped)
    weight = torch.randn(out.state.h.shape, dtype=torch.float64)
    analytic = torch.autograd.grad((out.state.h * weight).sum() + 0.3 * out.num_updates.sum(), problem.gate.weight)[0]
    numeric = torch.zeros_like(analytic)
    for index in range(analytic.shape[1]):
        sides = []
        for shift in (1e-6, -1e-6):
            moved = problem.gate.weight.detach().clone()
            moved[0, index] += shift
            shifted = replace(problem, gate=problem.gate._replace(weight=moved))
            h, updates = _surrogate(shifted, offsets)
            sides.append(((h * weight).sum() + 0.3 * updates).detach())
        numeric[0, index] = (sides[0] - sides[1]) / 2e-6
    assert analytic.abs().max() > 1e-3
    assert_close("W_p", analytic, numeric, 1e-7)  # central differences of a smooth function at 1e-6


def _offsets(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """The slope w and the offset round(p) - w p of every step."""
    seen = [(p.detach(), d.detach()) for p, d in _surrogate(problem, None)]
    slopes = [(problem.case.capped * d).clamp(max=1) if problem.case.capped else torch.ones_like(d) for _, d in seen]
    return [(w, (p >= 0.5).double() - w * p) for (p, _), w in zip(seen, slopes, strict=True)]


def _surrogate(problem: Problem, offsets: list[tuple[Tensor, Tensor]] | None):
    """With offsets: (h, sum of u) of the smooth surrogate. Without: update_prob and increment of the true forward."""
    cell, w = CELLS[problem.case.cell], problem.layers[0]
    h, c = problem.state.h[0], None if problem.state.c is None else problem.state.c[0]
    increment, accumulator, updates, seen = problem.state.increment, torch.zeros(2, dtype=torch.float64), 0.0, []
    for t in range(problem.case.steps):
        p = accumulator + increment
        seen.append((p, increment))
        u = (p >= 0.5).double() if offsets is None else offsets[t][0] * p + offsets[t][1]
        x_product = product(problem.inputs[:, t], w.weight_ih, w.bias)
        new = cell.step(w, x_product, cell.recurrent_product(w, h), h, c)
        increment = u * increment_of(problem.gate, new.h if c is None else new.c) + (1 - u) * increment
        h = u[:, None] * new.h + (1 - u[:, None]) * h
        c = None if c is None else u[:, None] * new.c + (1 - u[:, None]) * c
        accumulator, updates = (1 - u) * p, updates + u.sum()
    return seen if offsets is None else (h, updates)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("cell", list(CELLS))
def test_continuing_equals_running_through(cell: str, scan) -> None:
    """Also in the gradient: the seam carries all that the gates depend on."""
    whole = make_problem(Case(cell=cell, layers=2, steps=12, mask="ragged"))
    want = whole.run(scan)

    def piece(start: int, end: int, state: SkipRNNState) -> ScanOutput:
        part = replace(whole, inputs=whole.inputs[:, start:end], mask=whole.mask[:, start:end])
        part.state = state
        return part.run(scan)

    state, gates = whole.state, []
    for start, end in ((0, 1), (1, 6), (6, 6), (6, 12)):
        out = piece(start, end, state)
        state = out.state
        gates.append(out.update_gates)
    got = ScanOutput(None, state, sum(g.sum(1) for g in gates), torch.cat(gates, 1))
    assert_same_values(got, want, EXACT.values)
    assert_same_gradients(gradients(whole, got), gradients(whole, want), EXACT.gradients)


@pytest.mark.parametrize("scan", SCANS)
def test_masked_steps_do_not_exist(scan) -> None:
    """Left, right, inner and no padding: the same states, gates and gradients, whatever stands at masked steps."""
    plain = make_problem(Case(steps=8, sequence=True))
    want = plain.run(scan)
    want_grads = gradients(plain, want)
    generator = torch.Generator().manual_seed(5)
    for place in (range(8), range(5, 13), sorted(torch.randperm(13, generator=generator)[:8].tolist())):
        inputs = torch.full((4, 13, 3), math.nan, dtype=torch.float64)
        inputs[:, list(place)] = plain.inputs.detach()
        mask = torch.zeros(4, 13, dtype=torch.bool)
        mask[:, list(place)] = True
        padded = replace(plain, inputs=inputs.requires_grad_(), mask=mask)
        got = padded.run(scan)
        assert float(got.update_gates[:, ~mask[0]].detach().abs().sum()) == 0
        kept = got._replace(sequence=got.sequence[:, mask[0]], update_gates=got.update_gates[:, mask[0]])
        assert_same_values(kept, want, EXACT.values)
        grads = gradients(padded, kept)
        assert float(grads["inputs"][:, ~mask[0]].abs().sum()) == 0
        grads["inputs"] = grads["inputs"][:, mask[0]]
        assert_same_gradients(grads, want_grads, EXACT.gradients)


@pytest.mark.parametrize("scan", SCANS)
def test_a_skipped_input_is_never_read(scan) -> None:
    problem = make_problem(Case(batch=3, steps=12))
    want = problem.run(scan)
    gates = want.update_gates.detach() > 0.5
    assert not gates.all()
    problem.inputs = problem.inputs.detach().masked_fill(~gates.unsqueeze(-1), math.nan)
    got = problem.run(scan)
    assert_same_values(got, want, 0)


@pytest.mark.parametrize("scan", SCANS)
def test_a_nan_that_is_read_shows_and_never_closes_the_gate(scan) -> None:
    problem = make_problem(Case(batch=3, steps=12))
    problem.inputs.data[1, 0] = math.nan  # the first step is always read
    out = problem.run(scan)
    assert out.state.h[:, 1].isnan().all()
    assert out.num_updates[1] == 12
    assert not out.state.h[:, [0, 2]].isnan().any()


def test_dense_has_second_derivatives() -> None:
    problem = make_problem(Case(batch=1, steps=4, inputs=1, hidden=2, gate="forced"))

    def final_state(weight: Tensor) -> Tensor:
        layers = [problem.layers[0]._replace(weight_hh=weight)]
        return replace(problem, layers=layers).run(dense_scan).state.h

    assert torch.autograd.gradgradcheck(final_state, (problem.layers[0].weight_hh,))


@pytest.mark.parametrize("scan", FAST_SCANS)
def test_fast_scans_refuse_second_derivatives(scan) -> None:
    problem = make_problem(Case(batch=1, steps=3))
    h = problem.run(scan).state.h
    with pytest.raises(RuntimeError, match=r"no second derivative.*set_scan_backend\('dense'\)"):
        torch.autograd.grad(h.sum(), problem.inputs, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("scan", SCANS)
def test_backward_twice_and_under_saved_tensor_hooks(scan) -> None:
    problem = make_problem(Case(sequence=True, steps=6))
    with torch.autograd.graph.save_on_cpu():
        total = problem.run(scan).sequence.sum()
    first = torch.autograd.grad(total, problem.inputs, retain_graph=True)[0]
    second = torch.autograd.grad(total, problem.inputs)[0]
    assert torch.equal(first, second)


def test_state_reorder_and_detach() -> None:
    out = make_problem(Case(layers=2)).run(dense_scan)
    index = torch.tensor([2, 0])
    state = out.state.reorder(index)
    assert torch.equal(state.h, out.state.h[:, index])
    assert torch.equal(state.increment, out.state.increment[index])
    assert out.state.h.requires_grad
    assert not any(part.requires_grad for part in state.detach())


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("value", [math.nan, 1e25])
def test_a_cotangent_stays_in_its_row(scan, value: float) -> None:
    case = Case(sequence=True)
    problem = make_problem(case)
    grad = torch.ones(case.batch, case.steps, case.hidden, dtype=torch.float64)
    want = torch.autograd.grad(problem.run(dense_scan).sequence, problem.inputs, grad)[0]
    grad[0, 3] = value
    got = torch.autograd.grad(problem.run(scan).sequence, problem.inputs, grad)[0]
    torch.testing.assert_close(got[1:], want[1:])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_after"])
def test_a_nan_at_a_step_that_a_forced_gate_skips_has_no_effect(scan, cell: str) -> None:
    problem = make_problem(Case(cell=cell, gate="planned"))
    problem.inputs = problem.inputs.detach().masked_fill(~problem.forced_gates.unsqueeze(-1), math.nan).requires_grad_()
    out = problem.run(scan)
    assert all(bool(g.isfinite().all()) for g in gradients(problem, out).values())
