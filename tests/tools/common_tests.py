"""transformers' common tests of models, from the sdist of the installed version, on models of tokens and of numbers.

Not collected by `pytest`; `make tools` runs this file. The sdist is downloaded into build/sdists where it is missing.
"""

import functools
import subprocess
import sys
import tarfile
import types
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paths import ROOT

from hf_skiprnn import SkipRNNConfig, SkipRNNForFrameClassification, SkipRNNForSequenceClassification, SkipRNNModel

pytestmark = pytest.mark.filterwarnings("default")
BATCH, STEPS, UNITS, WORDS = 5, 7, 8, 99

# What the common tests import of files that the sdist lacks: tests of export and of generation.
ABSENT = (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin"))


def sdist() -> Path:
    """The folder of transformers' source distribution, of the installed version."""
    folder = ROOT / "build" / "sdists"
    name = f"transformers-{transformers.__version__}"
    if not (folder / name / "tests").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--no-build-isolation", "--dest", folder, name.replace("-", "==")], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name


def import_common_tests() -> Any:
    """transformers' tests/test_modeling_common.py; what it imports of tests that the sdist lacks is empty."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(sdist() / "tests")]
    sys.modules[package.__name__] = package
    for path, name in ABSENT:
        for part in (path.partition(".")[0], path):
            module = types.ModuleType(f"{package.__name__}.{part}")
            module.__path__ = []
            sys.modules[module.__name__] = module
        setattr(module, name, type(name, (), {}))
    with warnings.catch_warnings(action="ignore"):  # marks that our settings do not know
        from transformers_tests import test_modeling_common

    return test_modeling_common


common = import_common_tests()
# By these names the tests know which models take labels.
common.MODEL_MAPPING_NAMES["skip_rnn"] = "SkipRNNModel"
common.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["skip_rnn"] = "SkipRNNForSequenceClassification"
common.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["skip_rnn"] = "SkipRNNForFrameClassification"

NO_EMBEDDINGS = "a model of numbers has no token embeddings"
# Tests that cannot pass, and why. They must fail: one that passes is reported.
EVERY_MODEL = {
    "test_model_weights_reload_no_missing_tied_weights": "a file that holds none of the model's weights is refused; "
    "transformers would load random numbers (tests/model/test_hostile_files.py)",
}
MODEL_OF_NUMBERS = {
    "test_inputs_embeds": NO_EMBEDDINGS,
    "test_inputs_embeds_matches_input_ids": NO_EMBEDDINGS,
    "test_model_get_set_embeddings": NO_EMBEDDINGS,
    "test_resize_tokens_embeddings": NO_EMBEDDINGS,
    "test_retain_grad_hidden_states_attentions": "the first hidden state is the input, a number without gradient",
}


def expect_failures(reasons: dict[str, str]) -> Callable[[type], type]:
    """Return a class decorator that marks tests which must fail."""

    def mark(case: type) -> type:
        for name, reason in reasons.items():
            setattr(case, name, pytest.mark.xfail(reason=reason, strict=True)(copy_of(getattr(case, name))))
        return case

    return mark


def copy_of(test: Callable[..., None]) -> Callable[..., None]:
    """A function of its own, so that a mark on it stays off the class that it is inherited from."""

    @functools.wraps(test)
    def copied(self: unittest.TestCase) -> None:
        test(self)

    return copied


class Tester:
    """What the common tests ask a model's own tests for."""

    __test__ = False
    batch_size, seq_length, hidden_size, num_hidden_layers, num_labels = BATCH, STEPS, UNITS, 2, 3
    is_training = True

    def __init__(self, parent: unittest.TestCase, **fields: Any) -> None:
        self.parent, self.fields = parent, fields

    def get_config(self) -> SkipRNNConfig:
        sizes = {"input_size": UNITS, "hidden_size": UNITS, "num_hidden_layers": 2, "num_labels": 3}
        return SkipRNNConfig(**sizes, update_bias=-1.0, **self.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[SkipRNNConfig, dict[str, torch.Tensor]]:
        config, mask = self.get_config(), torch.ones(BATCH, STEPS, dtype=torch.long)
        if config.vocab_size:
            return config, {"input_ids": torch.randint(1, WORDS, (BATCH, STEPS)), "attention_mask": mask}
        return config, {"input_values": torch.rand(BATCH, STEPS, UNITS), "attention_mask": mask}


class CommonTests(common.ModelTesterMixin):
    """Settings of the common tests."""

    all_model_classes = (SkipRNNModel, SkipRNNForSequenceClassification, SkipRNNForFrameClassification)
    has_attentions = False
    fields: dict[str, Any]

    def setUp(self) -> None:
        self.model_tester = Tester(self, **self.fields)


@expect_failures(EVERY_MODEL)
class TestOfTokens(CommonTests, unittest.TestCase):
    fields = {"vocab_size": WORDS, "pad_token_id": 0}  # noqa: RUF012 - read only


@expect_failures(EVERY_MODEL | MODEL_OF_NUMBERS)
class TestOfNumbers(CommonTests, unittest.TestCase):
    fields: dict[str, Any] = {}  # noqa: RUF012 - read only

    def test_load_with_mismatched_shapes(self) -> None:
        self.skipTest(f"it asks for embeddings of another shape by vocab_size; {NO_EMBEDDINGS}")
