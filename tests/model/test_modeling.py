"""The models: inputs, losses, states, saving, and how transformers treats them."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from scan_cases import MISSING
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_skiprnn import (
    SkipRNNConfig,
    SkipRNNForFrameClassification,
    SkipRNNForSequenceClassification,
    SkipRNNModel,
    SkipRNNState,
)
from hf_skiprnn.model.inputs_skip_rnn import logger

# "auto" is the native engine where there is one.
BACKENDS = ["dense", "events", "auto"]
TINY = {"hidden_size": 6, "input_size": 2, "num_labels": 3, "update_bias": -1.0}
VARIANTS = [
    {},
    {"cell_type": "gru", "num_hidden_layers": 2},
    {"cell_type": "gru", "gru_reset": "after"},
    {"gate": "always"},
    {"gate": "strided", "stride": 3},
    {"gate": "random", "skip_probability": 0.4},
    {"learn_initial_state": False},
]


def classifier(**overrides) -> SkipRNNForSequenceClassification:
    return SkipRNNForSequenceClassification(SkipRNNConfig(**(TINY | overrides)))


# Inputs


def test_input_noise_is_added_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SkipRNNModel(SkipRNNConfig(**(TINY | {"input_noise": 0.3, "gate": "always"})))
    x, read = torch.rand(200, 50, 2), []
    scan = model.scan
    monkeypatch.setattr(model, "scan", lambda inputs, *rest: (read.append(inputs), scan(inputs, *rest))[1])
    model.eval()(input_values=x)
    model.train()(input_values=x)
    assert torch.equal(read[0], x)
    noise = read[1] - x
    assert abs(noise.mean()) < 0.01  # 20,000 draws: a deviation of 0.002
    assert noise.std() == pytest.approx(0.3, abs=0.01)


def test_three_kinds_of_input_give_the_same_result() -> None:
    pixels = torch.rand(2, 2, 3, 4)
    model = classifier().eval()
    rows = pixels.permute(0, 2, 3, 1).reshape(2, 12, 2)  # row by row
    torch.testing.assert_close(model(pixel_values=pixels).logits, model(input_values=rows).logits)
    text = classifier(vocab_size=11).eval()
    assert text.main_input_name == "input_ids"
    assert model.main_input_name == "input_values"
    ids = torch.randint(0, 11, (2, 12))
    text.skip_rnn.load_state_dict(model.skip_rnn.state_dict(), strict=False)
    text.classifier.load_state_dict(model.classifier.state_dict())
    values = text.get_input_embeddings()(ids)
    torch.testing.assert_close(text(input_ids=ids).logits, model(input_values=values).logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_in_inference_are_those_of_training(backend: str) -> None:
    """In inference the native engine looks up only the tokens that are read."""
    model = classifier(vocab_size=11, num_hidden_layers=2).eval()
    model.set_scan_backend(backend)
    ids, mask = torch.randint(0, 11, (3, 20)), torch.rand(3, 20) < 0.8
    want = model(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        got = model(input_ids=ids.int(), attention_mask=mask, output_update_gates=True)
    torch.testing.assert_close(got.logits, want.logits)
    assert torch.equal(got.num_updates, want.num_updates)
    with torch.no_grad():  # what is not read does not matter
        read = got.update_gates.bool()
        again = model(input_ids=ids.where(read, 0), attention_mask=mask)
    assert torch.equal(again.logits, got.logits)


def test_contract_of_the_output() -> None:
    out = classifier()(torch.rand(4, 9, 2), labels=torch.tensor([0, 1, 2, 0]), output_update_gates=True)
    assert list(out) == ["loss", "logits", "task_loss", "budget_loss", "num_updates", "update_gates", "state"]
    torch.testing.assert_close(out.loss, out.task_loss + out.budget_loss)
    assert torch.equal(out.num_updates, out.update_gates.sum(1))
    assert set(out.update_gates.unique().tolist()) <= {0.0, 1.0}
    assert isinstance(out.state, SkipRNNState)
    without = classifier()(torch.rand(4, 9, 2))
    assert list(without) == ["logits", "budget_loss", "num_updates", "state"]


def test_base_model_output() -> None:
    model = SkipRNNModel(SkipRNNConfig(**TINY))
    out = model(torch.rand(4, 9, 2))
    assert out.last_hidden_state.shape == (4, 9, 6)
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, -1])
    assert model(torch.rand(4, 9, 2), output_sequence=False).last_hidden_state is None
    assert isinstance(model.update_gate, torch.nn.Linear)
    assert not hasattr(SkipRNNModel(SkipRNNConfig(gate="always")), "update_gate")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_padding_on_any_side_changes_nothing(variant: dict) -> None:
    model = classifier(**variant).eval()
    x = torch.rand(3, 10, 2)

    def run(inputs: torch.Tensor, mask: torch.Tensor | None = None):
        if variant.get("gate") == "random":  # one draw per padded step: the same draws at the same real steps
            draws = torch.rand(3, 14, generator=torch.Generator().manual_seed(1)) > 0.4
            gates = draws[:, : inputs.shape[1]].clone()
            if mask is not None:
                gates[mask] = draws[:, :10].reshape(-1)
            return model(inputs, mask, forced_gates=gates)
        return model(inputs, mask)

    want = run(x)
    for place in (range(10), range(4, 14), [0, 1, 3, 5, 6, 7, 8, 10, 12, 13]):
        padded, mask = torch.full((3, 14, 2), math.inf), torch.zeros(3, 14, dtype=torch.long)
        padded[:, list(place)], mask[:, list(place)] = x, 1
        got = run(padded, mask.bool())
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-6)
        assert torch.equal(got.num_updates, want.num_updates)


def test_random_gates_follow_the_real_step_and_the_seed() -> None:
    model = classifier(gate="random", skip_probability=0.4).eval()
    x, mask = torch.rand(50, 20, 2), torch.ones(50, 20, dtype=torch.long)

    def gates(seed: int, **kwargs) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model(x, generator=generator, output_update_gates=True, **kwargs).update_gates

    assert torch.equal(gates(3), gates(3))
    assert not torch.equal(gates(3), gates(4))
    assert gates(3)[:, 0].all()
    assert 0.55 < gates(3)[:, 1:].mean() < 0.65
    mask[:, 5] = 0
    holed = gates(3, attention_mask=mask)
    assert torch.equal(holed[:, mask[0] == 1], gates(3)[:, :19])


def test_strided_gates_continue_over_a_seam() -> None:
    model = classifier(gate="strided", stride=4).eval()
    x = torch.rand(2, 21, 2)
    whole = model(x, output_update_gates=True)
    assert whole.update_gates[0].nonzero().squeeze(1).tolist() == [0, 4, 8, 12, 16, 20]
    state, gates = None, []
    for start, end in ((0, 3), (3, 10), (10, 21)):
        out = model(x[:, start:end], state=state, output_update_gates=True)
        state = out.state
        gates.append(out.update_gates)
    assert torch.equal(torch.cat(gates, 1), whole.update_gates)
    torch.testing.assert_close(out.logits, whole.logits)


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=str)
def test_state_continues_a_sequence(variant: dict) -> None:
    model = classifier(**variant).eval()
    x = torch.rand(3, 30, 2)
    first = model(x[:, :13])
    second = model(x[:, 13:], state=first.state.detach())
    whole = model(x)
    torch.testing.assert_close(second.logits, whole.logits, rtol=0, atol=1e-6)
    assert torch.equal(first.num_updates + second.num_updates, whole.num_updates)
    swapped = model(x[[2, 0], 13:], state=first.state.reorder(torch.tensor([2, 0])))
    torch.testing.assert_close(swapped.logits, whole.logits[[2, 0]], rtol=0, atol=1e-6)


def test_a_row_without_real_steps_returns_the_initial_state() -> None:
    model = classifier().eval()
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1] = 0
    out = model(torch.rand(2, 5, 2), mask)
    assert out.num_updates[1] == 0
    torch.testing.assert_close(out.logits[1], model.classifier(model.skip_rnn.layers[0].initial_h))


# Losses


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("cost", None, lambda n, length: n),
        ("l1", 0.3, lambda n, length: abs(n - 0.3 * length)),
        ("l2", 0.3, lambda n, length: (n - 0.3 * length) ** 2),
    ],
)
def test_budgets(kind: str, target: float | None, expected) -> None:
    model = classifier(budget_loss=kind, budget_target=target, budget_weight=0.01)
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[0, 12:] = 0
    out = model(torch.rand(4, 20, 2), mask)
    want = 0.01 * sum(expected(n, m) for n, m in zip(out.num_updates.tolist(), mask.sum(1).tolist(), strict=True)) / 4
    torch.testing.assert_close(out.budget_loss.item(), want, rtol=1e-5, atol=0)
    out.budget_loss.backward()
    assert model.skip_rnn.update_gate.bias.grad.abs() > 0


def test_task_losses() -> None:
    x = torch.rand(4, 6, 2)
    classes, several, numbers = torch.tensor([0, 2, 1, -100]), torch.rand(4, 3).round(), torch.rand(4)
    model = classifier(budget_weight=0)
    out = model(x, labels=classes)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:3], classes[:3]))
    assert model.config.problem_type == "single_label_classification"
    model = classifier(budget_weight=0)
    out = model(x, labels=several)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, several))
    assert model.config.problem_type == "multi_label_classification"
    model = classifier(budget_weight=0, num_labels=1)
    for labels in (numbers, numbers[:, None]):
        out = model(x, labels=labels)
        torch.testing.assert_close(out.loss, F.mse_loss(out.logits.squeeze(-1), numbers))
    out = classifier(budget_weight=0)(x, labels=torch.full((4,), -100))
    assert out.loss == 0


def test_several_labels_of_which_some_are_unknown() -> None:
    model = classifier(budget_weight=0, problem_type="multi_label_classification")
    x, several = torch.rand(4, 6, 2), torch.rand(4, 3).round()
    known = torch.tensor([[True, False, True]]).repeat(4, 1)
    out = model(x, labels=several.where(known, -100))
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits[known], several[known]))
    assert model(x, labels=torch.full((4, 3), -100)).loss == 0


def test_frame_losses_are_means_of_row_means() -> None:
    model = SkipRNNForFrameClassification(SkipRNNConfig(**(TINY | {"budget_weight": 0})))
    x, mask = torch.rand(2, 4, 2), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[0, -100, 2, 1], [1, 1, 0, 0]])
    out = model(x, mask, labels)
    assert out.logits.shape == (2, 4, 3)
    rows = [
        F.cross_entropy(out.logits[0, [0, 2, 3]], labels[0, [0, 2, 3]]),
        F.cross_entropy(out.logits[1, :2], labels[1, :2]),
    ]
    torch.testing.assert_close(out.loss, sum(rows) / 2)
    halves = [model(x[i : i + 1], mask[i : i + 1], labels[i : i + 1]).loss for i in range(2)]
    torch.testing.assert_close(sum(halves) / 2, out.loss)

    several = torch.rand(2, 4, 3).round()
    several[0, 1] = -100
    several[0, 2, 0] = -100
    out = model(x, mask, several)
    terms = F.binary_cross_entropy_with_logits(out.logits, several.clamp(min=0), reduction="none")
    first = (terms[0, 0].mean() + terms[0, 2, 1:].mean() + terms[0, 3].mean()) / 3
    torch.testing.assert_close(out.loss, (first + terms[1, :2].mean()) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_every_parameter(backend: str) -> None:
    for variant in VARIANTS:
        model = classifier(vocab_size=7, **variant)
        model.set_scan_backend(backend)
        model(input_ids=torch.randint(0, 7, (3, 12)), labels=torch.tensor([0, 1, 2])).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing, (variant, missing)


# Precision


@pytest.mark.parametrize("mode", ["autocast", "model"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_trains_without_nan_and_gates_stay_float32(mode: str, cell: str, backend: str) -> None:
    model = classifier(cell_type=cell, num_hidden_layers=2)
    model.set_scan_backend(backend)
    if mode == "model":
        model = model.to(torch.bfloat16)
        assert model.skip_rnn.update_gate.weight.dtype == torch.float32
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, labels = torch.rand(16, 40, 2), torch.arange(16) % 3
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            out = model(x, labels=labels)
        assert out.num_updates.dtype == out.state.increment.dtype == out.state.h.dtype == torch.float32
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]


def test_a_model_made_in_half_precision_has_its_gate_in_float32() -> None:
    model = AutoModelForSequenceClassification.from_config(SkipRNNConfig(**TINY), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.base_model.update_gate.weight.dtype == torch.float32


def test_float16_inference() -> None:
    model = classifier().half()
    logits = model(torch.rand(3, 20, 2, dtype=torch.float16)).logits
    assert logits.dtype == torch.float16
    assert logits.isfinite().all()


# Saving, loading, transformers


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_save_and_load(variant: dict, tmp_path: Path) -> None:
    model = classifier(**variant).eval()
    model.save_pretrained(tmp_path)
    loaded, info = SkipRNNForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
    x = torch.rand(3, 20, 2)
    runs = [m(x, generator=torch.Generator().manual_seed(0)).logits for m in (model, loaded.eval())]
    assert torch.equal(*runs)


def test_state_dict_names_are_frozen() -> None:
    model = SkipRNNForSequenceClassification(SkipRNNConfig(cell_type="gru", gru_reset="after", num_hidden_layers=2))
    layer = ["weight_ih", "weight_hh", "bias", "bias_hh_n", "initial_h"]
    names = [f"skip_rnn.layers.{index}.{name}" for index in range(2) for name in layer]
    names += ["skip_rnn.update_gate.weight", "skip_rnn.update_gate.bias", "classifier.weight", "classifier.bias"]
    assert list(model.state_dict()) == names
    assert model.state_dict()["skip_rnn.layers.1.weight_ih"].shape == (330, 110)
    assert "skip_rnn.layers.0.initial_c" in classifier().state_dict()


def test_auto_classes(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SkipRNNConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), SkipRNNModel)
    for auto in (AutoModelForSequenceClassification, AutoModelForImageClassification, AutoModelForAudioClassification):
        assert isinstance(auto.from_pretrained(tmp_path), SkipRNNForSequenceClassification)
    assert isinstance(AutoModelForTokenClassification.from_pretrained(tmp_path), SkipRNNForFrameClassification)


def test_a_new_head_leaves_loaded_weights_alone(tmp_path: Path) -> None:
    model = classifier(cell_type="gru")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.125)
    model.skip_rnn.save_pretrained(tmp_path)
    loaded = SkipRNNForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert all((p == 0.125).all() for p in loaded.skip_rnn.parameters())
    assert not (loaded.classifier.weight == 0.125).all()


def test_initial_values_follow_the_authors_code() -> None:
    torch.manual_seed(0)
    lstm = SkipRNNModel(SkipRNNConfig(hidden_size=200, input_size=50, forget_bias=1.5, update_bias=0.7)).layers[0]
    bound = math.sqrt(6 / (250 + 800))
    for weight in (lstm.weight_ih, lstm.weight_hh):
        assert 0.98 * bound < weight.abs().max() <= bound
        assert abs(weight.mean()) < 0.01 * bound
    assert lstm.bias.view(4, 200).unique(dim=1).squeeze(1).tolist() == [0, 1.5, 0, 0]
    assert 0.8 < lstm.initial_h.std() < 1.2
    gru = SkipRNNModel(SkipRNNConfig(cell_type="gru", hidden_size=200, input_size=50, update_bias=0.7))
    assert gru.layers[0].bias.view(3, 200).unique(dim=1).squeeze(1).tolist() == [1, 1, 0]
    gates, candidate = gru.layers[0].weight_hh.split([400, 200])
    assert 0.98 * math.sqrt(6 / 650) < gates.abs().max() <= math.sqrt(6 / 650)
    assert 0.98 * math.sqrt(6 / 450) < candidate.abs().max() <= math.sqrt(6 / 450)
    torch.testing.assert_close(gru.update_gate.bias.item(), 0.7)


def test_tuple_output_and_deep_copy() -> None:
    model = classifier().eval()
    x, labels = torch.rand(2, 9, 2), torch.tensor([0, 1])
    out = model(x, labels=labels)
    for got, want in zip(model(x, labels=labels, return_dict=False), out.to_tuple(), strict=True):
        assert got is want or isinstance(got, SkipRNNState) or torch.equal(got, want)
    assert torch.equal(copy.deepcopy(model)(x).logits, out.logits)


def test_resized_embeddings() -> None:
    model = classifier(vocab_size=7, pad_token_id=0)
    assert model.get_input_embeddings().weight[0].abs().sum() == 0
    model.resize_token_embeddings(9)
    assert model.config.vocab_size == 9
    assert model(input_ids=torch.full((1, 4), 8)).logits.shape == (1, 3)


def test_checkpoint_runs_where_the_package_is_not_installed(tmp_path: Path) -> None:
    """Its code travels with it: a fresh process that cannot import hf_skiprnn gives the same logits and gates."""
    model = classifier(num_hidden_layers=2).eval()
    model.set_scan_backend("events")  # what runs there
    model.save_pretrained(tmp_path / "checkpoint")
    x = torch.rand(2, 30, 2)
    torch.save(x, tmp_path / "x.pt")
    script = """
