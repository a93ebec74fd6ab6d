"""The task own_data: which columns are taken for what, held-out rows, standardisation."""

import json
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from row_files import QUICK, fit, series, table, write
from sound_files import as_parquet, tone, wav
from transformers import EvalPrediction

from hf_skiprnn.commands import evaluate, train
from hf_skiprnn.tasks import OwnData
from hf_skiprnn.tasks.own_data.inputs import Input


def test_series_of_several_channels_and_lengths(tmp_path):
    task = OwnData(dataset_name=write(tmp_path / "d", series(100)))
    splits, defaults, batch = fit(task)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (81, 10, 9)
    assert defaults["input_size"] == 2
    assert defaults["id2label"] == {0: "run", 1: "walk"}
    assert batch["input_values"].shape[2] == 2
    whole = task.collate([splits.train[i] for i in range(81)])
    steps = whole["input_values"][whole["attention_mask"] != 0]
    assert steps.mean(dim=0).abs().max() < 1e-4
    assert steps.std(dim=0, correction=0).numpy() == pytest.approx(np.ones(2), abs=1e-4)
    names = splits.train["label"]
    assert [defaults["id2label"][i] for i in whole["labels"].tolist()] == names[:]


@pytest.mark.parametrize(("chosen", "scaled"), [(None, True), (False, False)])
def test_rows_of_amplitudes_far_apart_are_seen_alike(tmp_path, chosen, scaled):
    rows = [{"wave": [10.0 ** (i % 6) * ((i + t) % 4) for t in range(12)], "label": "ab"[i % 2]} for i in range(60)]
    task = OwnData(dataset_name=write(tmp_path / "d", rows), normalize_sequences=chosen)
    _, _, batch = fit(task)
    assert task.processor().normalize_sequences is scaled
    deviations = batch["input_values"].std(dim=1, correction=0)
    assert (deviations.min() > 0.99) == scaled
    task.processor().save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=f"trained with normalize_sequences={scaled}; got {not scaled}"):
        OwnData(dataset_name=task.dataset_name, normalize_sequences=not scaled).use_processor(str(tmp_path / "run"))


def test_one_channel_and_integer_labels(tmp_path):
    rows = [{"x": list(range(1 + i % 4)), "y": 10 * (i % 3)} for i in range(60)]
    _, defaults, batch = fit(OwnData(dataset_name=write(tmp_path / "d", rows)))
    assert defaults["id2label"] == {0: "0", 1: "10", 2: "20"}
    assert defaults["input_size"] == 1
    assert batch["labels"].dtype == torch.int64


def test_what_columns_were_taken_for_is_said_in_one_line(tmp_path, caplog):
    rows = [row | {"id": i} for i, row in enumerate(series(40))]
    fit(OwnData(dataset_name=write(tmp_path / "d", rows)))
    (line,) = [record.message for record in caplog.records if "input wave" in record.message]
    assert re.search(
        r"input wave = series of numbers \[3\]\[2\], such as \[\[.*\.\.\.; label label = a class, of 2,", line
    )
    assert line.endswith("such as 'walk'; not used: id.")


