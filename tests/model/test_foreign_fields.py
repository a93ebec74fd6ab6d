"""Fields that other tools and users add to a config: what is saved loads again; the constructor stays strict."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from small_checkpoints import small_checkpoint, small_model, small_tokenizer
from small_models import classifier
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification

FOREIGN: dict[str, Any] = {
    "sensor": "wrist",  # a user's own
    "eos_token_id": 2,  # Trainer copies a tokenizer's ids
    "bos_token_id": 1,
    "sep_token_id": 3,
    "tie_word_embeddings": False,
    "gradient_checkpointing": False,
    "torchscript": False,
    "is_decoder": False,
    "transformers.js_config": {"dtype": "q8", "kv_cache_dtype": None},
    "_num_labels": 3,  # AutoTrain
    "max_length": 128,
    "padding": "max_length",
    "peft_type": "LORA",
    "base_model_name_or_path": "someone/base",
}
GENERATION = {"max_length"}  # transformers drops settings of text generation from every config


class Caught(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def warnings_of_configs() -> Any:
    """What the config's module has logged."""
    caught, logger = Caught(), logging.getLogger(SkipRNNConfig.__module__)
    logger.addHandler(caught)
    yield caught.texts
    logger.removeHandler(caught)


def test_what_a_file_holds_is_kept(tmp_path: Path, warnings_of_configs: list[str]) -> None:
    folder = small_checkpoint(tmp_path / "first", "text")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | FOREIGN))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "second")
    again = AutoConfig.from_pretrained(tmp_path / "second")
    for config in (model.config, again, SkipRNNConfig.from_json_file(path)):
        assert {name: getattr(config, name, None) for name in FOREIGN.keys() - GENERATION} == {
            name: value for name, value in FOREIGN.items() if name not in GENERATION
        }
    assert warnings_of_configs == []


def test_fields_can_be_replaced_while_loading(tmp_path: Path) -> None:
    config = SkipRNNConfig()
    config.sensor = "wrist"
    config.save_pretrained(tmp_path)
    assert SkipRNNConfig.from_pretrained(tmp_path, sensor="ankle", hidden_size=5).sensor == "ankle"
    loaded, unused = SkipRNNConfig.from_pretrained(tmp_path, unheard_of=1, return_unused_kwargs=True)
    assert (loaded.sensor, unused) == ("wrist", {"unheard_of": 1})


def test_near_misses_are_named_in_one_warning(warnings_of_configs: list[str]) -> None:
    config = SkipRNNConfig.from_dict({"hiden_size": 5, "sensor": 1, "stridee": 2})
    assert (config.hidden_size, config.hiden_size, config.sensor) == (110, 5, 1)
    (warning,) = warnings_of_configs
    assert warning.endswith("'hiden_size' (did you mean 'hidden_size'?), 'stridee' (did you mean 'stride'?).")


@pytest.mark.parametrize("name", [*FOREIGN, "hiden_size"])
def test_the_constructor_stays_strict(name: str) -> None:
    with pytest.raises(ValueError, match=f"has no field '{name}'"):
        SkipRNNConfig(**{name: FOREIGN.get(name)})


@pytest.mark.parametrize("name", ["to_dict", "cell", "__class__", "attribute_map", "from_pretrained", "validate"])
def test_a_file_replaces_nothing_of_the_class(name: str) -> None:
    with pytest.raises(ValueError, match=f"a field '{name}', which would replace"):
        SkipRNNConfig.from_dict({name: 1})


def test_a_trainer_that_copies_token_ids_saves_what_loads(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"eos_token": ".", "bos_token": "a", "sep_token": "film"})
    rows = [{"input_ids": [2, 3, 4], "labels": 1}, {"input_ids": [3, 5, 6], "labels": 0}]
    arguments = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    trainer = Trainer(small_model("text"), arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    assert trainer.model.config.eos_token_id == tokenizer.eos_token_id
    loaded = SkipRNNForSequenceClassification.from_pretrained(tmp_path / "model")
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_a_number_of_labels_of_any_library() -> None:
    for count in (np.int64(3), np.int32(3), torch.tensor(3), 3):
        config = SkipRNNConfig(num_labels=count)
        assert type(config.num_labels) is int
        assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert SkipRNNConfig(num_labels=None).num_labels == SkipRNNConfig().num_labels
    for wrong in (np.float64(3), 0, True, "3"):
        with pytest.raises(ValueError, match=r"num_labels must be an integer from 1 to .*; got"):
            SkipRNNConfig(num_labels=wrong)


def test_one_class_is_regression_unless_it_is_called_classification() -> None:
    with pytest.raises((ValueError, StrictDataclassError), match="requires `num_labels > 1`"):
        SkipRNNConfig(num_labels=1, problem_type="single_label_classification")
    x = torch.rand(2, 4, 2)
    out = classifier(num_labels=1)(x, labels=torch.tensor([0, 0]))
    torch.testing.assert_close(out.task_loss, out.logits.square().mean())
    assert classifier()(x, labels=None).loss is None
