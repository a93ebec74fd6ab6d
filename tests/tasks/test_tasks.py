"""Check the tasks' data against the paper and the sources of the data sets."""

from itertools import islice

import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import EvalPrediction

from hf_skiprnn.tasks import TASKS, Adding, Digits, FindDigit, Frequency, base
from hf_skiprnn.tasks.mnist import MNIST

GENERATED = {"adding": Adding(eval_rows=200), "frequency": Frequency(eval_rows=200)}
generated = pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED.keys())


def draw(task, rows=20_000):
    return task.draw(np.random.default_rng(7), rows)


def test_names():
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}


def test_adding_values_markers_and_sums():
    columns = draw(Adding())
    inputs, labels = columns["input_values"], columns["labels"]
    assert inputs.shape == (20_000, 50, 2)
    assert (inputs.dtype, labels.dtype) == (np.float32, np.float32)
    values, markers = inputs[..., 0], inputs[..., 1]
    assert -0.5 <= values.min() < -0.499
    assert 0.499 < values.max() <= 0.5
    assert abs(values.mean()) < 0.002
    assert values.var() == pytest.approx(1 / 12, rel=0.01)
    assert set(np.unique(markers)) == {0.0, 1.0}
    assert (markers[:, :5].sum(axis=1) == 1).all()  # one in the first 10 %
    assert (markers[:, 5:25].sum(axis=1) == 0).all()
    assert (markers[:, 25:].sum(axis=1) == 1).all()  # one in the last half
    assert labels == pytest.approx((values * markers).sum(axis=1))
    assert labels.var() == pytest.approx(1 / 6, rel=0.03)
    places = markers.mean(axis=0)
    assert places[:5] == pytest.approx(1 / 5, abs=0.015)
    assert places[25:] == pytest.approx(1 / 25, abs=0.007)


