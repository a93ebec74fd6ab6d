"""accelerate: weights that lie in main memory or on disk, and come for the time of a call."""

from pathlib import Path

import accelerate
import pytest
import torch
from small_models import BACKENDS, classifier

from hf_skiprnn import SkipRNNForSequenceClassification

IDS = torch.arange(24).reshape(2, 12) % 7


def small() -> SkipRNNForSequenceClassification:
    return classifier(vocab_size=7, num_hidden_layers=2).eval()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cpu_offload(backend: str) -> None:
    model = small()
    want = model(IDS, output_update_gates=True)
    accelerate.cpu_offload(model, execution_device="cpu")
    model.set_scan_backend(backend)
    assert all(parameter.is_meta for parameter in model.parameters())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = model(IDS, output_update_gates=True)
        torch.testing.assert_close(got.logits, want.logits)
        assert torch.equal(got.update_gates, want.update_gates)
    stream = model.stream()
    assert [stream.push(token) for token in IDS[0]] == want.update_gates[0].bool().tolist()
    torch.testing.assert_close(stream.logits, want.logits[0])
    pulled = model.pull(lambda at: torch.stack([IDS[row, step] for row, step in at]), length=[12, 12], gate_shift=0.0)
    torch.testing.assert_close(pulled.logits, want.logits)


@pytest.mark.parametrize("device_map", ["auto", {"skip_rnn": "disk", "classifier": "cpu"}, {"": "disk"}], ids=str)
def test_device_map(device_map: str | dict[str, str], tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "model")
    loaded = SkipRNNForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
        torch.testing.assert_close(loaded(IDS).num_updates, model(IDS).num_updates)