LISTS = [{"x": [[float(i), 1.0, 2.0]] * 2, "label": "ab"[i % 2]} for i in range(40)]  # 2 x 3
RAGGED = [{"x": [[1.0] * (3 + i % 4)] * 2, "label": "ab"[i % 2]} for i in range(40)]  # 2 channels of 3 to 6 steps
TOKENS = [{"x": [i, 7, 300][: 1 + i % 3], "label": "ab"[i % 2]} for i in range(40)]
TEXTS = [{"x": f"[{i}.5, 2, 3]", "label": "ab"[i % 2]} for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "message", "shapes"),
    [
        (LISTS, r"2 lists of 3 numbers in every row: series .*, or channels_first", {"series": 3, "channels_first": 2}),
        (RAGGED, r"2 lists of 3 to 6 numbers in every row", {"channels_first": 2}),
        (TOKENS, r"integers from 0 to 300: tokens .*, or series", {"series": 1, "tokens": 300}),
        (TEXTS, r"text that looks like lists of numbers \('\[0\.5, 2, 3\]'\)", {"series": 1, "words": 300}),
    ],
)
def test_a_doubtful_input_is_asked_for(tmp_path, rows, message, shapes):
    folder = write(tmp_path / "d", rows)
    with pytest.raises(ValueError, match=rf"Column 'x' holds {message}.*Say which with --input_kind"):
        fit(OwnData(dataset_name=folder))
    for kind, size in shapes.items():
        _, defaults, batch = fit(OwnData(dataset_name=folder, input_kind=kind))
        assert defaults["input_size"] == size
        assert ("input_ids" in batch) == (kind in ("tokens", "words"))
        if kind == "tokens":
            assert defaults["vocab_size"] == 301
            assert batch["attention_mask"].sum(dim=1).max() == 3
    if rows is RAGGED:
        assert len(set(batch["attention_mask"].sum(dim=1).tolist()) & {3, 4, 5, 6}) > 1
    if rows is not TOKENS:
        with pytest.raises(ValueError, match="cannot be the input as tokens"):
            fit(OwnData(dataset_name=folder, input_kind="tokens", input_column="x"))


def test_numbers_written_as_text_and_broken_ones(tmp_path):
    folder = write(tmp_path / "d", TEXTS + [{"x": "[[1, 2]", "label": "a"}] * 5)
    with pytest.raises(ValueError, match=r"train row 4\d, column 'x' must hold a list of numbers"):
        fit(OwnData(dataset_name=folder, input_kind="series"))
    words = [{"x": text, "label": "ab"[i % 2]} for i, text in enumerate(["in 1999", "3", "a, b"] * 10)]
    assert "input_ids" in fit(OwnData(dataset_name=write(tmp_path / "w", words)))[2]


def test_per_step_labels_train_the_frame_model(tmp_path):
    rows = [row | {"label": ["up" if x[0] > 0 else "down" for x in row["wave"]]} for row in series(60)]
    folder, run = write(tmp_path / "d", rows), tmp_path / "run"
    task = OwnData(dataset_name=folder, max_length=4)
    splits, defaults, batch = fit(task)
    assert task.per_frame
    assert defaults["label2id"] == {"down": 0, "up": 1}
    mask = batch["attention_mask"] != 0
    assert (batch["labels"][~mask] == -100).all()
    first = splits.train[0]["label"][:4]
    assert [("down", "up")[i] for i in batch["labels"][0][mask[0]].tolist()] == first
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 2).numpy()
    assert task.compute_metrics(EvalPrediction(logits, batch["labels"].numpy()))["accuracy"] == 1.0
    train.main(["--dataset_name", folder, "--output_dir", str(run), *QUICK])
    assert evaluate.main([str(run), "--figure_rows", "2"])["metrics"]["balanced_accuracy"] > 0
    assert json.loads((run / "config.json").read_text())["architectures"] == ["SkipRNNForFrameClassification"]
    write(tmp_path / "d", [{"wave": [[1.0, 1.0]] * 3, "label": ["up"] * 2}], "test")
    task = OwnData(dataset_name=folder)
    with pytest.raises(
        ValueError, match="test row 0, column 'label' must hold a label for each of 3 steps; it holds 2"
    ):
        task.collate([task.load(0).test[0]])


def test_several_columns_are_the_steps_of_a_row_or_its_channels(tmp_path):
    lines = ["t0,t1,t2,kind", *(f"{i},{i + 1},5,{'ab'[i % 2]}" for i in range(40))]
    folder = table(tmp_path / "wide", "\n".join(lines))
    with pytest.raises(ValueError, match=r"Columns of numbers \(\['t0', 't1', 't2'\]\) can be chosen together"):
        fit(OwnData(dataset_name=folder, label_column="kind"))
    task = OwnData(dataset_name=folder, label_column="kind", input_column=["t0", "t1", "t2"])
    splits, defaults, batch = fit(task)
    assert splits.train[0]["t0+t1+t2"] == [splits.train[0]["row_number"], splits.train[0]["row_number"] + 1, 5]
    assert (defaults["input_size"], batch["input_values"].shape[1:]) == (1, (3, 1))
    rows = [{"a": [1.0] * n, "b": [float(i)] * n, "y": i % 2} for i, n in enumerate([2, 3] * 20)]
    stream = OwnData(dataset_name=write(tmp_path / "lists", rows), input_column=["a", "b"], streaming=True)
    assert next(iter(stream.load(0).train.take(1)))["a+b"][0][0] == 1.0
    assert stream.model_defaults()["input_size"] == 2
    with pytest.raises(
        ValueError, match=r"must all hold one number a row, or all lists of numbers; they hold t0: .*kind: "
    ):
        fit(OwnData(dataset_name=folder, label_column="t2", input_column=["t0", "kind"]))