import sys, json, torch
sys.modules["hf_skiprnn"] = None
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("checkpoint", trust_remote_code=True)
out = model(torch.load("x.pt"), output_update_gates=True)
print(json.dumps([out.logits.tolist(), out.update_gates.tolist()]))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    logits, gates = json.loads(run.stdout.splitlines()[-1])
    out = model(x, output_update_gates=True)
    assert torch.equal(torch.tensor(logits), out.logits)
    assert torch.equal(torch.tensor(gates), out.update_gates)


# Backends


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


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
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


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
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


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
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


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_values, input_ids and pixel_values; got none"),
        ({"input_values": torch.rand(2, 3, 2), "pixel_values": torch.rand(2, 2, 3, 1)}, "and pixel_values"),
        ({"input_values": torch.rand(2, 3)}, r"input_values must be \[B, T, input_size\]; got \(2, 3\)"),
        ({"input_values": torch.rand(2, 3, 5)}, r"with 2 inputs a step; got \(2, 3, 5\)"),
        ({"pixel_values": torch.rand(2, 1, 3, 3)}, r"with 2 inputs a step; got \(2, 1, 3, 3\)"),
        ({"input_values": torch.ones(2, 3, 2, dtype=torch.long)}, "must be floating point; got torch.int64"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "takes input_values or pixel_values; got input_ids"),
        ({"input_values": torch.rand(0, 3, 2)}, r"at least one row and one step; got \(0, 3, 2\)"),
        ({"input_values": torch.rand(2, 0, 2)}, r"at least one row and one step; got \(2, 0, 2\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be \[B, T\] = \(2, 3\); got \(2, 4\)"),
        ({"attention_mask": torch.full((2, 3), 2)}, "attention_mask must hold 0 and 1; got values from 2 to 2"),
        ({"forced_gates": torch.ones(3, 2)}, r"forced_gates must be \[B, T\] = \(2, 3\); got \(3, 2\)"),
        ({"labels": torch.tensor([0, 3])}, r"labels must be in \[0, num_labels = 3\) or -100; got \[3\]"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels must be \[B\] = \(2,\); got \(3,\)"),
        ({"labels": torch.rand(2, 2)}, r"labels must be \[B, num_labels\] = \(2, 3\); got \(2, 2\)"),
    ],
)  # fmt: skip
def test_bad_inputs_say_what_came_and_what_was_expected(arguments: dict, message: str) -> None:
    if arguments and not {"input_values", "input_ids", "pixel_values"} & arguments.keys():
        arguments = {"input_values": torch.rand(2, 3, 2)} | arguments
    with pytest.raises(ValueError, match=message):
        classifier()(**arguments)


