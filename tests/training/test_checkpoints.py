"""Checkpoints of a training: which is resumed from, which are deleted, and that the resumed run ends alike."""

import pytest
import torch
from small_trainers import assert_same_weights, new_model, rows, saving

from hf_skiprnn.training.callbacks import BudgetController
from hf_skiprnn.training.checkpoints import COMPLETE, delete_older, last_complete_checkpoint


def test_resumes_from_the_last_complete_checkpoint_only(tmp_path, caplog):
    whole = saving(tmp_path / "whole")
    whole.train()
    cut = saving(tmp_path / "cut", max_steps=9)
    cut.train()
    folders = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert folders == ["checkpoint-6", "checkpoint-9"]
    assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-9")
    (tmp_path / "cut/checkpoint-9" / COMPLETE).unlink()  # as after a kill while it was written
    (tmp_path / "cut/checkpoint-9/model.safetensors").write_bytes(b"half")
    with caplog.at_level("WARNING"):
        assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-6")
    resumed = saving(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert_same_weights(resumed.model, whole.model)
    assert (tmp_path / "cut/checkpoint-9" / COMPLETE).is_file()  # the resumed run wrote it again
    assert whole.state.log_history[-2]["task_loss"] == pytest.approx(resumed.state.log_history[-2]["task_loss"])


def test_checkpoints_that_cannot_be_resumed_from(tmp_path):
    trainer = saving(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    (tmp_path / "checkpoint-3" / COMPLETE).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 holds no file named 'complete': its writing was interrupted"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", "{"),
        ("trainer_state.json", '{"global_step": "x"}'),
        ("trainer_state.json", '{"strange": 1}'),
        ("training_window.json", "[]"),
        ("training_window.json", '{"sums": [1, 2, NaN, 1, 1, 1, 1]}'),
    ],
)
def test_broken_files_of_a_checkpoint_are_named(tmp_path, name, content):
    saving(tmp_path, max_steps=3).train()
    (tmp_path / "checkpoint-3" / name).write_text(content)
    with pytest.raises(ValueError, match=rf"checkpoint-3/{name} is damaged \(.*Resume from an earlier checkpoint"):
        saving(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_a_link_is_unlinked_and_nothing_behind_it_touched(tmp_path):
    for name in ("kept", "run"):
        (tmp_path / name).mkdir()
    behind = tmp_path / "kept/best"
    behind.mkdir()
    (behind / COMPLETE).touch()
    (behind / "model.safetensors").write_bytes(b"mine")
    for step in (1, 6):  # an older checkpoint, and one that will be written again
        (tmp_path / f"run/checkpoint-{step}").symlink_to(behind)
    saving(tmp_path / "run", max_steps=6, save_total_limit=1).train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (tmp_path / "run/checkpoint-6").is_symlink()
    assert {path.name: path.read_bytes() for path in behind.iterdir()} == {COMPLETE: b"", "model.safetensors": b"mine"}


def test_an_older_checkpoint_is_kept_until_the_new_one_is_complete(tmp_path, monkeypatch):
    trainer = saving(tmp_path, save_total_limit=1)
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: 1 / 0 if folder.endswith("-6") else None)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert (tmp_path / "checkpoint-6").is_dir()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-3")
    assert trainer.args.save_total_limit == 1


def test_complete_checkpoints_beyond_the_limit_go_oldest_first(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 10:  # incomplete, and later than the current one
            (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    (tmp_path / "checkpoint-best").mkdir()  # not a checkpoint of the trainer

    def left():
        return sorted(path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir())

    delete_older(tmp_path / "checkpoint-8", 3, best=str(tmp_path / "checkpoint-2"))
    assert left() == ["10", "2", "6", "8", "best"]
    delete_older(tmp_path / "checkpoint-8", 1, best=str(tmp_path / "checkpoint-2"))
    assert left() == ["10", "2", "8", "best"]
    delete_older(tmp_path / "checkpoint-8", 1, best=None)
    assert left() == ["10", "8", "best"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_killed_after_its_last_checkpoint_goes_on_to_the_same_end(tmp_path, stream):
    """No step is trained after the last one, and the next evaluation uses the same random gates."""
    data = {"train_dataset": rows().to_iterable_dataset()} if stream else {}

    def new(folder):
        model = new_model(gate="random", skip_probability=0.5)
        return saving(folder, model, trainer_kwargs=dict(data), max_steps=9)

    whole = new(tmp_path)
    whole.train()
    metrics = whole.evaluate()
    torch.manual_seed(99)
    resumed = new(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9
    assert_same_weights(resumed.model, whole.model, atol=0)
    assert resumed.evaluate()["eval_updates"] == metrics["eval_updates"]


def test_a_checkpoint_in_the_middle_of_a_logging_window_keeps_it(tmp_path):
    """Steps 4 to 6 are one logging window with a checkpoint after step 5; the resumed run logs the same numbers."""
    kwargs = {"logging_steps": 3, "save_steps": 5, "max_steps": 8}
    logs = []
    for cut in (False, True):
        controller = BudgetController(0.4)
        trainer = saving(tmp_path, trainer_kwargs={"callbacks": [controller]}, **kwargs)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if cut else None)
        log = next(log for log in trainer.state.log_history if log["step"] == 6 and "task_loss" in log)
        logs.append({name: log[name] for name in ("loss", "task_loss", "budget_loss", "updates", "update_rate")})
        logs[-1]["lambda"] = controller.weight
    assert logs[0] == logs[1]
