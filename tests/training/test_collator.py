"""SkipRNNDataCollator: shapes, dtypes and masks of batches; labels of every kind; errors that name row and column."""

import pickle
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from sound_files import tone, wav
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_skiprnn import (
    SkipRNNConfig,
    SkipRNNDataCollator,
    SkipRNNFeatureExtractor,
    SkipRNNForFrameClassification,
    SkipRNNForSequenceClassification,
    SkipRNNImageProcessor,
)
from hf_skiprnn.tasks.readers.words import train_tokenizer
from hf_skiprnn.training import SkipRNNTrainer

NAMES = {"label2id": {"run": 0, "walk": 1, "sit": 2}}


def model(frames=False, **fields):
    kind = SkipRNNForFrameClassification if frames else SkipRNNForSequenceClassification
    return kind(SkipRNNConfig(hidden_size=4, **fields))


def series(rows=6, channels=2):
    """Rows of 3 to 5 steps with string labels, and a column that is not used."""
    draw = np.random.default_rng(0)
    labels = list(NAMES["label2id"])
    return [
        {"wave": draw.normal(5, 2, size=(3 + i % 3, channels)).tolist(), "label": labels[i % 3], "place": f"room {i}"}
        for i in range(rows)
    ]


def test_ragged_series_are_standardised_padded_and_masked():
    rows = series()
    extractor = SkipRNNFeatureExtractor(2).fit(row["wave"] for row in rows)
    batch = SkipRNNDataCollator(model(input_size=2, **NAMES), extractor)(rows)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "input_values": ((6, 5, 2), torch.float32),
        "attention_mask": ((6, 5), torch.int64),
        "labels": ((6,), torch.int64),
    }
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 4, 5, 3, 4, 5]
    assert (batch["input_values"][batch["attention_mask"] == 0] == 0).all()
    assert batch["input_values"][batch["attention_mask"] == 1].mean(dim=0).abs().max() < 1e-6
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("form", ["lists", "numpy", "torch"])
def test_rows_of_every_format_give_the_same_batch(form):
    data = Dataset.from_list(series())
    collate = SkipRNNDataCollator(model(input_size=2, **NAMES))
    rows = [data.with_format(None if form == "lists" else form)[i] for i in range(6)]
    batch = collate(rows)
    expected = collate(series())
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_one_channel_is_a_list_of_numbers():
    rows = [{"x": [1, 2, 3], "labels": 1}, {"x": [4], "labels": 0}]
    batch = SkipRNNDataCollator(model(), max_length=2)(rows)
    assert batch["input_values"].tolist() == [[[1.0], [2.0]], [[4.0], [0.0]]]
    assert batch["labels"].tolist() == [1, 0]


def test_what_map_stored_is_only_padded():
    data = Dataset.from_list(series())
    extractor = SkipRNNFeatureExtractor(2).fit(data["wave"])
    collate = SkipRNNDataCollator(model(input_size=2, **NAMES), extractor)
    for padding in (False, True):  # with True, rows of one call of map come with masks
        stored = data.map(lambda part, padding=padding: dict(extractor(part["wave"], padding=padding)), batched=True)
        batch, expected = collate([stored[i] for i in range(6)]), collate([data[i] for i in range(6)])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    some = [{"input_values": [[1.0, 1.0]], "attention_mask": [1]}, {"input_values": [[1.0, 1.0]]}]
    for rows in (some, some[::-1]):  # not only the first row decides
        with pytest.raises(ValueError, match="of the batch has no column 'attention_mask'"):
            collate(rows)
    with pytest.raises(ValueError, match="Row 1 of the batch has 2 steps in 'input_values', but 1 in 'attention_mask'"):
        collate([{"input_values": [[1.0, 1.0]] * 2, "attention_mask": [1] * n} for n in (2, 1)])


