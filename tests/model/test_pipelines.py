"""What the four pipelines take and return; test_remote_code.py has them where the package is not installed."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_checkpoints import small_checkpoint, small_model, small_tokenizer
from transformers import BertConfig, BertForSequenceClassification, TextClassificationPipeline, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_skiprnn import (
    SkipRNNFeatureExtractor,
    SkipRNNImageProcessor,
)
from hf_skiprnn.model.pipeline_skip_rnn import SkipRNNTextClassificationPipeline

RNG = np.random.default_rng(2)
TRUSTED: dict[str, Any] = {"trust_remote_code": True, "device": "cpu"}


def test_texts(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "text", "text")
    pipe = pipeline("text-classification", model=str(folder), **TRUSTED)
    texts = ["a good film .", "bad", "a bad film . bad . bad ."]
    with torch.no_grad():
        out = pipe.model(**small_tokenizer()(texts, padding=True, return_tensors="pt"))
    plain = pipe(texts, batch_size=3)
    assert [set(result) for result in plain] == [{"label", "score"}] * 3
    found = pipe(texts, batch_size=2, return_updates=True, top_k=None)
    for i, results in enumerate(found):
        assert len(results) == 3
        best = results[0]
        assert best["label"] == pipe.model.config.id2label[int(out.logits[i].argmax())]
        assert math.isclose(best["score"], out.logits[i].softmax(-1).max().item(), rel_tol=1e-5)
        assert (best["updates"], best["steps"]) == (int(out.num_updates[i]), len(texts[i].split()))
    assert pipe("bad") == [pipe(["bad"])[0]]
    assert pipe("bad", return_updates=True)[0]["steps"] == 1


def test_pictures_from_files_and_arrays(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "image", "image")
    pipe = pipeline("image-classification", model=str(folder), return_updates=True, **TRUSTED)
    pixels = RNG.integers(0, 256, (3, 28, 28), np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "digit.png")
    with torch.no_grad():
        out = pipe.model(pixel_values=torch.from_numpy(pixels).unsqueeze(1) / 255)
    mixed = [str(tmp_path / "digit.png"), Image.fromarray(pixels[1]), pixels[2]]
    found = pipe(mixed, batch_size=3)
    assert [row[0]["updates"] for row in found] == out.num_updates.int().tolist()
    assert {result["steps"] for row in found for result in row} == {784}
    assert found[0] == pipe(str(tmp_path / "digit.png"))


def test_sounds(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "audio", "audio")
    pipe = pipeline("audio-classification", model=str(folder), **TRUSTED)
    sounds = [RNG.normal(size=n).astype(np.float32) for n in (40, 25, 33)]
    found = pipe(sounds, batch_size=2, return_updates=True, top_k=1)
    for sound, (result,) in zip(sounds, found, strict=True):
        with torch.no_grad():
            out = pipe.model(input_values=torch.from_numpy((sound - 0.5) / 2)[None, :, None])
        assert result["steps"] == len(sound)
        assert result["updates"] == out.num_updates.item()
        assert math.isclose(result["score"], out.logits.softmax(-1).max().item(), rel_tol=1e-5)


def test_series_of_numbers(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "series", "series")
    pipe = pipeline("sequence-classification", model=str(folder), **TRUSTED)
    series = [RNG.normal(size=(n, 1)) for n in (12, 30, 5)]
    found = pipe(series, batch_size=3, return_updates=True)
    alone = [pipe(one, return_updates=True) for one in series]
    for together, single in zip(found, alone, strict=True):
        assert [r["label"] for r in together] == [r["label"] for r in single]
        assert [(r["updates"], r["steps"]) for r in together] == [(r["updates"], r["steps"]) for r in single]
        np.testing.assert_allclose([r["score"] for r in together], [r["score"] for r in single], rtol=1e-4)
        assert sorted((r["score"] for r in together), reverse=True) == [r["score"] for r in together]
    assert pipe(series[0][:, 0]) == pipe(series[0])
    assert pipe(torch.from_numpy(series[0])) == pipe(series[0])
    assert len(pipe(series[0], top_k=1)) == 1


def test_a_series_is_standardised_as_in_training(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "series", "series")
    series = RNG.normal(size=(20, 1))
    raw = pipeline("sequence-classification", model=str(folder), **TRUSTED)(series)
    SkipRNNFeatureExtractor(mean=[3.0], std=[5.0]).save_pretrained(folder)
    pipe = pipeline("sequence-classification", model=str(folder), **TRUSTED)
    assert pipe(series * 5 + 3) == raw
    pipe.save_pretrained(tmp_path / "again")
    again = pipeline("sequence-classification", model=str(tmp_path / "again"), **TRUSTED)
    assert again(series * 5 + 3) == raw


def test_regression_and_several_labels_at_once(tmp_path: Path) -> None:
    series = RNG.normal(size=(20, 2)).astype(np.float32)
    for fields in ({}, {"num_labels": 3, "problem_type": "multi_label_classification"}):
        model = small_model("regression", **fields)
        pipe = pipeline("sequence-classification", model=model, device="cpu")  # registered, so it needs no folder
        with torch.no_grad():
            logits = model(input_values=torch.from_numpy(series)[None]).logits[0]
        wanted = logits if len(logits) == 1 else logits.sigmoid().sort(descending=True).values
        np.testing.assert_allclose([result["score"] for result in pipe(series)], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((5, 3)), r"must be \[T, 1\]; got \(5, 3\)"),
        (np.ones((0, 1)), "is empty"),
        (np.array([[1.0], [np.nan]]), "holds nan at step 1"),
    ],
)
def test_series_that_are_refused(value: np.ndarray, message: str) -> None:
    pipe = pipeline("sequence-classification", model=small_model("series"), device="cpu")
    with pytest.raises(ValueError, match=message):
        pipe(value)


def test_tokens_are_refused_as_a_series() -> None:
    with pytest.raises(ValueError, match=r'reads tokens .vocab_size = 7.*pipeline\("text-classification"\)'):
        pipeline("sequence-classification", model=small_model("text"), device="cpu")


OBJECTS: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
    "image": (
        "image-classification",
        {"image_processor": SkipRNNImageProcessor(num_channels=1)},
        list(RNG.integers(0, 256, (5, 4, 4), np.uint8)),
    ),
    "text": ("text-classification", {"tokenizer": small_tokenizer()}, ["a film", "bad", "", "a", "good film ."]),
    "audio": (
        "audio-classification",
        {"feature_extractor": SkipRNNFeatureExtractor(sampling_rate=8000)},
        [RNG.normal(size=n) for n in (3, 4, 5, 6, 7)],
    ),
    "series": ("sequence-classification", {}, [RNG.normal(size=(n, 1)) for n in (3, 4, 5, 6, 7)]),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_around_a_model_object(kind: str) -> None:
    """No folder tells of our pipelines here: transformers' registry chooses by the model."""
    task, parts, inputs = OBJECTS[kind]
    pipe = pipeline(task, model=small_model(kind), device="cpu", **parts)
    assert type(pipe).__module__.startswith("hf_skiprnn.")
    together, alone = pipe(inputs, batch_size=5, top_k=1), [pipe(one, top_k=1) for one in inputs]
    for (row,), (single,) in zip(together, alone, strict=True):
        assert row["label"] == single["label"]
        assert math.isclose(row["score"], single["score"], rel_tol=1e-4)


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_list_runs_in_batches_without_being_asked(kind: str) -> None:
    task, parts, inputs = OBJECTS[kind]
    model = small_model(kind)
    pipe = pipeline(task, model=model, device="cpu", return_updates=True, **parts)
    alone = [pipe(one, top_k=1) for one in inputs]
    sizes: list[int] = []
    model.register_forward_hook(lambda model, given, out: sizes.append(len(out.logits)))
    together = pipe(20 * inputs, top_k=1)
    # Images may have several sizes; of sounds, a long one would fill the memory for all.
    assert sizes == ([1] * 100 if kind in ("image", "audio") else [64, 36])
    for (row,), (single,) in zip(together, 20 * alone, strict=True):
        assert (row["label"], row["updates"], row["steps"]) == (single["label"], single["updates"], single["steps"])
        assert math.isclose(row["score"], single["score"], rel_tol=1e-4)
    sizes.clear()
    assert list(pipe((one for one in inputs), top_k=1)) == alone  # a source of rows one by one is not read ahead
    assert sizes == [1] * 5
    sizes.clear()
    pipe(inputs, batch_size=1), pipeline(task, model=model, device="cpu", batch_size=3, **parts)(inputs)
    assert sizes == [1] * 5 + [3, 2]


