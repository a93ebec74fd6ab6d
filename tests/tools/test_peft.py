"""peft: adapters on every kind of module train, save, load, and merge into the same outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import BACKENDS, classifier

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft, or make tools")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads names that transformers renames

IDS = torch.arange(24).reshape(2, 12) % 7
LABELS = torch.tensor([0, 2])
TARGETS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "gate": {"target_modules": ["update_gate"]},
    "classifier": {"target_modules": ["classifier"], "task": None},  # SEQ_CLS saves the classifier whole
    "embeddings": {"target_modules": ["embeddings"]},
    "all": {"target_modules": ["embeddings", "update_gate", "classifier"], "task": None},
    "gate and modules_to_save": {"target_modules": ["update_gate"], "modules_to_save": ["classifier", "embeddings"]},
    "gate saved whole": {"target_modules": ["embeddings"], "modules_to_save": ["update_gate"]},
    "recurrent weights": {
        "target_modules": [],
        "target_parameters": ["layers.0.weight_hh", "layers.0.weight_ih", "layers.1.weight_hh"],
    },
}


def adapted(task: str | None = "SEQ_CLS", **arguments: Any) -> Any:
    model = classifier(vocab_size=7, num_hidden_layers=2)
    return peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=2, init_lora_weights=False, **arguments))


def outputs(model: Any) -> dict[str, torch.Tensor]:
    out = model.eval()(input_ids=IDS, output_update_gates=True)
    return {"logits": out.logits, "gates": out.update_gates}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_train_save_load_and_merge(name: str, backend: str, tmp_path: Path) -> None:
    model = adapted(**TARGETS[name])
    model.get_base_model().set_scan_backend(backend)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=LABELS).loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
    want = outputs(model)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model), want)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    start = classifier(vocab_size=7, num_hidden_layers=2)
    start.load_state_dict(base_weights(model), strict=True)
    torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(start, tmp_path)), want)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(outputs(model)["logits"], want["logits"])
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), want)
    assert type(merged.base_model.update_gate).__name__ == "UpdateGate"


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    """The frozen weights of an adapted model, under their names before it was adapted."""
    weights = {}
    for name, value in model.get_base_model().state_dict().items():
        if "lora_" not in name and "modules_to_save" not in name:
            weights[name.replace(".base_layer", "").replace(".original_module", "")] = value
    return weights


def test_dropout_of_an_adapter_on_the_gate_draws_once_a_call() -> None:
    model = adapted(target_modules=["update_gate"], lora_dropout=0.5).train()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_adapters_stream() -> None:
    model = adapted(target_modules=["update_gate", "embeddings"])
    want = outputs(model)
    stream = model.get_base_model().stream()
    assert [stream.push(token) for token in IDS[0]] == want["gates"][0].bool().tolist()
    torch.testing.assert_close(stream.logits, want["logits"][0])


def test_prompt_tuning_passes_inputs_embeds() -> None:
    config = peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=3, num_layers=1, token_dim=2, num_attention_heads=1
    )
    model = peft.get_peft_model(classifier(vocab_size=7), config)
    out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS, output_update_gates=True)
    out.loss.backward()
    assert out.update_gates.shape == (2, 15)
    assert model.prompt_encoder["default"].embedding.weight.grad.any()