def test_the_hint_to_flatten_a_mask_is_for_masks_of_images() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 2, 3\). Flatten the image's mask"):
        classifier()(torch.rand(2, 6, 2), torch.ones(2, 2, 3))
    with pytest.raises(ValueError, match=r"\(2, 6\); got \(2, 5\).$"):
        classifier()(torch.rand(2, 6, 2), torch.ones(2, 5))


def test_padding_without_a_mask_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = classifier(vocab_size=7, pad_token_id=0).eval()
    ids = torch.tensor([[3, 4, 5], [3, 0, 0]])
    mask = (ids != 0).long()
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        model(input_ids=ids, attention_mask=mask)
        assert not caplog.records
        out = model(input_ids=ids)
    assert "begin or end with pad_token_id = 0, and there is no attention_mask" in caplog.text
    assert torch.equal(out.logits, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


def test_bad_tokens_and_states() -> None:
    model = classifier(vocab_size=7)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, vocab_size = 7\); got values from -1 to 7"):
        model(input_ids=torch.tensor([[-1, 7]]))
    with pytest.raises(ValueError, match="input_ids must be integers"):
        model(input_ids=torch.rand(2, 3))
    with pytest.raises(ValueError, match="vocab_size=7, so the model takes input_ids; got input_values"):
        model(torch.rand(2, 3, 2))
    state = classifier().base_model.initial_state(3)
    with pytest.raises(ValueError, match=r"state must have shapes .*\(1, 2, 6\).*got .*\(1, 3, 6\)"):
        classifier()(torch.rand(2, 3, 2), state=state)
    with pytest.raises(ValueError, match="state must have shapes"):
        classifier(cell_type="gru")(torch.rand(3, 3, 2), state=state)