def test_images_of_one_size_run_in_batches() -> None:
    task, _, images = OBJECTS["image"]
    model = small_model("image")
    processor = SkipRNNImageProcessor(size={"height": 4, "width": 4})
    pipe = pipeline(task, model=model, device="cpu", image_processor=processor)
    sizes: list[int] = []
    model.register_forward_hook(lambda model, given, out: sizes.append(len(out.logits)))
    pipe([Image.fromarray(pixels) for pixels in images])
    assert sizes == [5]


def test_images_of_several_sizes() -> None:
    task, parts, _ = OBJECTS["image"]
    pipe = pipeline(task, model=small_model("image"), device="cpu", return_updates=True, **parts)
    images = [RNG.integers(0, 256, (4, width), np.uint8) for width in (3, 5)]
    assert [row[0]["steps"] for row in pipe(images)] == [12, 20]


@pytest.mark.parametrize("kind", ["text", "audio", "series"])
def test_padding_is_masked_where_the_processor_gives_no_mask(kind: str) -> None:
    task, parts, inputs = OBJECTS[kind]
    if kind == "text":
        tokenizer = small_tokenizer()
        tokenizer.model_input_names = ["input_ids"]
        tokenizer.pad_token = None
        parts = {"tokenizer": tokenizer}
    else:
        parts = {"feature_extractor": SkipRNNFeatureExtractor(sampling_rate=8000, return_attention_mask=False)}
    pipe = pipeline(task, model=small_model(kind), device="cpu", return_updates=True, **parts)
    together, alone = pipe(inputs, batch_size=5, top_k=1), [pipe(one, top_k=1) for one in inputs]
    assert [(row[0]["updates"], row[0]["steps"]) for row in together] == [
        (row[0]["updates"], row[0]["steps"]) for row in alone
    ]


