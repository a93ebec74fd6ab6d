"""Checkpoints of a training run on the disk: whole ones, cut-off ones, and what to say when one cannot be written.

A checkpoint is whole when it holds the file COMPLETE, which is written last, after everything else has reached the
disk. So neither a kill nor a power failure leaves half of one that looks whole.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

COMPLETE = "complete"  # an empty file, written last: a checkpoint without it was cut off
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class CheckpointError(OSError):
    """A checkpoint could not be written; the message says why, what is left, and what to do."""


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders by step, complete or not."""
    steps = {path: path.name.rpartition("-")[2] for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete ones, by step."""
    return [path for path in checkpoints_in(output_dir) if (path / COMPLETE).is_file()]


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint of the highest step in a folder, or None; warns of later ones that were cut off."""
    for folder in reversed(checkpoints_in(output_dir)):
        if (folder / COMPLETE).is_file():
            return str(folder)
        logger.warning(
            "Ignoring %s: it holds no file named %r, so it was cut off while being written.", folder, COMPLETE
        )
    return None


def mark_complete(folder: Path) -> None:
    """Say that a checkpoint is whole, once all of it is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _to_disk(path)
    (folder / COMPLETE).touch()
    for path in (folder / COMPLETE, folder, folder.parent):
        _to_disk(path)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_older(current: Path, limit: int, best: str | None) -> None:
    """Keep `limit` complete checkpoints, the current and the best among them. Incomplete ones do not count."""
    keep = {current.name, Path(best).name} if best else {current.name}
    complete = complete_checkpoints(current.parent)
    others = [path for path in complete if path.name not in keep]
    for folder in others[: max(len(complete) - max(limit, len(keep)), 0)]:
        (folder / COMPLETE).unlink()  # first, so that a half-deleted one is not taken for whole
        shutil.rmtree(folder)


@contextmanager
def disk_errors_explained(folder: Path, delete: bool) -> Iterator[None]:
    """Turn what a full disk (or a quota, or a broken one) makes of writing to `folder` into a CheckpointError.

    delete: the folder is a checkpoint; delete what there is of it, which also makes room.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError
        if not _of_the_disk(error):
            raise
        if delete:
            shutil.rmtree(folder, ignore_errors=True)
        parent = folder.parent if delete else folder
        free, last = shutil.disk_usage(parent).free / 2**20, last_complete_checkpoint(parent)
        left = f"The last complete checkpoint, {last}, stands" if last else "There is no complete checkpoint"
        raise CheckpointError(
            f"{folder} could not be written ({error}); {free:.0f} MiB are free there. {left}. Make room, or choose "
            "another output_dir, and run the same command again: it goes on from the last complete checkpoint."
        ) from error


def _of_the_disk(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_ERRORS
    # safetensors passes the system's words on; torch loses them: "[enforce fail at inline_container.cc:672] ...".
    named = re.search(r"os error (\d+)", str(error))
    return int(named[1]) in DISK_ERRORS if named else bool(re.search("inline_container|iostream error", str(error)))
