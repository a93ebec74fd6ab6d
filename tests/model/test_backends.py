"""The choice of the engine, and models that are compiled, exported or traced."""

import sys

import pytest
import torch
from scan_cases import MISSING, NEEDS_NATIVE
from small_models import classifier

from hf_skiprnn import SkipRNNForSequenceClassification, kernels
from hf_skiprnn.model.event_scan_skip_rnn import EVENTS
from hf_skiprnn.model.layers_skip_rnn import select_engine


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    assert model.base_model.scan_backend == "auto"
    monkeypatch.setenv("HF_SKIPRNN_BACKEND", "dense")
    assert model.base_model.scan_backend == "dense"
    model.set_scan_backend("events")
    assert model.base_model.scan_backend == "events"
    with pytest.raises(ValueError, match="must be one of auto, dense, events, cpu, triton; got 'fast'"):
        model.set_scan_backend("fast")
    monkeypatch.setenv("HF_SKIPRNN_BACKEND", "fast")
    with pytest.raises(ValueError, match="HF_SKIPRNN_BACKEND must be one of"):
        classifier()(torch.rand(1, 2, 2))


@NEEDS_NATIVE
def test_a_compiled_model_has_no_graph_break_on_the_native_engine() -> None:
    """Also in training. aot_eager traces as inductor does, without its compile time."""
    torch.compiler.reset()
    model = classifier()
    model.set_scan_backend("cpu")
    x, labels = torch.rand(3, 20, 2), torch.tensor([0, 1, 2])
    want = model(x, labels=labels)
    want.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x, labels=labels)
    got.loss.backward()
    assert torch.equal(got.num_updates, want.num_updates)
    torch.testing.assert_close(got.logits, want.logits)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


@NEEDS_NATIVE
def test_inference_exports_on_the_native_engine() -> None:
    model = classifier().eval()
    model.set_scan_backend("cpu")
    x = torch.rand(3, 20, 2)
    program = torch.export.export(model, (x,))
    other = torch.rand(3, 20, 2)
    torch.testing.assert_close(program.module()(other).logits, model(other).logits)


class Logits(torch.nn.Module):
    """Tracing takes modules, and knows no model output."""

    def __init__(self, model: SkipRNNForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


@NEEDS_NATIVE
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # tracing itself is old
def test_a_traced_model_holds_the_native_scan_and_not_what_it_gave(grad: bool) -> None:
    model = classifier().eval()
    model.set_scan_backend("cpu")
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(Logits(model), torch.rand(3, 20, 2), check_trace=False)
        other = torch.rand(3, 20, 2)
        torch.testing.assert_close(traced(other), model(other).logits)


def test_a_compiled_model_calls_the_event_scan_as_it_is() -> None:
    torch.compiler.reset()
    model = classifier().eval()
    model.set_scan_backend("events")
    x = torch.rand(3, 20, 2)
    with torch.no_grad():
        got = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(got.logits, model(x).logits)


def test_one_engine_answers_for_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.zeros(2, 3, 1)
    native = kernels.choose_engine("auto", inputs, 100)
    assert native.name == ("events" if MISSING else "cpu")
    assert (native.scan_tokens is None) == native.follows_autocast == bool(MISSING)
    assert kernels.choose_engine("auto", inputs, kernels.MANY_WEIGHTS + 1) is EVENTS  # 3 steps do not pay
    assert kernels.choose_engine("auto", inputs.to("meta"), 100) is EVENTS
    with pytest.raises(RuntimeError, match=r"'cpu' needs inputs on the CPU; they are on meta\. Use 'events'"):
        kernels.choose_engine("cpu", inputs.to("meta"), 100)
    with pytest.raises(RuntimeError, match=r"'triton' needs inputs on a CUDA GPU; they are on cpu\. Use 'events'"):
        kernels.choose_engine("triton", inputs, 100)
    monkeypatch.setattr(kernels, "_why_not", lambda name, device: "It is not built.")
    assert kernels.choose_engine("auto", inputs, 100) is EVENTS
    with pytest.raises(RuntimeError, match="It is not built"):
        kernels.choose_engine("cpu", inputs, 100)


def test_without_the_package_named_engines_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hf_skiprnn.kernels", None)
    assert select_engine("auto", torch.zeros(2, 3, 1), 100) is EVENTS
    with pytest.raises(RuntimeError, match="pip install hf_skiprnn"):
        select_engine("cpu", torch.zeros(2, 3, 1), 100)
