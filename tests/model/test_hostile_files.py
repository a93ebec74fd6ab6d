"""Files from strangers: they load, or are refused with a reason; they are never run as code and never crash.

`make fuzz` tries more random cases.
"""

import json
import math
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file
from small_checkpoints import small_checkpoint, small_model
from survival.ledger import SCALE, note
from transformers import AutoModelForSequenceClassification

from hf_skiprnn import (
    SkipRNNConfig,
    SkipRNNFeatureExtractor,
    SkipRNNForFrameClassification,
    SkipRNNForSequenceClassification,
    SkipRNNImageProcessor,
    SkipRNNModel,
)

REFUSED = (ValueError, OSError, StrictDataclassError)
CASES = settings(suppress_health_check=list(HealthCheck))  # folders are shared by examples on purpose


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint: input_size 1, 6 units, 3 labels."""
    return small_checkpoint(tmp_path_factory.mktemp("whole"), "series", cell_type="lstm", num_hidden_layers=1)


@pytest.fixture(scope="module")
def scratch(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that each example changes."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("scratch"), dirs_exist_ok=True))


def load_and_run(folder: Path) -> str:
    """What becomes of a checkpoint: an answer, or a refusal that says something."""
    try:
        model = SkipRNNForSequenceClassification.from_pretrained(folder)
    except REFUSED as error:
        return "refused" if len(str(error)) > 20 else f"refused with no more than {str(error)!r}"
    inputs = torch.zeros(2, 5, model.config.input_size, dtype=model.dtype)
    with torch.no_grad():
        logits = model.eval()(input_values=inputs, return_dict=True).logits  # a config may ask for tuples
    assert logits.shape == (2, model.config.num_labels)
    assert model.config.hidden_size <= 64  # nothing large was made of a small file
    return "loaded"


DAMAGES = ("cut", "flip in the header", "flip in the data", "bytes", "other numbers", "other names", "other shapes")


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, Any]:
    kind = draw(st.sampled_from(DAMAGES))
    if kind == "bytes":
        return kind, draw(st.binary(max_size=64))
    if kind == "other numbers":
        return kind, draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45, 0.0]))
    return kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 2**32))


def damage(content: bytes, kind: str, where: Any, seed: int = 0) -> bytes:
    header = 8 + struct.unpack("<Q", content[:8])[0]
    if kind == "cut":
        return content[: int(where * len(content))]
    if kind == "bytes":
        return where
    start, end = (0, header) if kind == "flip in the header" else (header, len(content))
    at = start + int(where * (end - start))
    return content[:at] + bytes([content[at] ^ (1 << seed % 8)]) + content[at + 1 :]


def with_other_tensors(path: Path, kind: str, where: Any, seed: int = 0) -> None:
    tensors = load_file(path)
    if kind == "other numbers":
        tensors["skip_rnn.layers.0.weight_hh"][0, 0] = where
    else:
        names = sorted(tensors)
        name = names[int(where * len(names))]
        tensor = tensors.pop(name)
        if kind == "other shapes":
            tensors[name] = tensor.new_zeros([seed % 9, 1 + seed % 7][: 1 + seed % 2])
        else:
            tensors[f"{name}{'_' * (seed % 3)}"[: None if seed % 2 else -1]] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


@settings(CASES, max_examples=70 * SCALE)
@given(damages())
def test_damaged_weights_are_refused_or_harmless(whole: Path, scratch: Path, drawn: tuple[Any, ...]) -> None:
    path = scratch / "model.safetensors"
    shutil.copyfile(whole / "config.json", scratch / "config.json")
    if drawn[0].startswith("other"):
        shutil.copyfile(whole / path.name, path)
        with_other_tensors(path, *drawn)
    else:
        path.write_bytes(damage((whole / path.name).read_bytes(), *drawn))
    outcome = load_and_run(scratch)
    assert outcome in ("refused", "loaded")
    note(f"weights: {drawn[0]}", outcome)
    if drawn[0] in ("cut", "bytes") or (drawn[0] == "other numbers" and not math.isfinite(drawn[1])):
        assert outcome == "refused"


HOSTILE_NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 1e38, -1e38, 1e308, 5e-324, 0.5, math.nan, math.inf, -math.inf]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | HOSTILE_NUMBERS | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
OWN_FIELDS = sorted(SkipRNNConfig().to_dict().keys() - {"_name_or_path", "transformers_version", "model_type"})
STRANGE_NAMES = st.sampled_from(["hiden_size", "to_dict", "cell", "__class__", "attribute_map", "from_pretrained", "x"])


def changes() -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from([*OWN_FIELDS, "num_labels"]) | STRANGE_NAMES, JSON_VALUES, max_size=3)


@settings(CASES, max_examples=70 * SCALE)
@given(changes())
def test_a_config_of_any_values_is_refused_or_runs(whole: Path, scratch: Path, fields: dict[str, Any]) -> None:
    path = scratch / "config.json"
    path.write_text(json.dumps(json.loads((whole / path.name).read_text()) | fields))
    shutil.copyfile(whole / "model.safetensors", scratch / "model.safetensors")
    outcome = load_and_run(scratch)
    assert outcome in ("refused", "loaded")
    note("config.json: values", outcome)


@settings(CASES, max_examples=30 * SCALE)
@given(st.text(max_size=30) | JSON_VALUES.map(json.dumps) | st.binary(max_size=30))
def test_a_config_of_any_text_is_refused(whole: Path, scratch: Path, text: str | bytes) -> None:
    path = scratch / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    outcome = load_and_run(scratch)
    assert outcome == "refused"
    note("config.json: text", outcome)


@settings(CASES, max_examples=80 * SCALE)
@given(changes())
def test_arguments_of_any_values_make_a_config_or_an_error(fields: dict[str, Any]) -> None:
    try:
        config = SkipRNNConfig(**fields)
    except REFUSED:
        note("SkipRNNConfig(...)", "refused")
        return
    again = SkipRNNConfig.from_dict(json.loads(config.to_json_string()))
    numbers = [name for name in OWN_FIELDS if name in SkipRNNConfig.__annotations__]
    assert {name: getattr(again, name) for name in numbers} == {name: getattr(config, name) for name in numbers}
    note("SkipRNNConfig(...)", "made")


@settings(CASES, max_examples=30 * SCALE)
@given(st.sampled_from([SkipRNNImageProcessor, SkipRNNFeatureExtractor]), st.data())
def test_a_processor_of_any_values_is_refused_or_loads(
    tmp_path_factory: pytest.TempPathFactory, kind: Any, data: st.DataObject
) -> None:
    sound = kind().to_dict()
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(sound)), JSON_VALUES, max_size=2))
    folder = tmp_path_factory.mktemp("processor")
    (folder / "preprocessor_config.json").write_text(json.dumps(sound | fields))
    try:
        kind.from_pretrained(folder)
    except (*REFUSED, TypeError):
        note(kind.__name__, "refused")
    else:
        note(kind.__name__, "loaded")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_size": 3}, r"no field 'hiden_size'\. Did you mean 'hidden_size'"),
        ({"to_dict": 1}, "no field 'to_dict'"),
        ({"hidden_size": 2**40}, "hidden_size must be at most 65536; got 1099511627776"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1024"),
        ({"num_labels": 10**12}, "num_labels must be an integer from 1 to 1048576; got 1000000000000"),
        ({"budget_weight": math.nan}, "budget_weight must be finite; got nan"),
        ({"skip_probability": math.nan}, r"skip_probability must be in \[0, 1\); got nan"),
        ({"dtype": "float99"}, "dtype must be that of floating point numbers"),
        ({"id2label": [1]}, r"id2label.*\[1\]"),
    ],
)
def test_what_a_config_says_about_hostile_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        SkipRNNConfig(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 3_000}, r"do not fit config\.json: .* is \[24\] there, and \[12000\] by the config"),
        ({"num_hidden_layers": 900}, r"lack layers\.1\.bias, .* which config\.json asks for"),
        ({"cell_type": "gru"}, r"do not fit config\.json"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {}}, r"For a new head, pass ignore_mismatched_sizes=True"),
    ],
)
def test_weights_of_another_config_are_refused_before_memory_is_taken(
    whole: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        SkipRNNForSequenceClassification.from_pretrained(tmp_path)


def test_a_renamed_gate_is_no_new_gate(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["skip_rnn.gate.weight"] = tensors.pop("skip_rnn.update_gate.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack update_gate\.weight, .* It holds gate\.weight instead"):
        SkipRNNForSequenceClassification.from_pretrained(tmp_path)


def test_a_new_head_and_a_gate_that_is_to_be_learned_now_load(tmp_path: Path) -> None:
    small_model("series", gate="always").save_pretrained(tmp_path)
    assert SkipRNNModel.from_pretrained(tmp_path).config.hidden_size == 6
    learned = SkipRNNForSequenceClassification.from_pretrained(tmp_path, gate="learned")
    assert learned.base_model.update_gate.weight.isfinite().all()
    SkipRNNModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "base")
    assert SkipRNNForFrameClassification.from_pretrained(tmp_path / "base").classifier.weight.isfinite().all()


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", "model.bin"])
def test_a_pickle_is_never_unpickled(whole: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"weight": Canary(canary)}))
    with pytest.raises(REFUSED):
        SkipRNNForSequenceClassification.from_pretrained(folder)
    assert not canary.exists()


def test_code_beside_a_checkpoint_does_not_run_unasked(whole: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    for name in ("modeling_skip_rnn.py", "configuration_skip_rnn.py", "evil.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert isinstance(model, SkipRNNForSequenceClassification)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auto_map", "evil.Model"),
        ("auto_map", {"AutoModelForSequenceClassification": 3}),
        ("custom_pipelines", ["evil"]),
        ("custom_pipelines", {"image-classification": "evil.Pipeline"}),
        ("custom_pipelines", {"image-classification": {"pt": []}}),
        ("custom_pipelines", {"image-classification": {"impl": 3}}),
    ],
)
def test_code_that_is_named_in_another_form_is_refused(whole: Path, tmp_path: Path, name: str, value: object) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {name} must map names to .*module\.Class.*; got"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {name: None}))
    SkipRNNForSequenceClassification.from_pretrained(folder)