def test_nan_inputs_raise_on_request_and_otherwise_show() -> None:
    model = classifier()
    x = torch.rand(2, 5, 2)
    x[1, 0, 1] = math.nan
    with pytest.raises(ValueError, match="holds nan at row 1, step 0, column 1"):
        model(x, check_inputs=True)
    out = model(x)
    assert out.logits[1].isnan().all()
    assert not out.logits[0].isnan().any()
    mask = torch.ones(2, 5)
    mask[1, 0] = 0
    assert model(x, mask, check_inputs=True).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1; got 0"),
        ({"hidden_size": "many"}, "expected int, got str"),
        ({"cell_type": "rnn"}, "expected one of"),
        ({"gate": "open"}, "expected one of"),
        ({"budget_loss": "l1"}, "needs budget_target"),
        ({"budget_target": 0.5}, "has no target; got budget_target=0.5"),
        ({"budget_loss": "l2", "budget_target": 1.5}, r"in \[0, 1\]; got 1.5"),
        ({"budget_weight": -1.0}, "must not be negative; got -1.0"),
        ({"budget_weight": math.nan}, "must be finite; got nan"),
        ({"skip_probability": 1.0}, r"must be in \[0, 1\); got 1.0"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"pad_token_id": 0}, "needs vocab_size"),
        ({"vocab_size": 3, "pad_token_id": 3}, r"pad_token_id must be in \[0, vocab_size = 3\); got 3"),
        ({"embedding_dropout": 0.1}, "needs vocab_size"),
        ({"input_noise": -0.1}, "input_noise must be a finite standard deviation"),
        ({"input_noise": 0.1, "vocab_size": 5}, "input_noise=0.1 needs numbers"),
        ({"gru_reset": "after"}, "needs cell_type='gru'"),
        ({"problem_type": "multilabel"}, "problem_type must be one of regression, .*got 'multilabel'"),
    ],
)
def test_contradicting_configurations(arguments: dict, message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        SkipRNNConfig(**arguments)


def test_configuration_takes_ints_for_floats_and_survives_json(tmp_path: Path) -> None:
    config = SkipRNNConfig(budget_weight=1, cell_type="gru", gru_reset="after", id2label={0: "no", 1: "yes", 2: "?"})
    assert config.cell == "gru_reset_after"
    config.save_pretrained(tmp_path)
    assert SkipRNNConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
