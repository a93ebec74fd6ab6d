"""The task own_data with --streaming: which rows are held out, and that they are held out every time."""

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from row_files import series, write

from hf_skiprnn.tasks import OwnData
from hf_skiprnn.tasks.own_data.table import is_held_out, place


def test_a_stream_holds_the_same_rows_out_in_every_epoch(tmp_path):
    # A hash of their content puts about 50 rows into each held-out split, so there are 20 whatever the rows hold.
    task = OwnData(dataset_name=write(tmp_path / "d", series(500)), streaming=True, eval_rows=20)
    splits = task.load(0)
    held = {row["row_number"] for part in (splits.validation, splits.test) for row in part}
    assert len(held) == len(splits.validation) + len(splits.test) == 40
    epochs = []
    for epoch in (0, 1):
        splits.train.set_epoch(epoch)
        epochs.append([row["row_number"] for row in splits.train])
    assert epochs[0] != epochs[1]  # shuffled anew
    assert set(epochs[0]) == set(epochs[1])
    assert not held & set(epochs[0])
    assert 350 < len(epochs[0]) < 450
    defaults = task.model_defaults()
    assert defaults["label2id"] == {"run": 0, "walk": 1}
    assert task.collate(list(splits.train.take(3)))["input_values"].shape[2] == 2


def test_a_stream_of_several_files_holds_the_same_rows_out_in_every_order(tmp_path):
    for file in range(4):
        write(
            tmp_path / "d", [{"x": [float(file), float(row)], "label": row % 2} for row in range(100)], f"train-{file}"
        )
    splits = OwnData(dataset_name=str(tmp_path / "d"), streaming=True).load(1)
    assert splits.train.num_shards == 4
    held = {tuple(row["x"]) for part in (splits.validation, splits.test) for row in part}
    assert len(held) == len(splits.validation) + len(splits.test) > 40
    for epoch, workers in ((0, 0), (1, 0), (0, 2)):
        splits.train.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(splits.train, batch_size=None, num_workers=workers)
        assert {tuple(row["x"]) for row in loader}.isdisjoint(held)
        assert sum(1 for _ in loader) == 400 - len(held)


def test_a_stream_is_evaluated_on_rows_of_every_class(tmp_path):
    """A split may be sorted by class, as that of imdb is."""
    folder = tmp_path / "d"
    write(folder, [{"x": [0.0, row], "label": row // 500} for row in range(1000)], "train")
    write(folder, [{"x": [0.0, row], "label": row // 1000} for row in range(2000)], "test")
    splits = OwnData(dataset_name=str(folder), streaming=True, eval_rows=100).load(0)
    assert [len(part) for part in (splits.validation, splits.test)] == [100, 100]
    for part in (splits.validation, splits.test):
        assert 25 < sum(part["label"]) < 75


def test_equal_rows_of_a_stream_are_held_out_together():
    sound = {"bytes": b"RIFF", "path": "a/1.wav"}
    same = [{"audio": dict(sound), "label": 1, "row_number": row, "split_name": "train"} for row in (3, 77)]
    assert place(same[0], 5) == place(same[1], 5)
    other = [{**same[0], "label": 0}, {**same[0], "audio": {"bytes": None, "path": "a/1.wav"}}]
    assert len({place(row, 5) for row in (same[0], *other)} | {place(same[0], 6)}) == 4


@pytest.mark.parametrize("cell", [[0.5, 1.0], "a text", np.arange(3.0), PILImage.new("L", (2, 2), 7)])
def test_the_rows_held_out_of_a_stream_are_a_share_of_them(cell):
    held = [{"x": cell, "label": row} for row in range(2000) if is_held_out({"x": cell, "label": row}, 1000, 0.1, True)]
    assert 140 < len(held) < 260
    again = [row for row in held if is_held_out(row, 2000, 0.1, True)]
    assert len(again) < 60  # the second seed draws anew
