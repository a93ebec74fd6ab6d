"""Data and options of the user's own that cannot be trained on are refused, with a message that says why."""

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from row_files import fit, table, write

from hf_skiprnn.tasks import OwnData

GOOD = [{"x": [[0.5, 1.0]] * 3, "label": "a"}, {"x": [[1.5, 1.0]] * 2, "label": "b"}] * 20


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"x": [[0.5, 1.0], [1.0]], "label": "a"}, r"train row 40, column 'x' must hold numbers"),
        ({"x": [[0.5, 1.0, 2.0]], "label": "a"}, r"train row 40, column 'x' must be \[T, 2\]; got \(1, 3\)"),
        ({"x": [], "label": "a"}, r"train row 40, column 'x'.* got \(0,\)"),
        ({"x": None, "label": "a"}, r"train row 40, column 'x' is empty \(None\)"),
        ({"x": [[0.5, None]], "label": "a"}, r"train row 40, column 'x' holds nan at step 0, channel 1"),
        ({"x": [[0.5, 1.0]], "label": None}, r"train row 40, column 'label' is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, message):
    folder = tmp_path / "d"
    write(folder, [*GOOD, bad])
    write(folder, GOOD, "validation")
    write(folder, GOOD, "test")
    with pytest.raises(ValueError, match=message):
        fit(OwnData(dataset_name=str(folder)))


@pytest.mark.parametrize("labels", [("a", "b"), (0, 1), (0.5, 1.5)], ids=["names", "numbers", "values"])
def test_a_missing_label_is_named_also_where_rows_are_held_out(tmp_path, labels):
    rows = [{"x": [0.5, 1.0], "label": label} for label in labels] * 20
    folder = write(tmp_path / "d", [*rows[:7], {"x": [0.5, 1.0], "label": None}, *rows])
    with pytest.raises(ValueError, match=r"train row 7, column 'label' is empty \(None\)"):
        fit(OwnData(dataset_name=folder))


def test_a_class_that_training_never_saw_is_named(tmp_path):
    folder = tmp_path / "d"
    write(folder, GOOD)
    write(folder, [{"x": [[0.5, 1.0]], "label": "z"}], "test")
    task = OwnData(dataset_name=str(folder))
    splits, *_ = fit(task)
    with pytest.raises(ValueError, match=r"test row 0, column 'label' holds 'z', .* 2 training classes: 'a', 'b'"):
        task.collate([splits.test[0]])


def test_pictures_of_two_sizes_are_named(tmp_path):
    pictures = [PILImage.new("L", (6, 4))] * 9 + [PILImage.new("L", (5, 4))]
    data = Dataset.from_dict(
        {"image": pictures, "label": [0, 1] * 5}, Features({"image": Image(), "label": Value("int64")})
    )
    DatasetDict(dict.fromkeys(("train", "validation", "test"), data)).save_to_disk(str(tmp_path))
    task = OwnData(dataset_name=str(tmp_path))
    splits, *_ = fit(task)
    with pytest.raises(
        ValueError, match=r"validation row 9, column 'image': .* takes images of 4 x 6 pixels; got 4 x 5"
    ):
        task.collate([splits.validation[9]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "z"}, "label_column='z': no such column. There are: a, b, kind, value"),
        ({}, "has columns a, b, kind, value: which one is the label"),
        ({"label_column": "kind"}, r"2 columns that could be the input \(a, b\).*--input_column"),
        (
            {"label_column": "kind", "input_column": "value"},
            "Column 'value' cannot be the input: .* Fitting columns: a, b",
        ),
        ({"label_column": "a", "input_column": "b"}, "Column 'a' holds 30 different values in 30 rows"),
    ],
)
def test_columns_are_asked_for(tmp_path, options, message):
    rows = [{"a": f"text {i}", "b": [1.0, i], "kind": i % 2, "value": float(i)} for i in range(30)]
    task = OwnData(dataset_name=write(tmp_path / "d", rows, "train"), held_out_share=0.1, **options)
    with pytest.raises(ValueError, match=message):
        fit(task)


@pytest.mark.parametrize(
    ("rows", "split", "message"),
    [
        (
            [{"x": [1.0, 2.0], "label": "a"}] * 30,
            "train",
            r"All 30 training labels in column 'label' are 'a': .* one class",
        ),
        (
            [{"x": [1.0, 2.0], "label": None}] * 5,
            "train",
            r"train row 0, column 'label' is empty|cannot be the label",
        ),
        ([], "test", "(?i)(Split 'test'|A split) of .* has no rows"),
    ],
)
def test_nothing_to_learn_or_to_test(tmp_path, rows, split, message):
    folder = tmp_path / "d"
    write(folder, GOOD)
    if rows:
        write(folder, rows, split)
    else:
        folder = tmp_path / "e"
        table(folder, "x,label\n" + "good film,a\nbad film,b\n" * 20)
        table(folder, "x,label\n", "test.csv")
    for streaming in (False,) if rows else (False, True):
        with pytest.raises(ValueError, match=message):
            fit(OwnData(dataset_name=str(folder), streaming=streaming))


def test_a_dictionary_is_no_label(tmp_path):
    rows = [{"x": [1.0], "label": {"a": 1}}] * 3
    with pytest.raises(ValueError, match="Column 'label' cannot be the label"):
        OwnData(dataset_name=write(tmp_path / "d", rows)).load(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "Name the data"), ({"held_out_share": 0.5}, "below 0.5; got 0.5"), ({"max_length": 0}, "at least 1; got 0")],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        OwnData(**({"dataset_name": "d"} if options else {}), **options)
