"""torchao: int8 weights of the linear layers, the update gate among them, give the gates of the dense model."""

import copy
import warnings

import pytest
import torch
from small_models import BACKENDS, classifier

with warnings.catch_warnings(action="ignore"):
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install torchao, or make tools"
    )

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own
X = torch.linspace(-2, 2, 2 * 30 * 2).reshape(2, 30, 2).sin()


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_weights_keep_the_gate(backend: str) -> None:
    model = classifier(hidden_size=32).eval()
    want = model(X, output_update_gates=True)
    quantized = copy.deepcopy(model)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    assert type(quantized.base_model.update_gate.weight) is not torch.nn.Parameter
    quantized.set_scan_backend(backend)
    with torch.no_grad():
        got = quantized(X, output_update_gates=True)
    assert (got.num_updates - want.num_updates).abs().max() <= 1
    assert got.num_updates.max() < 30
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=0.05)
    stream = quantized.stream()
    assert [stream.push(x) for x in X[0]] == got.update_gates[0].bool().tolist()
