"""A full disk, or a limit on file sizes, during training: the error is clear, and the last checkpoint is kept."""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from small_trainers import assert_same_weights, saving

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.training.checkpoints import CheckpointError, last_complete_checkpoint


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Limit the size of files in bytes: writing more raises EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wide_model():
    """Return a model with weights of 120 kB, and so an optimizer state of 250 kB."""
    torch.manual_seed(3)
    return SkipRNNForSequenceClassification(SkipRNNConfig(input_size=2, hidden_size=60, num_labels=3)).double()


# Limits that are too small for the first file, for the model's code, for the weights, for the optimizer's state.
@pytest.mark.parametrize("size", [0, 5_000, 60_000, 160_000])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, size: int, monkeypatch) -> None:
    whole = saving(tmp_path / "whole", wide_model(), max_steps=7, save_strategy="no")
    whole.train()
    trainer = saving(tmp_path / "full", wide_model(), max_steps=7)
    save = trainer._save_checkpoint

    def save_with_a_limit(*args) -> None:
        with files_up_to(size) if trainer.state.global_step == 6 else nullcontext():
            save(*args)

    monkeypatch.setattr(trainer, "_save_checkpoint", save_with_a_limit)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)checkpoint-6 could not be written .*The last complete checkpoint is .*checkpoint-3\. Free some",
    ):
        trainer.train()
    assert [path.name for path in (tmp_path / "full").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = saving(tmp_path / "full", wide_model(), max_steps=7)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, whole.model, atol=0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    """Checkpoints fill the disk. With free space again, training resumes and ends with the same weights."""
    whole = saving(tmp_path / "whole", num_train_epochs=4, save_strategy="no")
    whole.train()
    trainer = saving(small_disk, num_train_epochs=4, save_total_limit=None)
    with pytest.raises(CheckpointError, match=r"(?s)could not be written.* MiB are free there"):
        trainer.train()
    last = last_complete_checkpoint(small_disk)
    assert last is not None
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    resumed = saving(small_disk, num_train_epochs=4, save_total_limit=None)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, whole.model, atol=0)


def test_a_final_model_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    trainer = saving(tmp_path, wide_model(), max_steps=3)
    trainer.train()
    with (
        files_up_to(60_000),
        pytest.raises(
            CheckpointError, match=r"(?s)could not be written .*The last complete checkpoint is .*checkpoint-3"
        ),
    ):
        trainer.save_model()
