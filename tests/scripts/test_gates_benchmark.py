"""`make gates`: the same recipe for all gates, the learning rate chosen on validation data, resumable."""

import json
from pathlib import Path

import pytest

from scripts.benchmarks import gates
from scripts.paper.rival_tables import gates_summary


def results(validation: float, test: float, share: float) -> dict:
    found = {"accuracy": test, "update_rate": share, "updates": 10.0}
    points = [found | {"update_rate_asked": rate, "update_rate": rate, "accuracy": test + rate} for rate in (0.1, 0.2)]
    return {
        "metrics": {"validation": {"accuracy": validation}, "test": found},
        "operating_points": points,  # only a dial's are read
        "train": {"steps": 5},
        "commit": "0" * 12,
        "device": "a CPU",
    }


def store(runs: Path, job: gates.Job, **numbers: float) -> None:
    folder = job.folder(runs)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results(**numbers)))


def test_the_rate_is_chosen_on_validation_and_finished_runs_are_kept(tmp_path, capsys) -> None:
    runs = tmp_path / "runs"
    for kind, share in gates.kinds_of([0.2]):
        for rate, validation in zip(gates.RATES, (0.5, 0.9, 0.7), strict=True):
            store(
                runs,
                gates.Job("frequency", kind, share, 1, rate),
                validation=validation,
                test=1 - validation,
                share=share,
            )
        store(runs, gates.Job("frequency", kind, share, 2, gates.RATES[1]), validation=0.9, test=0.2, share=share * 0.8)
    options = [
        "--tasks",
        "frequency",
        "--shares",
        "0.2",
        "--seeds",
        "2",
        "--runs",
        str(runs),
        "--results",
        str(tmp_path),
    ]
    assert gates.main(options) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 2 * (4 + 2)
    assert {row["rate"] for row in rows} == {0.5}
    first = [row["value"] for row in rows if row["seed"] == 1]
    assert first == pytest.approx([0.1] * 4 + [0.2, 0.3])  # never chosen by the test data
    printed = capsys.readouterr().out
    assert "| frequency | Skip LSTM | 20% | 18.0% | accuracy 0.150 ± 0.071 | 2 | 3 | 5 |" in printed
    assert "| frequency | Skip LSTM, one dial | 10% | 10.0% | accuracy 0.250 ± 0.071 | 2 | 3 | 5 |" in printed
    assert "| frequency | 20% | +0.000 | 0.071 | +0.000 | +0.200 | 1 of 2 |" in printed
    assert (tmp_path / "frequency.png").is_file()
    assert gates.main(["--report", "--results", str(tmp_path)]) == 0


def test_every_model_has_the_same_recipe() -> None:
    jobs = [gates.Job("find_digit", kind, share, 3, 2.0).options() for kind, share in gates.kinds_of([0.33])]
    assert {tuple(options[:2]) for options in jobs} == {("--config", "find_digit-skip-lstm")}
    assert jobs[-1][2:5] == ["--dial", "0.05", "0.9"]
    assert {options[-2] for options in jobs} == {"--learning_rate=0.01"}
    assert "--stride=3" in jobs[1]


def test_models_without_a_learned_gate_keep_their_best_step_where_they_overfit() -> None:
    for task in gates.TASKS:
        kept = {
            kind
            for kind, share in gates.kinds_of([0.2])
            if gates.KEEP_BEST[0] in gates.Job(task, kind, share, 1, 1.0).options()
        }
        assert kept == ({"strided", "random", "plain"} if task in ("imdb", "own_imdb") else set())


def test_own_data_take_a_data_set_and_the_defaults() -> None:
    options = gates.Job("own_fsdd", "strided", 0.2, 1, 1.0).options()
    assert "--config" not in options  # which would switch off the longer training of small data
    assert options[:2] == ["--dataset_name=mteb/free-spoken-digit-dataset", "--input_column=audio"]


def test_data_of_the_archive_are_asked_for(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        gates.main(["--tasks", "own_plaid"])
    assert "own_plaid: first `pip install" in capsys.readouterr().err
    assert gates.missing_data("own_vowels")
    Path("runs", "data", "PLAID").mkdir(parents=True)
    assert not gates.missing_data("own_plaid")
    assert not gates.missing_data("own_fsdd")


def test_without_runs_it_says_so(tmp_path, capsys) -> None:
    assert gates.main(["--report", "--results", str(tmp_path)]) == 1
    assert "holds no runs yet" in capsys.readouterr().err


def test_the_summary_has_the_mean_over_seeds_at_one_share(tmp_path) -> None:
    values = [
        ("learned", 0.2, 0.9),
        ("learned", 0.2, 0.8),
        ("learned", 0.35, 0.99),  # another share
        ("strided", 0.2, 0.7),
        ("plain", 1.0, 0.6),
        ("random", 0.2, 0.1),  # not a line of the table
    ]
    rows = [
        {"task": "fsdd", "metric": "accuracy", "kind": kind, "share": share, "value": value}
        for kind, share, value in values
    ]
    rows += [row | {"task": "imdb"} for row in rows if row["kind"] != "plain"]
    rows += [row | {"task": "adding", "metric": "mse"} for row in rows]
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "results.json").write_text(json.dumps(rows))
    assert gates_summary(tmp_path).splitlines() == [
        "| test accuracy | fsdd | imdb |",
        "| --- | --- | --- |",
        "| Skip LSTM | 85.0% | 85.0% |",
        "| LSTM, every 5th step | 70.0% | 70.0% |",
        "| LSTM, every step | 60.0% | - |",
    ]