TEXTS = [{"text": text, "mood": mood} for text, mood in [("a good film", "good"), ("bad", "bad"), ("", "bad")]]
TOKENIZER = train_tokenizer((row["text"] for row in TEXTS), 10, 2)
MOODS = {"label2id": {"bad": 0, "good": 1}, "vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.pad_token_id}


def test_texts_are_tokenized_and_cropped():
    collate = SkipRNNDataCollator(model(**MOODS), TOKENIZER, label_column="mood")
    batch = collate(TEXTS)
    words = TOKENIZER.get_vocab()
    assert batch["input_ids"].tolist() == [[words["a"], words["good"]], [words["bad"], 0], [0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0], [0, 0]]
    assert batch["labels"].tolist() == [1, 0, 0]
    stored = Dataset.from_list(TEXTS).map(lambda part: dict(TOKENIZER(part["text"], truncation=True)), batched=True)
    again = collate(list(stored))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert collate(TEXTS[2:])["input_ids"].shape == (1, 0)
    assert model(**MOODS)(**collate(TEXTS[2:])).loss.isfinite()


def test_token_ids_are_padded_with_the_models_id():
    rows = [{"codes": [3, 4], "label": 0}, {"codes": [5], "label": 1}]
    assert SkipRNNDataCollator(model(vocab_size=9, pad_token_id=8))(rows)["input_ids"].tolist() == [[3, 4], [5, 8]]


@pytest.mark.parametrize("stored", [False, True])
def test_images(stored):
    rows = [{"image": Image.new("L", (3, 2), value), "label": 1} for value in (0, 255)]
    processor = SkipRNNImageProcessor(1)
    if stored:
        rows = [{"pixel_values": processor(row["image"])["pixel_values"][0].tolist(), "label": 1} for row in rows]
    batch = SkipRNNDataCollator(model(), processor)(rows)
    assert batch["pixel_values"].shape == (2, 1, 2, 3)
    assert batch["pixel_values"].flatten(1).mean(dim=1).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="max_length=5 would cut images of 6 pixels"):
        SkipRNNDataCollator(model(), processor, max_length=5)(rows)
    rows[1] = {"image": Image.new("L", (3, 3)), "pixel_values": [[[0.0] * 3] * 3], "label": 1}
    with pytest.raises(ValueError, match=r"Row 1 of the batch, .* gives \(1, 3, 3\) .* the first one \(1, 2, 3\)"):
        SkipRNNDataCollator(model(), processor, "pixel_values" if stored else "image")(rows)


class Decoded(dict):
    """Stands in for the decoder that `datasets` returns where torchcodec is installed."""

    def get_all_samples(self): ...


def test_sounds_from_files_and_decoded_ones():
    collate = SkipRNNDataCollator(model(), SkipRNNFeatureExtractor(1, sampling_rate=8000))
    sound = tone(440)
    cells = [wav(sound), {"array": sound, "sampling_rate": 8000}, Decoded(array=sound, sampling_rate=8000)]
    batch = collate([{"audio": cell, "label": 1} for cell in cells])
    for row in batch["input_values"]:
        assert np.array_equal(row[:, 0].numpy(), sound)
    cells[1] |= {"sampling_rate": 16000}
    with pytest.raises(ValueError, match=r"Row 1 .* 16000 samples per second; .* reads 8000.*cast_column"):
        collate([{"audio": cell, "label": 1} for cell in cells])
    with pytest.raises(ValueError, match=r"Row 0 .* give the feature extractor a sampling_rate"):
        SkipRNNDataCollator(model())([{"audio": cells[0], "label": 1}])


LABELS = [  # fields of the config, labels of two rows, what they become
    (NAMES, ["sit", "run"], torch.tensor([2, 0])),
    ({"num_labels": 3}, [2, 0], torch.tensor([2, 0])),
    ({"num_labels": 3}, [np.int32(2), torch.tensor(0)], torch.tensor([2, 0])),
    ({"num_labels": 2}, [True, False], torch.tensor([1, 0])),
    ({"num_labels": 3}, [2, -100], torch.tensor([2, -100])),
    (NAMES, [["sit", "run"], []], torch.tensor([[1.0, 0, 1], [0, 0, 0]])),
    ({"num_labels": 3}, [[2, 0], [1]], torch.tensor([[1.0, 0, 1], [0, 1, 0]])),
    ({"num_labels": 3}, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], torch.tensor([[1.0, 0, 1], [0, 0, 0]])),
    ({"num_labels": 1}, [2, 0.5], torch.tensor([2.0, 0.5])),
    ({"num_labels": 2, "problem_type": "regression"}, [[1, 2], [0.5, 0]], torch.tensor([[1.0, 2.0], [0.5, 0.0]])),
]


