"""StopWhenSettled stops a run when its task is solved and its updates no longer fall."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_skiprnn.commands import train
from hf_skiprnn.tasks import Adding
from hf_skiprnn.training.callbacks import StoppingArguments, StopWhenSettled


def evaluations(callback: StopWhenSettled, *found: tuple[float, float]) -> int | None:
    """Pass (solved, update rate) of evaluations to the callback; return the number of the one that stopped training."""
    control = SimpleNamespace(should_training_stop=False)
    for step, (solved, rate) in enumerate(found, start=1):
        metrics = {"eval_solved": solved, "eval_update_rate": rate}
        callback.on_evaluate(None, SimpleNamespace(global_step=step), control, metrics)
        if control.should_training_stop:
            return step
    return None


def test_it_waits_until_updates_fall_no_more() -> None:
    falling = [(1.0, 0.9), (1.0, 0.7), (1.0, 0.5)]
    assert evaluations(StopWhenSettled(2), *falling, (1.0, 0.495), (1.0, 0.52)) == 5
    assert evaluations(StopWhenSettled(2), *falling, (1.0, 0.48), (1.0, 0.46), (1.0, 0.44)) is None
    slowly = [(1.0, 0.5), (1.0, 0.495), (1.0, 0.489)]  # each time by less than 0.01, together by more
    assert evaluations(StopWhenSettled(2), *slowly) is None


def test_what_is_not_solved_begins_anew() -> None:
    assert evaluations(StopWhenSettled(2), *[(0.0, 0.5)] * 9) is None
    assert evaluations(StopWhenSettled(2), (1.0, 0.3), (1.0, 0.3), (0.0, 0.3), *[(1.0, 0.6)] * 3) == 6


def test_a_resumed_run_goes_on_counting() -> None:
    first = StopWhenSettled(2)
    assert evaluations(first, (1.0, 0.5), (1.0, 0.5)) is None
    saved = json.loads(json.dumps({"StopWhenSettled": first.state()}))
    second = StopWhenSettled(2)
    second.on_train_begin(None, SimpleNamespace(global_step=2, stateful_callbacks=saved), None)
    assert evaluations(second, (1.0, 0.5)) == 1


def test_tasks_that_do_not_say_whether_they_are_solved() -> None:
    with pytest.raises(ValueError, match=r"needs a task whose metrics say whether it is solved .* has eval_accuracy"):
        StopWhenSettled(1).on_evaluate(None, None, None, {"eval_accuracy": 1.0, "eval_update_rate": 0.5})
    StopWhenSettled(1).on_evaluate(None, None, None, {"test_accuracy": 1.0})  # after training: nothing to stop


def test_the_option() -> None:
    assert StoppingArguments().callbacks() == []
    (callback,) = StoppingArguments(stop_when_settled=3).callbacks()
    assert isinstance(callback, StopWhenSettled)
    with pytest.raises(ValueError, match="at least 1; got -1"):
        StoppingArguments(stop_when_settled=-1).callbacks()


def test_training_stops_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adding, "compute_metrics", lambda self, prediction: {"mse": 0.001, "solved": 1.0})
    small = ["--hidden_size=4", "--gate=always", "--eval_rows=16", "--per_device_train_batch_size=4", "--max_steps=9"]
    quiet = ["--use_cpu", "--disable_tqdm=true", "--report_to=none", "--eval_steps=1", "--save_steps=1"]
    options = ["--task=adding", "--stop_when_settled=2", f"--output_dir={tmp_path}", "--lr_scheduler_type=constant"]
    results = train.main([*options, *small, *quiet])
    assert results["train"]["steps"] == 3
    assert results["stopping"] == {"stop_when_settled": 2, "settled": True, "step": 3}
    again = train.main([*options, *small, *quiet])  # as after a kill between the last checkpoint and the end
    assert again["train"]["steps"] == 3
    assert again["stopping"] == results["stopping"]
