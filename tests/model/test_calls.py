"""How other people's code calls a model: token_type_ids, inputs_embeds, hidden states, tuples, empty sequences."""

import json
import re
from pathlib import Path

import pytest
import torch
from small_checkpoints import small_checkpoint, small_model, small_tokenizer
from small_models import BACKENDS, VARIANTS, classifier
from transformers import pipeline

from hf_skiprnn import SkipRNNForFrameClassification, SkipRNNForSequenceClassification, SkipRNNModel
from hf_skiprnn.model.inputs_skip_rnn import real_lengths

X = torch.linspace(-2, 2, 2 * 20 * 2).reshape(2, 20, 2).sin()
IDS = torch.arange(24).reshape(2, 12) % 7


def test_token_type_ids_are_ignored_and_ids_may_stand_first() -> None:
    model = classifier(vocab_size=7).eval()
    want = model(input_ids=IDS).logits
    assert torch.equal(model(IDS).logits, want)
    assert torch.equal(model(input_ids=IDS, token_type_ids=torch.zeros_like(IDS)).logits, want)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS.int(), torch.ones_like(IDS)).logits, want)
    assert torch.equal(model.base_model(IDS).pooler_output, model.base_model(input_ids=IDS).pooler_output)
    with pytest.raises(ValueError, match="has no attentions"):
        model(IDS, output_attentions=True)
    model(IDS, output_attentions=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_embeds_are_what_the_embeddings_return(backend: str) -> None:
    model = classifier(vocab_size=7).eval()
    model.set_scan_backend(backend)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    out = model(inputs_embeds=embeds)
    torch.testing.assert_close(out.logits, model(IDS).logits)
    out.logits.sum().backward()
    assert embeds.grad.any()
    with pytest.raises(ValueError, match=r"inputs_embeds must be .* with 2 inputs a step; got \(2, 12, 3\)"):
        model(inputs_embeds=torch.rand(2, 12, 3))
    with pytest.raises(ValueError, match="got input_ids and inputs_embeds"):
        model(input_ids=IDS, inputs_embeds=embeds)
    numbers = classifier()
    assert torch.equal(numbers(inputs_embeds=X).logits, numbers(X).logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_under_autocast_are_those_of_the_scan(backend: str) -> None:
    model = classifier(num_hidden_layers=2)
    model.set_scan_backend(backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X, output_hidden_states=True, output_update_gates=True)
    torch.testing.assert_close(out.hidden_states[1][:, -1], out.state.h[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_hidden_states_are_those_of_each_layer(variant: dict, backend: str) -> None:
    model = classifier(**variant | {"num_hidden_layers": 3}).eval()
    model.set_scan_backend(backend)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = mask[0, 3] = 0
    seed = torch.Generator().manual_seed
    out = model(X, mask, output_hidden_states=True, output_update_gates=True, generator=seed(0))
    assert torch.equal(out.logits, model(X, mask, generator=seed(0)).logits)
    base = model.base_model(X, mask, output_hidden_states=True, generator=seed(0))
    assert torch.equal(base.hidden_states[0], X)
    assert torch.equal(base.hidden_states[-1], base.last_hidden_state)
    assert [h.shape for h in out.hidden_states[1:]] == [(2, 20, 6)] * 3
    for layer in range(3):  # each prefix of the sequence ends in the states of all layers
        for step in (0, 7, 19):
            ends = model.base_model(X[:, : step + 1], mask[:, : step + 1], forced_gates=out.update_gates[:, : step + 1])
            torch.testing.assert_close(out.hidden_states[layer + 1][:, step], ends.state.h[layer])
    model.config.output_hidden_states = True
    assert len(model(X).hidden_states) == 4
    assert model(X, output_hidden_states=False).hidden_states is None


def test_hidden_states_of_tokens_in_inference() -> None:
    model = classifier(vocab_size=7).eval()
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True)
        torch.testing.assert_close(out.hidden_states[0], model.get_input_embeddings()(IDS))


def test_return_dict_false_gives_tuples() -> None:
    model = classifier().eval()
    assert torch.equal(model(X, return_dict=False)[0], model(X).logits)
    model.config.return_dict = False
    assert isinstance(model(X), tuple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_steps_are_an_empty_row(variant: dict, backend: str) -> None:
    model = classifier(**variant, budget_loss="rate").eval()
    model.set_scan_backend(backend)
    masked = model(X, torch.zeros(2, 20))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = model(X[:, :0], output_update_gates=True, output_hidden_states=True)
        torch.testing.assert_close(out.logits, masked.logits)
        assert out.num_updates.tolist() == [0, 0]
        assert out.update_gates.shape == (2, 0)
        assert [h.shape[1] for h in out.hidden_states] == [0] * len(out.hidden_states)
    runs = [model(X, state=state, generator=torch.Generator().manual_seed(0)).logits for state in (out.state, None)]
    torch.testing.assert_close(*runs)
    model(X[:, :0], labels=torch.tensor([0, 1])).loss.backward()


def test_no_steps_of_tokens_of_frames_and_of_pictures() -> None:
    text = classifier(vocab_size=7, pad_token_id=0).eval()
    for ids in (torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.long)):  # tokenizers return floating point for ""
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert text(input_ids=ids, attention_mask=torch.zeros(1, 0)).logits.isfinite().all()
    frames = SkipRNNForFrameClassification(classifier().config)
    out = frames(X[:, :0], labels=torch.zeros(2, 0, dtype=torch.long))
    assert out.logits.shape == (2, 0, 3)
    assert out.task_loss == 0
    assert classifier()(pixel_values=torch.zeros(1, 2, 0, 4)).num_updates.tolist() == [0]


def test_a_pipeline_answers_an_empty_text() -> None:
    classify = pipeline("text-classification", small_model("text"), tokenizer=small_tokenizer())
    (alone,) = classify("")
    assert 0 <= alone["score"] <= 1
    assert classify(["", "a good film"], batch_size=2)[0]["score"] == pytest.approx(alone["score"])


def test_shape_mismatches_raise_what_transformers_raises(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path, "series")
    with pytest.raises(RuntimeError, match=r"classifier\.\w+ is \[3.*\] there, and \[42.*\] by the config"):
        SkipRNNForSequenceClassification.from_pretrained(folder, num_labels=42)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 8}))
    with pytest.raises(RuntimeError, match=re.escape("is [18] there, and [24] by the config")):
        SkipRNNModel.from_pretrained(folder)


def test_resizing_embeddings_that_a_model_lacks() -> None:
    for model in (classifier(), classifier().base_model):
        with pytest.raises(ValueError, match="no token embeddings to resize"):
            model.resize_token_embeddings(9)


def test_real_lengths():
    values = torch.zeros(2, 5, 3)
    assert real_lengths({"input_values": values}).tolist() == [5, 5]
    assert real_lengths({"input_ids": torch.zeros(2, 7, dtype=torch.long)}).tolist() == [7, 7]
    assert real_lengths({"pixel_values": torch.zeros(2, 1, 4, 6)}).tolist() == [24, 24]
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]])
    assert real_lengths({"input_values": values, "attention_mask": mask}).tolist() == [3, 0]
    assert real_lengths({"inputs_embeds": values}).tolist() == [5, 5]
    with pytest.raises(ValueError, match=r"needs input_values, .* got \['labels'\]"):
        real_lengths({"labels": torch.zeros(2)})