@pytest.mark.parametrize(("fields", "labels", "expected"), LABELS)
def test_labels_of_every_kind_train(fields, labels, expected):
    classifier = model(**fields)
    batch = SkipRNNDataCollator(classifier)([{"x": [1.0, 2.0], "label": label} for label in labels])
    assert batch["labels"].dtype == expected.dtype
    assert torch.equal(batch["labels"], expected)
    classifier(**batch).loss.backward()


def test_labels_at_every_step():
    rows = [{"x": [0.0] * 3, "label": ["run", "run", "sit"]}, {"x": [0.0], "label": ["walk"]}]
    frames = model(True, **NAMES)
    batch = SkipRNNDataCollator(frames)(rows)
    assert batch["labels"].tolist() == [[0, 0, 2], [1, -100, -100]]
    frames(**batch).loss.backward()
    assert SkipRNNDataCollator(frames, max_length=2)(rows)["labels"].tolist() == [[0, 0], [1, -100]]
    several = [{"x": [0.0] * 2, "label": [["run", "sit"], []]}, {"x": [0.0], "label": [["walk"]]}]
    batch = SkipRNNDataCollator(frames)(several)
    assert batch["labels"].tolist() == [[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [-100, -100, -100]]]
    frames(**batch).loss.backward()
    with pytest.raises(ValueError, match=r"Row 1 .* one for each of 1 steps; got 2"):
        SkipRNNDataCollator(frames)([rows[0], {"x": [0.0], "label": ["run", "sit"]}])


ERRORS = [  # fields of the config, labels of two rows, message
    ({}, ["run", "walk"], r"Row 0 .* 'run', but the model's config has no names of classes.*label2id="),
    (NAMES, ["run", "wlak"], r"Row 1 .*, column 'label', holds 'wlak', none of .* 3 classes.* Did you mean 'walk'\?"),
    (NAMES, ["run", None], r"Row 1 .* is empty \(None\)"),
    (NAMES, ["run", ["sit"]], r"Row 1 .* gives \(3,\) of torch.float32, but the first one \(\)"),
    (NAMES, [0, 3], r"Row 1 .* class 3; the model has num_labels = 3: 0 to 2"),
    (NAMES, [0, 1.0], r"Row 1 .* must hold a class, as integer or name; got 1\.0.*problem_type=\"regression\""),
    ({"label2id": {"2": 0, "1": 1}}, [1, 0], None),
    ({"label2id": {"1": 0, "2": 1}}, [1, 2], r"Row 0 .* holds 1, the number of one class and the name of class 0"),
    ({"num_labels": 3}, [[2], [0, 1, 1]], r"Row 1 .* \[0, 1, 1\]: numbers of classes, or a 0 or 1 for each class\?"),
    ({"num_labels": 3}, [[1.0, 0.5, 0.0], [2]], r"Row 0 .* must be 3 of 0 and 1"),
    (NAMES | {"problem_type": "single_label_classification"}, [["run"], []], r"Row 0 .* a row has one class"),
    (NAMES | {"problem_type": "multi_label_classification"}, ["run", []], r"Row 0 .* must hold a list"),
    ({"num_labels": 1}, [0.5, "0.5"], r"Row 1 .* must hold one finite number.* got '0\.5'"),
    ({"num_labels": 1}, [0.5, float("nan")], r"Row 1 .* must hold one finite number.* got nan"),
]


@pytest.mark.parametrize(("fields", "labels", "message"), ERRORS)
def test_labels_that_are_refused(fields, labels, message):
    collate = SkipRNNDataCollator(model(**fields))
    rows = [{"x": [1.0], "label": label} for label in labels]
    if message is None:  # the number of a class that is not another's name
        assert collate(rows)["labels"].tolist() == labels
        return
    with pytest.raises(ValueError, match=message):
        collate(rows)


CELLS = [
    ([[1.0, 2.0]], [1.0, 2.0, 3.0], r"Row 1 of the batch, column 'x', must be \[T, 2\]; got \(3,\)"),
    ([[1.0, 2.0]], [[1.0, 2.0, 3.0]], r"Row 1 .* must be \[T, 2\]; got \(1, 3\)"),
    ([[1.0, 2.0]], [[1.0, 2.0], [3.0]], r"Row 1 .* must hold numbers, as many at every step"),
    ([[1.0, 2.0]], [], r"Row 1 .* got \(0,\)"),
    ([[1.0, 2.0]], None, r"Row 1 .* is empty \(None\)"),
    ([[1.0, 2.0]], [[1.0, float("inf")]], r"Row 1 .* holds inf at step 0, channel 1"),
]


