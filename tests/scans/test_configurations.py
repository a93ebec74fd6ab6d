"""Whole configurations drawn at random: every backend against the definition (dense, float64), every mode of the model.

House rules: gates first, exactly equal in float64; in lower precision they may part at a tie, so values and gradients
are compared under replayed gates. `make fuzz` tries more of them.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from scan_problems import (
    Case,
    Problem,
    assert_close,
    assert_same_gradients,
    assert_same_values,
    gradients,
    make_problem,
)
from survival.ledger import SCALE, note
from tolerances import EXACT, TIE, TOLERANCES
from torch import Tensor

from hf_skiprnn import SkipRNNConfig, SkipRNNForFrameClassification, SkipRNNForSequenceClassification
from hf_skiprnn.model.cells_skip_rnn import CELLS
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.layers_skip_rnn import SCAN_BACKENDS, select_engine
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runs_here(name: str) -> bool:
    try:
        select_engine(name, torch.zeros(1, 8, 1, device=DEVICE), 100)
    except RuntimeError:
        return False
    return True


BACKENDS = [name for name in SCAN_BACKENDS if name not in ("auto", "dense") and runs_here(name)]
SETTINGS = settings(suppress_health_check=list(HealthCheck))


def cases() -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        cell=st.sampled_from(list(CELLS)),
        layers=st.integers(1, 3),
        batch=st.integers(1, 6),
        steps=st.integers(1, 40),
        inputs=st.integers(1, 9),
        hidden=st.integers(1, 33),
        gate=st.sampled_from(["learned", "learned", "always", "planned", "forced"]),
        mask=st.sampled_from(["none", "right", "left", "ragged"]),
        state=st.sampled_from(["fresh", "running"]),
        sequence=st.booleans(),
        bias=st.booleans(),
        gate_bias=st.sampled_from([-6.0, -3.0, -1.5, 0.0, 3.0]),
    )


def rounded(problem: Problem, dtype: torch.dtype) -> tuple[Problem, Problem]:
    """(layers and inputs in `dtype`, gate and state in float32 or better; the same numbers in float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    layers, inputs = problem.to(dtype), problem.to(wide)
    low = replace(inputs, inputs=layers.inputs, layers=layers.layers)
    return low, low.to(torch.float64)


def assert_parts_at_ties_only(problem: Problem, gates: Tensor, want: Tensor) -> None:
    """Every row agrees with the definition's gates up to a step at which k D is 0.5 but for rounding."""
    for row in (gates != want).any(1).nonzero().flatten().tolist():
        step = int((gates[row] != want[row]).byte().argmax())
        mask = None if problem.mask is None else problem.mask[:, :step]
        before = replace(problem, inputs=problem.inputs[:, :step], mask=mask)
        state = before.run(dense_scan).state if step else problem.state
        distance = abs(float((state.steps_since_update[row] + 1) * state.increment[row]) - 0.5)
        assert distance < TIE, f"row {row} parts at step {step}, where |k D - 0.5| is {distance:.1e}"


@settings(SETTINGS, max_examples=60 * SCALE)
@given(cases(), st.integers(0, 2**16), st.sampled_from(list(TOLERANCES)), st.sampled_from(BACKENDS), st.booleans())
def test_every_backend_is_the_definition(
    case: Case, seed: int, dtype: torch.dtype, backend: str, training: bool
) -> None:
    low, exact = rounded(make_problem(case, seed).to(device=DEVICE), dtype)
    values, grads = TOLERANCES[dtype]
    scan: Callable[..., ScanOutput] = select_engine(backend, low.inputs, 100).scan
    want = exact.run(dense_scan)
    gates = want.update_gates.detach() > 0.5
    with contextlib.nullcontext() if training else torch.inference_mode():
        got = low.run(scan)
        if dtype == torch.float64:
            assert torch.equal(got.update_gates.detach() > 0.5, gates)
        elif dtype == torch.float32 and case.gate == "learned":
            assert_parts_at_ties_only(exact, got.update_gates.detach() > 0.5, gates)
        got = low.run(scan, forced_gates=gates)
    assert_same_values(got, want, values)
    if training and dtype in (torch.float64, torch.float32):
        assert_same_gradients(gradients(low, got), gradients(exact, want), grads)
    note(f"scan: {backend}, {str(dtype).removeprefix('torch.')}, {'training' if training else 'inference'}", "equal")


@st.composite
def configs(draw: st.DrawFn) -> SkipRNNConfig:
    cell = draw(st.sampled_from(["lstm", "gru"]))
    vocab_size = draw(st.sampled_from([None, 11]))
    budget = draw(st.sampled_from(["cost", "l1", "l2"]))
    return SkipRNNConfig(
        cell_type=cell,
        gru_reset=draw(st.sampled_from(["before", "after"])) if cell == "gru" else "before",
        gate=draw(st.sampled_from(["learned", "learned", "always", "strided", "random"])),
        stride=draw(st.integers(1, 4)),
        skip_probability=draw(st.sampled_from([0.0, 0.3, 0.9])),
        input_size=draw(st.integers(1, 5)),
        hidden_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        vocab_size=vocab_size,
        pad_token_id=draw(st.sampled_from([None, 0])) if vocab_size else None,
        budget_weight=draw(st.sampled_from([0.0, 1e-3, 1.0])),
        budget_loss=budget,
        budget_target=None if budget == "cost" else draw(st.floats(0, 1)),
        learn_initial_state=draw(st.booleans()),
        update_bias=draw(st.sampled_from([-4.0, -1.0, 1.0])),
        num_labels=3,
        problem_type="single_label_classification",
    )


def batch_of(config: SkipRNNConfig, rows: int, steps: int, masked: bool, per_frame: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows * 100 + steps)
    batch: dict[str, Tensor] = {"labels": torch.randint(0, 3, (rows, steps) if per_frame else (rows,), generator=g)}
    if config.vocab_size is None:
        batch["input_values"] = torch.randn(rows, steps, config.input_size, generator=g, dtype=torch.float64)
    else:
        batch["input_ids"] = torch.randint(0, config.vocab_size, (rows, steps), generator=g)
    mask = torch.rand(rows, steps, generator=g) < 0.7 if masked else torch.ones(rows, steps)
    return batch | {"attention_mask": mask.long()}


def run(model: Any, backend: str, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Output, and gradients of the loss by name; zero where the graph does not reach."""
    model.set_scan_backend(backend)
    model.zero_grad(set_to_none=True)
    out = model(**batch, output_update_gates=True, generator=torch.Generator().manual_seed(7))
    out.loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return out, grads


@settings(SETTINGS, max_examples=40 * SCALE)
@given(configs(), st.integers(1, 4), st.integers(1, 30), st.booleans(), st.booleans(), st.sampled_from(BACKENDS))
def test_the_model_is_the_definition_in_every_mode(
    config: SkipRNNConfig, rows: int, steps: int, masked: bool, per_frame: bool, backend: str
) -> None:
    torch.manual_seed(config.hidden_size)
    kind = SkipRNNForFrameClassification if per_frame else SkipRNNForSequenceClassification
    model = kind(config).double().to(DEVICE)
    batch = {name: value.to(DEVICE) for name, value in batch_of(config, rows, steps, masked, per_frame).items()}
    want, theirs = run(model, "dense", batch)
    got, ours = run(model, backend, batch)
    assert torch.equal(got.update_gates, want.update_gates)
    for name in ("logits", "loss", "budget_loss", "num_updates"):
        assert_close(name, getattr(got, name), getattr(want, name), EXACT.values)
    assert_same_gradients(ours, theirs, EXACT.gradients)
    if not (per_frame or config.gate == "random" or DEVICE == "cuda"):  # random gates are drawn in another order there
        assert_close("pull", pulled(model, batch), want.logits, EXACT.values)
        assert_close("push", pushed(model, batch), want.logits, EXACT.values)
    note(f"model: {backend}", "equal")


def real_steps(batch: dict[str, Tensor]) -> list[Tensor]:
    inputs = batch.get("input_values", batch.get("input_ids"))
    return [row[mask != 0] for row, mask in zip(inputs, batch["attention_mask"], strict=True)]


def pulled(model: Any, batch: dict[str, Tensor]) -> Tensor:
    rows = real_steps(batch)
    out = model.eval().pull(lambda wanted: [rows[row][step] for row, step in wanted], length=[len(row) for row in rows])
    model.train()
    return out.logits


def pushed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    answers = []
    for row in real_steps(batch):
        stream = model.stream()
        for x in row:
            stream.push(x)
        answers.append(stream.logits)
    return torch.stack(answers)


def test_every_backend_of_this_machine_is_tried() -> None:
    assert "events" in BACKENDS
    assert set(BACKENDS) <= set(SCAN_BACKENDS)