def test_what_a_subclass_prepares_is_prepared_in_a_batch_too() -> None:
    class Short(SkipRNNTextClassificationPipeline):
        def preprocess(self, text: str, **params: Any) -> Any:
            return super().preprocess(text.split(maxsplit=1)[0], **params)

    pipe = Short(model=small_model("text"), tokenizer=small_tokenizer(), return_updates=True)
    assert [row["steps"] for row in pipe(["a good film", "bad film", "bad"])] == [1, 1, 1]


def test_rows_of_one_step_are_rows() -> None:
    pipe = pipeline("sequence-classification", model=small_model("series", input_size=2), device="cpu")
    points = KeyDataset([{"point": [1.0, 2.0]}, {"point": [3.0, 4.0]}, {"point": [5.0, 6.0]}], "point")
    assert len(list(pipe(points))) == 3


def test_a_dataset_has_as_many_results_as_rows() -> None:
    pipe = pipeline("text-classification", model=small_model("text"), tokenizer=small_tokenizer(), device="cpu")
    results = pipe(KeyDataset([{"text": "a film"}] * 130, "text"))
    assert len(results) == len(list(results)) == 130


def test_texts_of_several_forms_in_a_batch() -> None:
    pipe = pipeline("text-classification", model=small_model("text"), tokenizer=small_tokenizer(), device="cpu")
    texts = ["a good film", {"text": "bad ."}]
    together, alone = pipe(texts, return_updates=True), [pipe(text, return_updates=True, top_k=1) for text in texts]
    for row, (single,) in zip(together, alone, strict=True):
        assert (row["label"], row["updates"], row["steps"]) == (single["label"], single["updates"], single["steps"])
    cut = pipe(["a good film", "bad"], truncation=True, max_length=2, return_updates=True)
    assert [row["steps"] for row in cut] == [2, 1]


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_pipeline_takes_an_operating_point(kind: str) -> None:
    task, parts, inputs = OBJECTS[kind]
    model = small_model(kind)
    with torch.no_grad():
        model.base_model.update_gate.weight.zero_()  # then steps are read at regular intervals
        model.base_model.update_gate.bias.fill_(-1.0)
    model.config.gate_calibration = [[0.2, -2.0], [1.0, 4.0]]
    pipe = pipeline(task, model=model, device="cpu", return_updates=True, **parts)
    read = [[pipe(one, **point)[0]["updates"] for one in inputs] for point in ({}, {"gate_shift": 4.0})]
    assert sum(read[0]) < sum(read[1])
    assert [pipe(one, update_rate=1.0)[0]["updates"] for one in inputs] == read[1]
    assert [row[0]["updates"] for row in pipe(inputs, batch_size=5, gate_shift=4.0, top_k=1)] == read[1]