@pytest.mark.parametrize("per_step", [False, True])
def test_rows_that_are_steps_are_collected_by_their_id(tmp_path, per_step):
    lines = ["who,x,y,label"]
    for sequence in range(30):
        steps = range(2 + sequence % 3)
        lines += [f"s{sequence},{sequence},{step},{(step if per_step else sequence) % 2}" for step in steps]
    task = OwnData(table(tmp_path / "d", "\n".join(lines)), input_column=["x", "y"], sequence_id="who")
    splits, defaults, _ = fit(task)
    assert sum(map(len, splits)) == 30
    assert defaults["input_size"] == 2
    assert task.per_frame is per_step
    row = splits.train[1]
    number = int(row["x+y"][0][0])
    steps = 2 + number % 3
    assert row["x+y"] == [[number, step] for step in range(steps)]
    assert row["label"] == ([step % 2 for step in range(steps)] if per_step else number % 2)
    assert lines[1 + row["row_number"]].startswith(f"s{number},{number},0,")


def test_text_with_string_labels_from_csv(tmp_path):
    lines = ["review,target", *(f"good film {i},yes" if i % 2 else f"bad film {i},no" for i in range(40))]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    task = OwnData(dataset_name=str(tmp_path), max_length=2)
    _, defaults, batch = fit(task)
    assert batch["input_ids"].shape == (4, 2)
    assert defaults["vocab_size"] == len(task.processor())
    assert set(defaults["label2id"]) == {"yes", "no"}


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pictures(tmp_path, mode, channels):
    pictures = [PILImage.fromarray(np.full((4, 6), i, np.uint8)).convert(mode) for i in range(40)]
    names = ClassLabel(names=["a", "b"])
    data = Dataset.from_dict(
        {"picture": pictures, "kind": [0, 1] * 20}, features=Features({"picture": Image(), "kind": names})
    )
    DatasetDict({"train": data}).save_to_disk(str(tmp_path / "d"))
    splits, defaults, batch = fit(OwnData(dataset_name=str(tmp_path / "d")))
    assert batch["pixel_values"].shape == (4, channels, 4, 6)
    assert defaults["input_size"] == channels
    assert defaults["label2id"] == {"a": 0, "b": 1}
    first = np.asarray(splits.train[0]["picture"].convert("L"))[0, 0] / 255
    assert batch["pixel_values"][0] == pytest.approx(torch.full((channels, 4, 6), first))


@pytest.mark.parametrize(("features", "channels"), [("log_mel", 32), ("values", 1)])
def test_sounds_of_several_rates(tmp_path, features, channels):
    sounds = [wav(tone(500, 0.1, rate), rate) for rate in (8000, 16000)] * 20
    as_parquet({"audio": sounds, "label": [0, 1] * 20}, tmp_path / "train.parquet")
    _, defaults, batch = fit(OwnData(dataset_name=str(tmp_path), sound_features=features))
    assert defaults["input_size"] == channels
    assert batch["attention_mask"].sum(dim=1).unique().tolist() == [8 if features == "log_mel" else 800]


