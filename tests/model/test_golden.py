"""Weights that earlier versions saved load, and answer as they did; golden/make.py wrote them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scan_problems import assert_close
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import hf_skiprnn

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))


def test_there_are_golden_checkpoints_of_this_version() -> None:
    assert hf_skiprnn.__version__ in {path.parent.name for path in CHECKPOINTS}, "run tests/model/golden/make.py"


@pytest.mark.parametrize("backend", ["dense", "events", "auto"])
@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_checkpoint_answers_as_it_did(folder: Path, backend: str) -> None:
    auto = AutoModelForTokenClassification if folder.name == "frames" else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder).eval()
    model.set_scan_backend(backend)
    expected = load_file(folder / "expected.safetensors")
    inputs = {name: expected[name] for name in ("input_values", "input_ids", "attention_mask") if name in expected}
    with torch.inference_mode():
        out = model(**inputs, output_update_gates=True)
    assert torch.equal(out.update_gates, expected["update_gates"])
    assert torch.equal(out.num_updates, expected["num_updates"])
    assert_close("logits", out.logits, expected["logits"], 1e-5)  # float32, other orders of summation
