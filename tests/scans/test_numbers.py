"""Numbers from anywhere: what is not a number, too large, too small, too long, too many; right, or a clear error."""

import math
from dataclasses import replace

import pytest
import torch
from scan_cases import LONG_SCANS
from scan_problems import Case, assert_close, assert_is_the_definition, assert_same_values, gradients, make_problem
from tolerances import EXACT, LARGE, SINGLE, TOLERANCES
from torch import Tensor

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.evaluation.metrics import update_statistics
from hf_skiprnn.kernels.cpu.operators import cpu_scan
from hf_skiprnn.model.cells_skip_rnn import CELLS
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan

EXTREMES = [math.nan, math.inf, -math.inf, 1e38, -3e38, 1e10, 1e-45, 1e-40, -0.0]


def same(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return torch.allclose(got.double(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("scan", LONG_SCANS)
@pytest.mark.parametrize("cell", list(CELLS))
def test_an_extreme_input_stays_in_its_row_and_is_as_in_the_definition(cell: str, scan, value: float) -> None:
    """In float32, row 1 holds the number once, row 2 everywhere; rows 0 and 3 must not notice."""
    problem = make_problem(Case(cell=cell, layers=2, batch=4, steps=12, sequence=True), dtype=torch.float32)
    plain = problem.run(scan)
    inputs = problem.inputs.detach().clone()
    inputs[1, 0, 0], inputs[2] = value, value
    extreme = replace(problem, inputs=inputs.requires_grad_())
    want, got = extreme.run(dense_scan), extreme.run(scan)
    assert torch.equal(got.update_gates, want.update_gates)
    assert same(got.state.h, want.state.h, SINGLE.values)
    assert same(got.sequence, want.sequence, SINGLE.values)
    for row in (0, 3):  # to the bit in the native engine; batched products round by the number of rows
        assert same(got.sequence[row], plain.sequence[row], 0 if scan is cpu_scan else 1e-6)
    if math.isfinite(value):
        theirs = gradients(extreme, want)
        for name, grad in gradients(extreme, got).items():
            assert grad.isfinite().all(), name
            assert_close(name, grad, theirs[name], SINGLE.gradients)


@pytest.mark.parametrize("scan", LONG_SCANS)
@pytest.mark.parametrize("value", [0.0, 1.0, -7.5])
def test_batches_without_variance_are_rows_without_difference(scan, value: float) -> None:
    problem = make_problem(Case(batch=8, steps=20, sequence=True, state="fresh"))
    constant = replace(problem, inputs=torch.full_like(problem.inputs, value).requires_grad_())
    constant.state = constant.state._replace(
        h=problem.state.h[:, :1].expand(-1, 8, -1), c=problem.state.c[:, :1].expand(-1, 8, -1)
    )
    out = constant.run(scan)
    assert_same_values(out, constant.run(dense_scan), EXACT.values)
    assert all(same(row, out.sequence[0], EXACT.values) for row in out.sequence)
    statistics = update_statistics(out.num_updates.detach(), torch.full((8,), 20))
    assert statistics["updates_std"] == 0


@pytest.mark.parametrize("scan", LONG_SCANS)
@pytest.mark.parametrize(
    ("batch", "steps", "hidden"),
    [(1, 1, 1), (10_000, 3, 2), (2, 4, 1024), (3, 17, 1), (1, 1000, 3), (257, 9, 33)],
)
def test_any_size_is_the_definition(scan, batch: int, steps: int, hidden: int) -> None:
    problem = make_problem(Case(batch=batch, steps=steps, hidden=hidden, inputs=2, gate_bias=-3.0))
    assert_is_the_definition(problem, scan, LARGE)


def new_model(**fields) -> SkipRNNForSequenceClassification:
    torch.manual_seed(0)
    return SkipRNNForSequenceClassification(
        SkipRNNConfig(**({"input_size": 2, "hidden_size": 5, "num_labels": 3, "update_bias": -4.0} | fields))
    ).eval()


@pytest.mark.parametrize(("backend", "steps"), [("events", 10_000), ("auto", 100_000)])
def test_long_sequences_in_one_piece_are_those_of_pieces(backend: str, steps: int) -> None:
    model, x = new_model(), torch.randn(1, steps, 2)
    model.set_scan_backend(backend)
    state, updates = None, 0.0
    with torch.inference_mode():
        whole = model(input_values=x)
        for chunk in x.split(2 * steps // 5, dim=1):
            out = model(input_values=chunk, state=state)
            state, updates = out.state, updates + float(out.num_updates)
    assert steps / 1000 < updates == float(whole.num_updates) < steps / 2
    assert_close("logits", out.logits, whole.logits, SINGLE.values)


def test_no_rows_are_an_error_and_masked_rows_are_not() -> None:
    model = new_model()
    with pytest.raises(ValueError, match=r"at least one row; got \(0, 3, 2\)"):
        model(input_values=torch.zeros(0, 3, 2))
    out = model(input_values=torch.full((2, 4, 2), math.nan), attention_mask=torch.zeros(2, 4))
    assert out.num_updates.tolist() == [0, 0]
    assert out.logits.isfinite().all()


def test_what_half_precision_cannot_hold_is_found_by_check_inputs() -> None:
    """70 000 is infinite in float16; the model says so when asked, and shows it otherwise."""
    model, x = new_model().half(), torch.zeros(1, 3, 2)
    x[0, 1, 0] = 70_000.0
    with pytest.raises(ValueError, match=r"Input holds inf .*70000.* float16.* at row 0, step 1, column 0"):
        model(input_values=x, check_inputs=True)
    out = new_model().to(torch.bfloat16)(input_values=x, check_inputs=True)  # which has the range of float32
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["events", "auto"])
def test_products_beyond_half_precision_saturate(dtype: torch.dtype, backend: str) -> None:
    """60 000 times weights of 1: the gates are 0 or 1, as in float64."""
    model = new_model(update_bias=0.0)
    with torch.no_grad():
        for weight in (model.base_model.layers[0].weight_ih, model.base_model.layers[0].bias):
            weight.copy_(weight.sign())
    x = torch.randn(3, 6, 2).sign() * torch.tensor([60_000.0, 1.0])
    want = new_model().double()
    want.load_state_dict(model.to(dtype).double().state_dict())
    model = model.to(dtype)
    model.set_scan_backend(backend)
    got = model(input_values=x).logits
    assert got.isfinite().all()
    assert_close("logits", got, want(input_values=x.double()).logits, TOLERANCES[torch.bfloat16].values)