def test_several_labels_and_numbers(tmp_path):
    rows = [
        {"x": [0.5], "tags": ["a"] * (i % 2) + ["b"] * (i % 3 > 0), "value": i / 2, "pair": [i, 0.5]} for i in range(40)
    ]
    folder = write(tmp_path / "d", rows)
    task = OwnData(dataset_name=folder, label_column="tags", input_column="x")
    splits, defaults, batch = fit(task)
    assert defaults["problem_type"] == "multi_label_classification"
    assert batch["labels"].tolist() == [
        [float(t in row["tags"]) for t in "ab"] for row in splits.train.select(range(4))
    ]
    found = task.compute_metrics(EvalPrediction(np.array([[1.0, -1], [1, 1]]), np.array([[1.0, 0], [0, 1]])))
    assert found == {"f1": pytest.approx(2 * 2 / (3 + 2))}
    task = OwnData(dataset_name=folder, label_column="value", input_column="x")
    _, defaults, batch = fit(task)
    assert (defaults["num_labels"], defaults["problem_type"]) == (1, "regression")
    assert batch["labels"].shape == (4,)
    found = task.compute_metrics(EvalPrediction(np.array([[1.0], [3]]), np.array([2.0, 4])))
    assert found == {"mse": 1.0, "r2": 0.0}
    _, defaults, batch = fit(OwnData(dataset_name=folder, label_column="pair", input_column="x"))
    assert batch["labels"].shape == (4, 2)


def test_recall_of_every_class_weighs_alike(tmp_path):
    task = OwnData(dataset_name=write(tmp_path / "d", series(90, labels=("a",) * 8 + ("b",))))
    fit(task)
    guesses_a = EvalPrediction(np.tile([1.0, 0.0], (10, 1)), np.array([0] * 8 + [1] * 2))
    assert task.compute_metrics(guesses_a) == {"accuracy": 0.8, "balanced_accuracy": 0.5}


def test_held_out_rows_are_decided_by_the_seed_in_the_proportions_of_the_classes(tmp_path):
    folder = write(tmp_path / "d", series(200, labels=("a",) * 9 + ("b",)))

    def numbers(**options):
        splits = OwnData(dataset_name=folder, **options).load(0)
        return [part["row_number"][:] for part in splits], [part["label"][:].count("b") for part in splits]

    rows, rare = numbers()
    assert sorted(row for part in rows for row in part) == list(range(200))
    assert rare == [16, 2, 2]
    assert numbers()[0] == rows
    assert numbers(split_seed=1)[0] != rows