@pytest.mark.parametrize("length", [10, 11, 33, 200])
def test_adding_of_other_lengths(length):
    markers = draw(Adding(length=length), 500)["input_values"][..., 1]
    assert markers.shape == (500, length)
    assert (markers[:, : length // 10].sum(axis=1) == 1).all()
    assert (markers[:, length // 10 : length - length // 2].sum(axis=1) == 0).all()
    assert (markers[:, length - length // 2 :].sum(axis=1) == 1).all()


def fitted_periods(waves, step, low, high):
    """Return for each wave [T] the period whose sine and cosine fit it best, and the mean square of the residual."""
    times, periods = np.arange(waves.shape[1]) * step, np.geomspace(low, high, 4000)
    phases = 2 * np.pi * times / periods[:, None]
    bases, _ = np.linalg.qr(np.stack([np.sin(phases), np.cos(phases)], axis=2))  # [4000, T, 2]
    explained = (np.einsum("ptk,nt->npk", bases, waves) ** 2).sum(axis=2)
    best = explained.argmax(axis=1)
    return periods[best], ((waves**2).sum(axis=1) - explained.max(axis=1)) / waves.shape[1]


@pytest.mark.parametrize(("sampling_period", "length"), [(1.0, 100), (0.5, 200)])
def test_frequency_waves_have_the_periods_that_their_labels_say(sampling_period, length):
    columns = draw(Frequency(sampling_period=sampling_period), 24)
    waves, labels = columns["input_values"], columns["labels"]
    assert waves.shape == (24, length, 1)
    assert waves.dtype == np.float32
    # A period above twice the sampling period is unique: no other sine has the same samples.
    periods, errors = fitted_periods(waves[:, :, 0], sampling_period, 2.01 * sampling_period, 105)
    fits = errors < 1e-3
    assert fits.sum() >= 20
    assert (((periods >= 5) & (periods <= 6)) == (labels == 0))[fits].all()
    assert fitted_periods(waves[labels == 0, :, 0], sampling_period, 5, 6)[1].max() < 1e-3


def test_frequency_batches_are_stratified_and_periods_uniform():
    task = Frequency()
    columns = draw(task)
    assert columns["labels"][:4].tolist() == [0, 1, 0, 1]
    assert abs(columns["input_values"].max() - 1) < 1e-5
    loader = DataLoader(task.load(0).train, batch_size=64, collate_fn=task.collate)
    for batch in islice(loader, 12):  # more than one block of rows
        assert batch["labels"].sum() == 32
    first = columns["input_values"][:, 0, 0]  # sin(phase): its arcsine law has variance 1/2 and mean 0
    for label in (0, 1):
        start = first[columns["labels"] == label]
        assert abs(start.mean()) < 0.02
        assert start.var() == pytest.approx(0.5, abs=0.01)


def test_frequency_distractors_are_uniform_on_the_union():
    from hf_skiprnn.tasks.frequency import _distractor_periods

    periods = _distractor_periods(np.random.default_rng(0), 200_000)
    assert periods.min() == pytest.approx(1, abs=0.01)
    assert periods.max() == pytest.approx(100, abs=0.01)
    assert not ((periods > 5) & (periods < 6)).any()
    assert (periods < 5).mean() == pytest.approx(4 / 98, abs=0.002)


@generated
def test_rows_are_decided_by_the_seed(task):
    def first(seed, skip=0):
        rows = islice(task.load(seed).train, skip, skip + 300)
        return np.stack([row["input_values"] for row in rows])

    assert np.array_equal(first(0), first(0))
    assert not np.array_equal(first(0), first(1))
    assert not np.array_equal(first(0), first(0, skip=300))
    one, other = task.load(0), task.load(1)
    assert one.validation[:]["labels"].tolist() == other.validation[:]["labels"].tolist()
    assert np.array_equal(one.test[:]["input_values"], other.test[:]["input_values"])
    assert not np.array_equal(one.test[:]["input_values"], one.validation[:]["input_values"])
    assert (len(one.validation), len(one.test)) == (200, 200)


@generated
def test_streams_do_not_overlap(task):
    def keys(rows):
        return {row["input_values"].tobytes() for row in rows}

    data = task.load(0).train
    assert data.num_shards == 64
    nodes = [keys(islice(split_dataset_by_node(data, rank, 4), 600)) for rank in range(4)]
    assert len(set.union(*nodes)) == 4 * 600
    workers = DataLoader(data, batch_size=50, num_workers=2, collate_fn=list)
    read = [row for batch in islice(workers, 6) for row in batch]
    assert len(keys(read)) == 300
    assert keys(read[:50]) <= keys(islice(data, 600))


@generated
def test_reading_resumes_where_the_state_was_taken(task):
    data = task.load(3).train
    reader = iter(data)
    for _ in range(700):
        next(reader)
    state = data.state_dict()
    onwards = [next(reader)["input_values"] for _ in range(20)]
    again = task.load(3).train
    again.load_state_dict(state)
    assert np.array_equal([row["input_values"] for row in islice(again, 20)], onwards)


@generated
def test_training_rows_are_not_held_out_ones(task):
    splits = task.load(0)
    seen = {row["input_values"].tobytes() for row in islice(splits.train, 2000)}
    held_out = {row["input_values"].tobytes() for split in (splits.validation, splits.test) for row in split}
    assert len(held_out) == 400
    assert not seen & held_out


@generated
def test_collate_and_metrics_of_generated_tasks(task):
    rows = [task.load(0).validation[i] for i in range(6)]
    batch = task.collate(rows)
    assert batch["input_values"].dtype == torch.float32
    assert batch["input_values"].shape[0] == 6
    assert batch["input_values"].shape[2] == task.model_defaults()["input_size"]
    assert batch["labels"].tolist() == pytest.approx([row["labels"] for row in rows])
    assert batch["labels"].dtype == (torch.float32 if task.name == "adding" else torch.int64)


def test_metrics_say_whether_a_task_is_solved():
    targets = np.array([0.1, -0.2])
    assert Adding().compute_metrics(EvalPrediction(targets[:, None] + 0.04, targets)) == {
        "mse": pytest.approx(0.0016),
        "solved": 1.0,  # 1/6 / 100 = 0.00167
    }
    assert Adding().compute_metrics(EvalPrediction(targets[:, None] + 0.05, targets))["solved"] == 0.0
    labels = np.arange(200) % 2
    logits = np.eye(2)[labels]
    assert Frequency().compute_metrics(EvalPrediction(logits, labels)) == {"accuracy": 1.0, "solved": 1.0}
    logits[:2] = logits[1::-1]
    assert Frequency().compute_metrics(EvalPrediction(logits, labels)) == {"accuracy": 0.99, "solved": 0.0}


def check_images(splits, sizes, size):
    assert tuple(map(len, splits)) == sizes
    for split in splits:
        assert set(split[0]) == {"image", "label"}
        assert split[0]["image"].size == size
        assert split[0]["image"].mode == "L"
    assert splits.test.features["label"].names == list("0123456789")


def test_digits_are_scikit_learns_and_held_out_by_seed():
    from sklearn.datasets import load_digits

    splits = Digits().load(0)
    check_images(splits, (1077, 360, 360), (8, 8))
    for split in splits:  # stratified
        shares = np.bincount([row["label"] for row in split], minlength=10) / len(split)
        assert shares == pytest.approx(np.bincount(load_digits().target) / 1797, abs=0.004)
    ours = sorted(np.asarray(row["image"]).tobytes() + bytes([row["label"]]) for split in splits for row in split)
    levels = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    source = sorted(x.tobytes() + bytes([y]) for x, y in zip(levels, load_digits().target, strict=True))
    assert ours == source  # every image once
    assert Digits().load(5).test["label"] == splits.test["label"]
    assert Digits(split_seed=1).load(0).test["label"] != splits.test["label"]


def test_digits_batches_are_pixels_over_255():
    task = Digits()
    rows = list(task.load(0).test.take(5))
    batch = task.collate(rows)
    expected = torch.stack([torch.from_numpy(np.array(row["image"]))[None] / 255 for row in rows])
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [row["label"] for row in rows]


def test_training_images_come_at_every_shift_with_black_moving_in():
    plain, task = Digits().load(0), Digits(shift=1)
    splits = task.load(0)
    assert len(splits.train) == 9 * len(plain.train)
    assert (len(splits.validation), len(splits.test)) == (360, 360)
    rows = splits.train.__getitems__(list(range(9, 18)))
    image = np.asarray(plain.train[1]["image"])
    padded = np.pad(image, 1)
    windows = [padded[1 - dy : 9 - dy, 1 - dx : 9 - dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert all(np.array_equal(np.asarray(row["image"]), window) for row, window in zip(rows, windows, strict=True))
    assert {row["label"] for row in rows} == {plain.train[1]["label"]}
    assert np.array_equal(np.asarray(splits.train[13]["image"]), image)
    assert task.collate(rows)["pixel_values"].shape == (9, 1, 8, 8)


@pytest.mark.parametrize(("memory", "reads"), [(1 << 20, [8, 3]), (100, [8, 6])])
def test_prepared_rows_are_read_once_and_give_the_same_batches(monkeypatch, memory, reads):
    """A row is an image of 64 bytes. What does not fit into the memory is read again."""
    monkeypatch.setattr(base, "LARGEST_MEMORY", memory)
    task = Digits(shift=1)
    rows = task.load(0).train
    prepared, found = task.prepared(rows), []
    prepared.prepare = lambda some: found.append(len(some)) or task._pixels(some)
    assert len(prepared) == len(rows)
    for indices in ([5, 0, 7, 1, 2, 3, 4, 6], [7, 5, 1, 100, 101, 102]):
        batch, want = task.collate(prepared.__getitems__(indices)), task.collate(rows.__getitems__(indices))
        assert all(torch.equal(batch[name], want[name]) for name in ("pixel_values", "labels"))
    assert found == reads


def test_digits_are_found_anywhere_on_the_canvas(monkeypatch):
    monkeypatch.setattr("hf_skiprnn.tasks.find_digit.EVALUATED_PLACES", 2)
    task, digits = FindDigit(canvas=12, places=2), Digits().load(0)
    splits = task.load(0)
    check_images(splits, (2 * 1077, 2 * 360, 2 * 360), (12, 12))
    for ours, theirs in zip(splits, digits, strict=True):
        where = np.zeros((5, 5))
        sources = [np.asarray(theirs[i]["image"]) for i in range(100)]
        for i in range(200):
            source, canvas = sources[i // 2], np.asarray(ours[i]["image"])
            found = [(y, x) for y in range(5) for x in range(5) if np.array_equal(canvas[y : y + 8, x : x + 8], source)]
            assert found
            assert int(canvas.sum()) == int(source.sum())  # black elsewhere
            where[found[0]] += 1
        assert (where > 0).all()
        assert [ours[2 * i]["label"] for i in range(len(theirs))] == [row["label"] for row in theirs]
    other = task.load(1)
    same = [np.array_equal(splits.train[i]["image"], other.train[i]["image"]) for i in range(50)]
    assert sum(same) < 25
    assert splits.test["image"][:50] == other.test["image"][:50]
    assert task.collate([splits.test[0]])["pixel_values"].shape == (1, 1, 12, 12)
    assert FindDigit().processor().size["height"] == 16


def test_mnist_holds_5000_training_images_out(shared_data):
    folder = str(shared_data("mnist"))
    task = MNIST(dataset_name=folder)
    splits = task.load(0)
    check_images(splits, (55_000, 5000, 10_000), (28, 28))
    assert splits.test["label"][:10] == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]  # the canonical order
    again = MNIST(dataset_name=folder).load(9)
    assert again.validation["label"] == splits.validation["label"]
    other = MNIST(dataset_name=folder, split_seed=1).load(0)
    assert other.validation["label"] != splits.validation["label"]
    batch = task.collate([splits.train[0]])
    assert batch["pixel_values"].shape == (1, 1, 28, 28)


def test_mnist_of_another_layout_is_refused(tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text("text,label\nfive,5\n")
    with pytest.raises(ValueError, match="must have splits train and test"):
        MNIST(dataset_name=str(tmp_path)).load(0)
    (tmp_path / "test.csv").write_text("text,label\nfive,5\n")
    with pytest.raises(ValueError, match=r"must have columns image and label.*got \['text', 'label'\]"):
        MNIST(dataset_name=str(tmp_path)).load(0)
    tmp_path.joinpath("runs[1]").mkdir()
    with pytest.raises(ValueError, match=r"runs\[1\]: datasets takes \[, \* and \? in a path for a pattern"):
        MNIST(dataset_name=str(tmp_path / "runs[1]")).load(0)
    (tmp_path / "runs[1]" / "data").mkdir()
    monkeypatch.chdir(tmp_path / "runs[1]")
    with pytest.raises(ValueError, match=r"runs\[1\]/data: datasets takes"):
        MNIST(dataset_name="data").load(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits(shift=8), "shift must be at least 0 and below 8 pixels; got 8"),
        (lambda: FindDigit(canvas=29), "canvas must be 8 to 28 pixels; got 29"),
        (lambda: FindDigit(places=0), "places must be at least 1; got 0"),
        (lambda: Adding(length=9), "length must be at least 10.* got 9"),
        (lambda: Frequency(sampling_period=0), "sampling_period must be above 0 .* got 0"),
        (lambda: Frequency(sampling_period=3.0), "at most 2.5 ms.* got 3.0"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
