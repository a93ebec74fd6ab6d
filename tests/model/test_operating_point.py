"""The operating point: shifts and rates of each row in calls, streams, pull and pipelines; saved; checked."""

import logging
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import pipeline

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.training.calibration import calibrate, share_read

SHIFTS = [-3.0, -0.5, 0.0, 1.0, 2.5]


def build(**fields) -> SkipRNNForSequenceClassification:
    torch.manual_seed(0)
    config = {"input_size": 2, "hidden_size": 8, "num_labels": 3, "update_bias": -1.5} | fields
    return SkipRNNForSequenceClassification(SkipRNNConfig(**config)).eval().double()


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(5, 60, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_each_row_has_its_own_shift(rows) -> None:
    model = build()
    together = model(rows, gate_shift=SHIFTS)
    for row, shift in enumerate(SHIFTS):
        model.set_gate_shift(shift)
        alone = model(rows[row : row + 1])
        assert alone.num_updates == together.num_updates[row]
        torch.testing.assert_close(alone.logits[0], together.logits[row])
    assert together.num_updates[0] < together.num_updates[-1]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_streams_and_pull_move_as_the_call_does(cell: str, rows) -> None:
    model = build(cell_type=cell)
    want = model(rows, gate_shift=SHIFTS, output_update_gates=True)
    pulled = model.pull(lambda at: [rows[i, t] for i, t in at], [60] * 5, gate_shift=SHIFTS)
    assert torch.equal(pulled.update_gates, want.update_gates)
    streams = pickle.loads(pickle.dumps(model.stream(5, gate_shift=SHIFTS)))
    read = torch.stack([streams.push(rows[:, t]) for t in range(60)], 1)
    assert torch.equal(read, want.update_gates.bool())
    for row, shift in enumerate(SHIFTS):
        stream = model.stream(gate_shift=shift)
        assert [stream.push(x) for x in rows[row]] == want.update_gates[row].bool().tolist()


def test_the_point_is_saved_with_the_checkpoint(rows, tmp_path) -> None:
    model = build()
    model.set_gate_shift(0.75)
    calibrate(model, [{"input_values": rows}])
    model.save_pretrained(tmp_path)
    again = SkipRNNForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.gate_shift == 0.75
    assert again.config.gate_calibration == model.config.gate_calibration
    assert torch.equal(again(rows).num_updates, model(rows).num_updates)
    assert not torch.equal(model(rows).num_updates, model(rows, gate_shift=0.0).num_updates)


def test_a_calibrated_model_reads_the_share_that_is_asked_for() -> None:
    model, generator = build(), torch.Generator().manual_seed(2)
    seen, new = (torch.randn(100, 60, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = calibrate(model, [{"input_values": seen[:50]}, {"input_values": seen[50:], "labels": torch.zeros(50)}])
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(pairs))
    for rate in (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9):
        assert (model(new, update_rate=rate).num_updates / 60).mean().item() == pytest.approx(rate, rel=0.15)
    rates = torch.linspace(0.1, 0.9, 100).double()
    assert (model(new, update_rate=rates).num_updates / 60 - rates).mean().abs() < 0.03


def test_pipelines_take_the_point(rows, tmp_path) -> None:
    model = build(input_size=2).float()
    calibrate(model, [{"input_values": rows.float()}])
    classifier = pipeline("sequence-classification", model=model)
    series = [row.float().numpy() for row in rows]
    low, high = (classifier(series, update_rate=rate, return_updates=True, batch_size=2) for rate in (0.1, 0.8))
    assert sum(a[0]["updates"] for a in low) < sum(a[0]["updates"] for a in high)
    assert classifier(np.asarray(series[0]), gate_shift=-60.0, return_updates=True)[0]["updates"] == 1


def test_noise_moves_rows_in_training_only(rows) -> None:
    model = build(gate_noise=3.0)
    same = rows[:1].expand(40, -1, -1)
    assert len(set(model(same).num_updates.tolist())) == 1
    model.train()
    assert len(set(model(same).num_updates.tolist())) > 3
    drawn = [model(same, generator=torch.Generator().manual_seed(7)).num_updates for _ in range(2)]
    assert torch.equal(*drawn)


def test_the_rate_budget_is_the_share_of_steps(rows) -> None:
    model = build(budget_loss="rate", budget_weight=2.0)
    mask = torch.ones(5, 60)
    mask[2, 10:] = 0
    mask[3] = 0
    out = model(rows, attention_mask=mask)
    share = out.num_updates / mask.sum(1).clamp(min=1)
    torch.testing.assert_close(out.budget_loss, 2.0 * share.mean())
    assert build(budget_loss="rate", budget_weight=-0.5)(rows).budget_loss < 0
    with pytest.raises(Exception, match="must not be negative"):
        build(budget_weight=-0.5)


def test_share_read_is_all_updates_over_all_real_steps(rows) -> None:
    mask = torch.ones(5, 60)
    mask[0, 10:] = 0
    out = build()(rows, attention_mask=mask, gate_shift=0.5)
    parts = [{"input_values": rows[part], "attention_mask": mask[part]} for part in (slice(2), slice(2, 5))]
    share = share_read(build(), parts, 0.5)
    assert share == pytest.approx(out.num_updates.sum().item() / 250)
    assert share != pytest.approx((out.num_updates / mask.sum(1)).mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"gate_shift": [1.0, 2.0]}, r"gate_shift must be a number, or \[B\] = \(5,\) numbers; got shape \(2,\)"),
        ({}, {"gate_shift": float("nan")}, "gate_shift must be finite"),
        ({}, {"update_rate": 0.2}, "update_rate needs a calibrated model"),
        ({"gate_calibration": [[0.1, -1.0], [0.5, 1.0]]}, {"update_rate": 0.9}, "must lie in what was measured"),
        ({"gate_calibration": [[0.1, -1.0]]}, {"update_rate": 0.1, "gate_shift": 1.0}, "not both"),
        ({"gate": "strided"}, {"gate_shift": 1.0}, "need gate='learned'"),
    ],
)
def test_what_cannot_be_is_said(rows, fields, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        build(**fields)(rows, **options)


@pytest.mark.parametrize("pairs", [[], [[0.5]], [[0.5, 0.0], [0.4, 1.0]], [[0.1, 1.0], [0.2, 1.0]], [[1.5, 0.0]]])
def test_a_calibration_is_a_function_that_increases(pairs) -> None:
    with pytest.raises(Exception, match="gate_calibration must hold pairs"):
        SkipRNNConfig(gate_calibration=pairs)


def test_a_call_needs_rows() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(build(), [])
    with pytest.raises(ValueError, match="gate='learned'"):
        calibrate(build(gate="always"), [{"input_values": torch.zeros(1, 2, 2).double()}])


def test_a_training_step_without_labels_says_that_no_loss_has_the_budget(rows, caplog) -> None:
    logging.Logger.warning_once.cache_clear()  # another test may have had the warning
    model = build()
    model(rows)
    assert "add out.budget_loss" not in caplog.text  # inference
    model.train()
    for _ in range(2):
        model(rows, labels=torch.zeros(5, dtype=torch.long))
        assert "add out.budget_loss" not in caplog.text
    model(rows)
    model(rows)
    assert caplog.text.count("add out.budget_loss to it") == 1
