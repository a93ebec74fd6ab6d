"""One trained checkpoint at several budgets, as scripts/evaluate.py --gate_shifts measures it."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Skip GRU that knows the digits better than chance: a few seconds of training."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(load_digits().target)
    config = SkipRNNConfig(cell_type="gru", hidden_size=32, num_labels=10, update_bias=0.0, budget_weight=1e-4)
    model = SkipRNNForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        rows = torch.arange(step * 64, step * 64 + 64) % 1200
        model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("digits")
    model.eval().save_pretrained(folder)
    return folder


def test_the_curve_of_a_trained_model(checkpoint: Path, tmp_path: Path) -> None:
    from hf_skiprnn.commands import evaluate as script

    options = ["--task", "digits", "--figure_rows", "0", "--output_dir", str(tmp_path)]
    weights = (checkpoint / "model.safetensors").read_bytes()
    result = script.main([str(checkpoint), *options, "--gate_shifts", "-1", "0", "-8", "2"])
    points = result["operating_points"]
    assert [point["gate_shift"] for point in points] == [-8, -1, 0, 2]
    updates = [point["updates"] for point in points]
    assert updates == sorted(updates)
    assert updates[0] < 3 < updates[2] < 64 == updates[3]
    accuracy = [point["accuracy"] for point in points]
    assert accuracy[2] == result["metrics"]["accuracy"] > 0.3  # 0.1 is chance
    assert accuracy[0] < accuracy[2] - 0.1  # the limit: without reading there is nothing to know
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    saved = json.loads((tmp_path / "evaluation-test.json").read_text())
    assert saved["operating_points"] == points
    assert (tmp_path / "operating-points-test.png").stat().st_size > 1000