@pytest.mark.parametrize(("first", "second", "message"), CELLS)
def test_series_of_mixed_shapes_are_named(first, second, message):
    collate = SkipRNNDataCollator(model(input_size=2))
    with pytest.raises(ValueError, match=message):
        collate([{"x": first, "label": 0}, {"x": second, "label": 1}])


def test_columns_are_asked_for_by_name():
    collate = SkipRNNDataCollator(model(input_size=2, **NAMES))
    row = series()[0]
    with pytest.raises(
        ValueError, match=r"columns wave, label, place, other; wave, other can be the input.*input_column="
    ):
        collate([row | {"other": [1.0]}])
    with pytest.raises(ValueError, match=r"wave, label, place; none can be the input. Text needs a tokenizer"):
        collate([row | {"wave": "text"}])
    with pytest.raises(ValueError, match=r"no column 'wav'\. Did you mean 'wave'\? It has: wave, label, place"):
        SkipRNNDataCollator(model(input_size=2), input_column="wav")([row])
    with pytest.raises(ValueError, match=r"no column 'lable'\. Did you mean 'label'\?"):
        SkipRNNDataCollator(model(input_size=2), label_column="lable")([row])
    assert "labels" not in collate([{"wave": row["wave"]}])


@pytest.mark.parametrize("named", [{}, {"input_column": "wave"}])
def test_columns_that_the_trainer_removed_are_told(tmp_path, named):
    classifier = model(input_size=2, **NAMES)
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    collate = SkipRNNDataCollator(classifier, **named)
    trainer = Trainer(classifier, args, data_collator=collate, train_dataset=Dataset.from_list(series()))
    with pytest.raises(ValueError, match="set remove_unused_columns=False in TrainingArguments"):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "processor", "message"),
    [
        ({}, TOKENIZER, r"has 6 tokens, but the model has vocab_size=None"),
        ({"input_size": 3}, SkipRNNFeatureExtractor(2), r"gives 2 numbers a step, .* input_size=3"),
        ({"input_size": 1}, SkipRNNImageProcessor(3), r"gives 3 numbers a step, .* input_size=1"),
    ],
)
def test_a_processor_that_does_not_fit_the_model_is_refused(fields, processor, message):
    with pytest.raises(ValueError, match=message):
        SkipRNNDataCollator(model(**fields), processor)
    with pytest.raises(TypeError, match=r"processor must be a tokenizer.* got function"):
        SkipRNNDataCollator(model(), model)
    with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
        SkipRNNDataCollator(model(), max_length=0)


@pytest.mark.parametrize("kind", [Trainer, SkipRNNTrainer])
def test_trainers_learn_from_raw_columns(tmp_path, kind):
    """Rows of class "up" rise and the others fall, which a few steps of training tell apart."""
    kinds = Features({"x": List(Value("float32")), "label": ClassLabel(names=["down", "up"])})
    rows = {"x": [[(-1.0) ** i * -t for t in range(3 + i % 4)] for i in range(32)], "label": [i % 2 for i in range(32)]}
    data = Dataset.from_dict(rows, features=kinds)
    classifier = model(label2id={"down": 0, "up": 1})
    args = TrainingArguments(
        str(tmp_path),
        max_steps=30,
        learning_rate=0.05,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = kind(classifier, args, data_collator=SkipRNNDataCollator(classifier), train_dataset=data)
    trainer.train()
    found = trainer.predict(data)
    assert (found.predictions.argmax(axis=1) == found.label_ids).mean() > 0.9


def test_a_loader_takes_it_and_workers_get_copies_without_the_model():
    collate = SkipRNNDataCollator(model(input_size=2, **NAMES))
    copy = pickle.dumps(collate)
    assert not re.search(rb"weight_ih|classifier\.weight", copy)
    batches = list(DataLoader(series(), batch_size=4, collate_fn=pickle.loads(copy)))
    assert [len(batch["labels"]) for batch in batches] == [4, 2]
