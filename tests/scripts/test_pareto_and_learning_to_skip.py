"""scripts/paper/pareto.py and learn_to_skip.py: the Pareto picture, and an nn.LSTM that learns to skip."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_skiprnn.evaluation.figures import channels_read, pareto_front, pixels_read, words_read
from hf_skiprnn.tasks import IMDB
from scripts.paper import learn_to_skip, pareto


def test_the_front_holds_what_nothing_beats():
    runs = [(10.0, 0.8), (5.0, 0.9), (20.0, 0.95), (20.0, 0.94), (30.0, 0.95), (1.0, 0.1)]
    assert pareto_front(runs) == [(1.0, 0.1), (5.0, 0.9), (20.0, 0.95)]


def write_run(folder, gate, updates, accuracy, task="fsdd", target=None, seed=1):
    folder.mkdir()
    model = {"gate": gate, "cell_type": "lstm", "budget_target": target}
    test = {"updates": updates, "accuracy": accuracy}
    training = {"seed": seed, "output_dir": str(folder)}
    run = {
        "task": task,
        "model": model,
        "training": training,
        "metrics": {"test": test},
        "command": f"train.py {folder}",
    }
    (folder / "results.json").write_text(json.dumps(run))
    return str(folder)


def test_curves_are_of_gates_and_cells(tmp_path, capsys):
    runs = [("learned", 10.0, 0.9), ("learned", 20.0, 0.95), ("strided", 10.0, 0.8), ("always", 40.0, 0.96)]
    folders = [write_run(tmp_path / f"run{i}", *run, target=i) for i, run in enumerate(runs)]
    folders.append(write_run(tmp_path / "run4", "learned", 12.0, 0.9, target=0, seed=2))
    found = pareto.main([*folders, "--output", str(tmp_path / "front")])
    assert found == {
        "Skip LSTM": [[(10.0, 0.9), (12.0, 0.9)], [(20.0, 0.95)]],
        "LSTM, strided": [[(10.0, 0.8)]],
        "LSTM": [[(40.0, 0.96)]],
    }
    assert (tmp_path / "front" / "pareto.png").stat().st_size > 5000
    kept = json.loads((tmp_path / "front" / "results.json").read_text())
    assert kept["run2"]["metrics"]["test"] == {"updates": 10.0, "accuracy": 0.8}
    assert kept["run2"]["training"] == {"seed": 1}
    assert str(tmp_path) not in json.dumps(kept)
    assert "Skip LSTM: unbeaten 0.9 at 11.0, 0.95 at 20.0" in capsys.readouterr().out
    (tmp_path / "front" / "pareto.png").unlink()
    assert pareto.main(["--output", str(tmp_path / "front")]) == found  # from the stored results
    assert (tmp_path / "front" / "pareto.png").is_file()


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path):
    for row, gate in (("a", "learned"), ("b", "always")):
        (tmp_path / row).mkdir()
        for seed in (1, 2):
            write_run(tmp_path / row / f"seed-{seed}", gate, 1.0, 0.5, seed=seed)
    folders = [str(path) for path in sorted(tmp_path.glob("*/seed-*"))]
    found = pareto.main([*folders, "--output", str(tmp_path / "front")])
    assert {curve: [len(runs) for runs in points] for curve, points in found.items()} == {"Skip LSTM": [2], "LSTM": [2]}
    assert set(json.loads((tmp_path / "front/results.json").read_text())) == {
        "a-seed-1",
        "a-seed-2",
        "b-seed-1",
        "b-seed-2",
    }


def test_a_run_that_started_from_a_checkpoint_is_a_point_of_its_own(tmp_path):
    folders = [write_run(tmp_path / f"run{seed}", "learned", 1.0, 0.5, seed=seed) for seed in (1, 2)]
    run = json.loads((tmp_path / "run2/results.json").read_text()) | {"start": {"model_name_or_path": "x"}}
    (tmp_path / "run2/results.json").write_text(json.dumps(run))
    assert pareto.main([*folders, "--output", str(tmp_path / "front")])["Skip LSTM"] == [[(1.0, 0.5)], [(1.0, 0.5)]]


def test_runs_that_do_not_go_together_are_refused(tmp_path):
    one, other = write_run(tmp_path / "a", "learned", 1.0, 0.5), write_run(tmp_path / "b", "learned", 1.0, 0.5, "imdb")
    with pytest.raises(SystemExit, match=r"several tasks \(fsdd, imdb\)"):
        pareto.main([one, other])
    with pytest.raises(SystemExit, match=r"has no metric 'f1'; it has accuracy, updates"):
        pareto.main([one, "--metric", "f1"])
    with pytest.raises(SystemExit, match="holds no results"):
        pareto.main([str(tmp_path)])
    with pytest.raises(SystemExit):
        pareto.main(["--output", str(tmp_path)])  # no runs, and none are stored


def test_class_names_are_shown_as_they_are(tmp_path):
    names, gates = ["$x^$", "$5_{"], np.ones((2, 3), bool)
    channels_read([np.zeros((3, 1))] * 2, gates, names, names).savefig(tmp_path / "series.png")
    words_read([["a", "b", "c"]] * 2, gates, names, names).savefig(tmp_path / "words.png")
    pixels_read(np.zeros((2, 2, 2)), np.ones((2, 4), bool), names, names).savefig(tmp_path / "pixels.png")


def test_series_are_drawn_as_lines():
    steps, read = np.arange(24.0).reshape(8, 3), np.arange(8) % 2 == 0
    wide = np.arange(80.0).reshape(8, 10)
    figure = channels_read([steps[:, :1], steps, wide], [read, read, read], ["a"] * 3, ["a"] * 3)
    assert not any(axes.get_images() for axes in figure.axes)
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 6, 2]  # a line and its red points for each channel
    single, several, mean = (axes.get_lines() for axes in figure.axes)
    assert single[1].get_xydata().tolist() == [[t, 3.0 * t] for t in (0, 2, 4, 6)]
    assert mean[0].get_ydata().tolist() == wide.mean(1).tolist()
    tops, lows = zip(*((line.get_ydata().max(), line.get_ydata().min()) for line in several[::2]), strict=True)
    assert all(low > top for low, top in zip(lows, tops[1:], strict=False))  # the first channel is the highest lane
    assert channels_read([np.ones((4, 2))], [np.ones(4, bool)], ["a"], ["a"]).axes  # constant channels


def test_figures_want_a_gate_for_every_step():
    with pytest.raises(ValueError, match="one gate per step"):
        channels_read([np.zeros((5, 2))], [np.zeros(4, bool)], ["a"], ["a"])
    with pytest.raises(ValueError, match="one gate per step"):
        words_read([["a", "b"]], [np.zeros(3, bool)], ["a"], ["a"])


@pytest.fixture
def reviews(tmp_path):
    texts = ["and some words " + " ".join(["good" if i % 2 else "bad"] * 5) for i in range(60)]
    for split in ("train", "test"):
        Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(60)]}).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    return str(tmp_path)


def test_a_trained_lstm_is_converted_and_reads_less_after_fine_tuning(reviews, tmp_path):
    options = ["--dataset_name", reviews, "--vocabulary", "20", "--hidden_size", "8", "--batch_size", "10"]
    options += ["--learning_rate", "0.02", "--budget_weight", "0.01", "--fine_tuning_epochs", "12", "--epochs", "15"]
    found = learn_to_skip.main([*options, "--output_dir", str(tmp_path / "run")])
    assert found["largest_difference_of_logits_after_conversion"] < 1e-5
    assert found["before"]["update_rate"] == 1.0
    assert found["before"]["accuracy"] == 1.0
    assert found["not fine-tuned"]["update_rate"] < 0.5  # of rows of 8 words every third
    assert 0.2 < found["after"]["update_rate"] < 0.7
    assert found["after"]["accuracy"] >= 0.9
    assert found["strided"]["updates"] == 3.0
    assert json.loads((tmp_path / "run" / "learned-to-skip.json").read_text())["after"] == found["after"]


def test_weights_from_a_file_are_taken(reviews, tmp_path):
    task = IMDB(dataset_name=reviews, vocabulary=20)
    native = learn_to_skip.NativeClassifier(20, 300, 4, 2)
    torch.save(native.state_dict(), tmp_path / "lstm.pt")
    model = learn_to_skip.convert(torch.load(tmp_path / "lstm.pt", weights_only=True), task)
    assert learn_to_skip.largest_difference(native, model, task) < 1e-5
    options = ["--dataset_name", reviews, "--vocabulary", "20", "--weights", str(tmp_path / "lstm.pt")]
    found = learn_to_skip.main([*options, "--fine_tuning_epochs", "1", "--output_dir", str(tmp_path / "run")])
    assert found["before"]["update_rate"] == 1.0
    with pytest.raises(ValueError, match="target must be a share of the words, between 0 and 1; got 40"):
        learn_to_skip.main([*options, "--target", "40"])
