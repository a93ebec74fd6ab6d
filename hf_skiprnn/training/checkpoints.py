"""Checkpoint folders of a training run: find the complete ones, delete old ones, and explain errors of a full disk.

A checkpoint is complete when it holds the file COMPLETE. That file is written last, after everything else has reached
the disk, so neither a kill nor a power failure leaves half a checkpoint that looks complete.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

COMPLETE = "complete"  # an empty file, written last: without it a checkpoint is incomplete
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class CheckpointError(OSError):
    """Raised if a checkpoint could not be written; the message says why, what is left on the disk, and what to do."""


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders in order of their step, complete or not."""
    steps = {path: path.name.rpartition("-")[2] for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the complete checkpoint folders in order of their step."""
    return [path for path in checkpoints_in(output_dir) if (path / COMPLETE).is_file()]


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the complete checkpoint of the highest step, or None; warn about later, incomplete ones."""
    for folder in reversed(checkpoints_in(output_dir)):
        if (folder / COMPLETE).is_file():
            return str(folder)
        logger.warning("Ignoring %s: it holds no file named %r, so its writing was interrupted.", folder, COMPLETE)
    return None


def resumable_checkpoint(output_dir: str, asked: str | bool | None) -> Path | None:
    """Return the checkpoint from which training resumes; None for a new training.

    Args:
        output_dir: folder of the run's checkpoints.
        asked: Trainer's resume_from_checkpoint; True: the last complete one in output_dir.

    Raises:
        ValueError: there is no complete checkpoint, or the named one is incomplete.
    """
    if not asked:
        return None
    if asked is True:
        if (last := last_complete_checkpoint(output_dir)) is None:
            raise ValueError(f"There is no complete checkpoint in {output_dir} to resume from.")
        return Path(last)
    if not Path(asked, COMPLETE).is_file():
        raise ValueError(
            f"{asked} holds no file named {COMPLETE!r}: its writing was interrupted, or another trainer wrote "
            "it. Resume from an earlier one, or add that file if you know that the checkpoint is complete."
        )
    return Path(asked)


def steps_of(folder: Path) -> int | None:
    """Return the number of optimizer steps in a checkpoint's trainer_state.json; None if there is no such file.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        return None
    try:
        step = TrainerState.load_from_json(str(path)).global_step
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"global_step must be a number of steps; got {step!r}")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}). Resume from an earlier checkpoint."
        ) from error
    return step


def mark_complete(folder: Path) -> None:
    """Flush all files of a checkpoint folder to the disk, then write COMPLETE into it."""
    for path in folder.rglob("*"):
        if path.is_file():
            _to_disk(path)
    (folder / COMPLETE).touch()
    for path in (folder / COMPLETE, folder, folder.parent):
        _to_disk(path)


def mark_incomplete(folder: Path) -> None:
    """Prepare to write a checkpoint into `folder`: remove COMPLETE; if the folder is a link, remove the link."""
    if folder.is_symlink():  # otherwise the files in the linked folder would be overwritten
        folder.unlink()
    (folder / COMPLETE).unlink(missing_ok=True)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint folder; if it is a link, delete only the link."""
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / COMPLETE).unlink(missing_ok=True)  # first, so that a half-deleted one does not look complete
    shutil.rmtree(folder, ignore_errors=not folder.exists())


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_older(current: Path, limit: int, best: str | None) -> None:
    """Delete the oldest complete checkpoints until `limit` are left.

    Args:
        current: the newest checkpoint; it is kept.
        limit: number of complete checkpoints to keep; incomplete ones are neither counted nor deleted.
        best: the best checkpoint; it is kept too.
    """
    keep = {current.name, Path(best).name} if best else {current.name}
    complete = complete_checkpoints(current.parent)
    others = [path for path in complete if path.name not in keep]
    for folder in others[: max(len(complete) - max(limit, len(keep)), 0)]:
        delete_checkpoint(folder)


@contextmanager
def disk_errors_explained(folder: Path, delete: bool) -> Iterator[None]:
    """Replace errors of a full or broken disk, or of an exceeded quota, by a CheckpointError.

    Args:
        folder: folder that is written to.
        delete: delete the folder after an error, which frees space; for a folder that holds a checkpoint.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError
        if not _of_the_disk(error):
            raise
        if delete:
            delete_checkpoint(folder)
        parent = folder.parent if delete else folder
        free, last = shutil.disk_usage(parent).free / 2**20, last_complete_checkpoint(parent)
        left = f"The last complete checkpoint is {last}" if last else "There is no complete checkpoint"
        raise CheckpointError(
            f"{folder} could not be written ({error}); {free:.0f} MiB are free there. {left}. Free some space, or "
            "choose another output_dir, and run the same command again: it goes on from the last complete checkpoint."
        ) from error


def _of_the_disk(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_ERRORS
    # safetensors keeps the system's error number; torch does not: "[enforce fail at inline_container.cc:672] ...".
    named = re.search(r"os error (\d+)", str(error))
    return int(named[1]) in DISK_ERRORS if named else bool(re.search("inline_container|iostream error", str(error)))
