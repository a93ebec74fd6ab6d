"""Saving and loading, initial values, Auto classes, and what else transformers asks of a model."""

import copy
import math
from pathlib import Path

import pytest
import torch
from small_models import VARIANTS, classifier
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
