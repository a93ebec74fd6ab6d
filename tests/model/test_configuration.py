"""SkipRNNConfig: contradictions are refused; values survive JSON."""

import math
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_skiprnn import SkipRNNConfig


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


def test_arguments_override_a_files_fields_and_are_checked_with_them(tmp_path: Path) -> None:
    dial = SkipRNNConfig(
        budget_loss="rate", budget_weight=-0.5, budget_target=0.2, budget_slope=0.1, gate_shift=0.3, gate_noise=[-1, 2]
    )
    dial.gate_calibration = [[0.1, -1.0], [0.9, 1.0]]
    dial.save_pretrained(tmp_path)
    load = SkipRNNConfig.from_pretrained
    plain = load(tmp_path, gate="always")
    assert (plain.gate_shift, plain.gate_noise, plain.gate_calibration) == (0.0, 0.0, None)
    cost = load(tmp_path, budget_loss="cost")
    assert (cost.budget_weight, cost.budget_slope, cost.budget_target) == (1e-4, 0.0, None)
    assert (cost.gate_shift, cost.gate_calibration) == (0.3, dial.gate_calibration)
    assert load(tmp_path, budget_loss="l2", budget_target=0.4, budget_weight=2.0).budget_weight == 2.0
    assert load(tmp_path, budget_loss="rate").budget_weight == -0.5
    for changes, message in (
        ({"budget_loss": "l2"}, "needs budget_target"),
        ({"gate": "strided", "gate_shift": 1.0}, "need gate='learned'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            load(tmp_path, **changes)
    for config in (plain, cost):
        config.save_pretrained(tmp_path / "again")
        assert load(tmp_path / "again").to_dict() == config.to_dict()
    config, rest = load(tmp_path, hidden_size=7, other=1, return_unused_kwargs=True)
    assert (config.hidden_size, rest) == (7, {"other": 1})


def test_names_with_their_numbers_are_enough():
    names = {"bad": 0, "good": 1, "so-so": 2}
    config = SkipRNNConfig(label2id=names)
    assert (config.num_labels, config.id2label, config.label2id) == (3, {0: "bad", 1: "good", 2: "so-so"}, names)


@pytest.mark.parametrize("numbers", [{"bad": 1, "good": 2}, {"bad": 0, "good": 0}, {"bad": "0"}, {"bad": []}])
def test_names_with_wrong_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match=r"label2id must number the labels 0, 1, 2, \.\.\., each once; got"):
        SkipRNNConfig(label2id=numbers)