def test_given_splits_are_used_and_hidden_labels_are_not(tmp_path):
    folder = tmp_path / "d"
    rows = [{"x": [0.0, i], "label": i % 2} for i in range(50)]
    write(folder, rows)
    write(folder, rows[:6], "validation")
    write(folder, [{**row, "label": -1} for row in rows], "test")
    splits, *_ = fit(OwnData(dataset_name=str(folder)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (45, 6, 5)
    assert set(splits.test["split_name"]) == {"train"}


@pytest.mark.parametrize("streaming", [False, True])
def test_minus_1_is_a_class_if_training_rows_have_it(tmp_path, streaming):
    """As in data of the UCR archive. A test split may be sorted by class."""
    folder = tmp_path / "d"
    rows = [{"x": [0.0, i], "label": 2 * (i % 2) - 1} for i in range(50)]
    write(folder, rows)
    write(folder, [{**rows[0], "label": label} for label in (-1, 1) for _ in range(150)], "test")
    splits, *_ = fit(OwnData(dataset_name=str(folder), streaming=streaming, eval_rows=400))
    assert len(splits.test) == 300
    assert set(splits.test["split_name"]) == {"test"}


def test_a_class_of_one_row_does_not_stop_the_run(tmp_path):
    rows = [*series(30), {"wave": [[0.0, 0.0]], "label": "once"}]
    splits, defaults, _ = fit(OwnData(dataset_name=write(tmp_path / "d", rows)))
    assert defaults["num_labels"] == 3
    assert sum(map(len, splits)) == 31


@pytest.mark.parametrize("streaming", [False, True])
def test_the_vocabulary_is_learnt_from_rows_of_every_class(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(Input, "fit_rows", 100)
    rows = [{"text": f"a {['dull', 'good'][row // 200]} film {row}", "label": row // 200} for row in range(400)]
    task = OwnData(dataset_name=write(tmp_path / "d", rows), streaming=streaming)
    assert {"dull", "good"} <= set(task.processor().get_vocab())


GOOD = [{"x": [float(row), 1.0], "y": "ab"[row % 2]} for row in range(20)]
IDS = [{"x": [row, 300], "y": "ab"[row % 2]} for row in range(20)]


@pytest.mark.parametrize(
    ("rows", "bad", "options", "said"),
    [
        (GOOD, {"x": [1.0, 2.0], "y": "c"}, [], "test row 2, column 'y' holds 'c', which is not one of the 2 training"),
        (GOOD, {"x": [1.0, 2.0], "y": None}, [], "test row 2, column 'y' is empty"),
        (GOOD, {"x": None, "y": "a"}, [], "test row 2, column 'x' is empty"),
        (IDS, {"x": [301, 2], "y": "a"}, ["--input_kind", "tokens"], "test row 2, column 'x' holds token id 301; the"),
    ],
)
def test_a_row_that_cannot_be_evaluated_is_refused_before_training(rows, bad, options, said, tmp_path):
    folder = tmp_path / "d"
    write(folder, rows)
    write(folder, [*rows[:2], bad], "test")
    with pytest.raises(SystemExit, match=re.escape(said)):
        train.main(["--dataset_name", str(folder), *options, "--output_dir", str(tmp_path / "run"), *QUICK])
    assert not (tmp_path / "run").exists()


def test_token_ids_of_rows_held_out_are_known(tmp_path):
    rows = [{"x": [row, 2], "y": "ab"[row % 2]} for row in range(100)]
    task = OwnData(dataset_name=write(tmp_path / "d", rows), input_kind="tokens")
    splits = task.load(0)
    assert task.model_defaults()["vocab_size"] == 100
    for part in (splits.validation, splits.test):
        task.check(part)


@pytest.mark.parametrize("rows", [1, 2])
def test_too_few_rows_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="at least 3 are needed"):
        OwnData(dataset_name=write(tmp_path / "d", GOOD[:rows])).load(0)


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Rename the folder"):
        OwnData(dataset_name=write(tmp_path / "a[1]", GOOD)).load(0)


def test_r2_of_one_row_is_left_out(tmp_path):
    rows = [{"x": [float(row)], "y": row / 3} for row in range(20)]
    task = OwnData(dataset_name=write(tmp_path / "d", rows))
    fit(task)
    assert set(task.compute_metrics(EvalPrediction(np.zeros((2, 1)), np.ones(2)))) == {"mse", "r2"}
    assert set(task.compute_metrics(EvalPrediction(np.zeros((1, 1)), np.ones(1)))) == {"mse"}


def test_balanced_loss_is_the_weighted_cross_entropy(tmp_path):
    task = OwnData(dataset_name=write(tmp_path / "d", series(40, labels=("a", "a", "a", "b"))), balance_classes=True)
    fit(task)
    logits, labels = torch.randn(6, 2), torch.tensor([0, 0, 0, 0, 0, 1])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (each * torch.tensor([2 / 3] * 5 + [2.0])).mean()  # 40 / (2 * 30), 40 / (2 * 10)
    assert task.loss()({"logits": logits}, labels) == pytest.approx(expected)
    assert task.loss()({"logits": logits}, labels, 12) == pytest.approx(expected / 2)  # of two micro-batches
    assert OwnData(dataset_name="d").loss() is None


def test_a_configuration_is_chosen(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, series(30, labels=(f"{name}-a", f"{name}-b")))
    head = "configs:\n" + "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\n{head}---\n")
    _, defaults, _ = fit(OwnData(dataset_name=str(tmp_path), dataset_config="two"))
    assert set(defaults["label2id"]) == {"two-a", "two-b"}


def test_rows_are_cut_to_max_length(tmp_path):
    rows = [{"x": [float(step) for step in range(60)], "label": i % 2} for i in range(40)]
    task = OwnData(dataset_name=write(tmp_path / "d", rows), max_length=50)
    assert fit(task)[2]["input_values"].shape == (4, 50, 1)