def test_features_in_batches() -> None:
    pipe = pipeline("feature-extraction", model=small_model("text").base_model, tokenizer=small_tokenizer())
    texts = ["a film", "bad", "a good film ."]
    for found, text in zip(pipe(texts, batch_size=3), texts, strict=True):
        np.testing.assert_allclose(
            np.array(found)[0, : len(text.split())], np.array(pipe(text))[0], rtol=1e-4, atol=1e-6
        )


def test_other_models_get_transformers_own_pipelines() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=7, **sizes))
    pipe = pipeline("text-classification", model=model, tokenizer=small_tokenizer(), device="cpu")
    assert type(pipe) is TextClassificationPipeline
    assert len(pipe(["a film", "bad"], batch_size=2)) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_empty_text_is_a_row_without_steps(side: str) -> None:
    tokenizer = small_tokenizer()
    tokenizer.padding_side = side
    model = small_model("text")
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, return_updates=True, device="cpu")
    with torch.no_grad():
        start = model.classifier(model.base_model.initial_state(1).h[-1]).softmax(-1).max().item()
    for results in (pipe(""), pipe(["", ""], batch_size=2), pipe(["a film", "", "bad"], batch_size=3)[1:2]):
        for result in results:
            assert math.isclose(result["score"], start, rel_tol=1e-5)
            assert (result["updates"], result["steps"]) == (0, 0)


@pytest.mark.parametrize("width", [1, 2])
def test_the_lists_of_a_json_body_are_one_series(width: int) -> None:
    pipe = pipeline("sequence-classification", model=small_model("series", input_size=width), device="cpu")
    series = RNG.normal(size=(9, width)).round(3)
    want = pipe(series)
    bodies = [series.tolist(), json.loads(json.dumps(series.tolist()))] + [series[:, 0].tolist()] * (width == 1)
    for body in bodies:
        assert pipe(body, return_updates=True)[0]["steps"] == 9
        assert pipe(body) == want
    assert pipe([series.tolist(), series.tolist()]) == [want, want]
    assert pipe([series[:1].tolist()]) == [pipe(series[:1])]


def test_the_lists_of_a_json_body_are_one_sound(tmp_path: Path) -> None:
    pipe = pipeline("audio-classification", model=str(small_checkpoint(tmp_path / "audio", "audio")), **TRUSTED)
    sound = RNG.uniform(-1, 1, size=40).round(3)
    want = pipe(sound)
    assert pipe(sound.tolist()) == pipe(sound[:, None].tolist()) == pipe({"raw": sound, "sampling_rate": 8000}) == want
    assert pipe([sound.tolist(), sound[:20].tolist()]) == [want, pipe(sound[:20])]
    with pytest.raises(ValueError, match="holds int64, whose range as sound is unknown"):
        pipe([100, -100])


def test_integer_sounds_are_those_of_their_floats(tmp_path: Path) -> None:
    pipe = pipeline("audio-classification", model=str(small_checkpoint(tmp_path / "audio", "audio")), **TRUSTED)
    sound = (RNG.uniform(-1, 1, size=40) * 2**15).astype(np.int16)
    assert pipe(sound) == pipe(sound.astype(np.float32) / 2**15)


def test_saved_pipelines_keep_everything(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "image", "image")
    pipe = pipeline("image-classification", model=str(folder), **TRUSTED)
    assert "SkipRNN" in repr(pipe.model.config)  # the config can still be printed and saved
    pipe.save_pretrained(tmp_path / "again")
    for name in ("pipeline_skip_rnn.py", "modeling_skip_rnn.py", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).is_file()
    again = pipeline("image-classification", model=str(tmp_path / "again"), **TRUSTED)
    picture = RNG.integers(0, 256, (28, 28), np.uint8)
    assert again(picture) == pipe(picture)


@pytest.mark.parametrize("task", ["sequence-classification", "text-classification"])
def test_a_model_with_an_answer_for_each_step_has_no_pipeline(task: str) -> None:
    model = small_model("frames", vocab_size=7, pad_token_id=0) if task[0] == "t" else small_model("frames")
    parts = {"tokenizer": small_tokenizer()} if task[0] == "t" else {}
    with pytest.raises(ValueError, match=r"SkipRNNForFrameClassification has one for each step\. Call"):
        pipeline(task, model=model, **parts)
