"""Inputs to try the app with: handwritten digits, a review, a series, and recordings where the data are at hand."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from hf_skiprnn.tasks import TASKS
from hf_skiprnn.tasks.readers.sounds import read_sound

REVIEW = (
    "I did not expect much from this film, and for the first half hour it gave me little: two brothers drive through "
    "the rain and say almost nothing. Then they stop at their father's house, and everything changes. The actors are "
    "wonderful, the music is quiet and never in the way, and the last scene is one of the best I have seen in years. "
    "A beautiful, honest story. Go and see it."
)
SERIES = " ".join(
    f"{np.sin(2 * np.pi * (0.3 + step / 5.5)):.3f}" for step in range(100)
)  # a period of 5.5 ms, sampled every ms


@functools.cache
def canvases() -> tuple[np.ndarray, ...]:
    """Return the test canvases of the task find_digit, [H, W] of ink in [0, 1]; they come with scikit-learn."""
    # The training rows are not used; one place for each makes few of them.
    task: Any = TASKS["find_digit"]
    rows = task(places=1).load(seed=0).test
    return tuple(np.asarray(image, np.float32) / 255 for image in rows["image"][:])


@functools.cache
def recordings(dataset_name: str) -> dict[str, Any]:
    """Return one test recording of each spoken digit: name -> cell of the column audio.

    dataset_name: local folder or Hub id in the layout of the task fsdd; "" for none.
    """
    if not dataset_name:
        return {}
    from datasets import Audio

    task: Any = TASKS["fsdd"]
    rows = task(dataset_name=dataset_name).recordings()["test"].cast_column("audio", Audio(decode=False))
    labels = [int(label) for label in rows["label"][:]]
    return {f"{digit}": rows[labels.index(digit)]["audio"] for digit in sorted(set(labels))}


def recording(dataset_name: str, name: str) -> tuple[int, np.ndarray]:
    """Return (samples per second, samples as 16-bit integers) of one of `recordings`."""
    samples, rate = read_sound(recordings(dataset_name)[name], f"the recording of {name}")
    return rate, (32767 * samples.clip(-1, 1)).astype(np.int16)


def data_beside(folder: Path) -> str:
    """Return the folder of the spoken digits where it lies beside a clone, as for the tests; "" if it is absent."""
    path = folder.parent / "shared" / "data" / "fsdd"
    return str(path) if path.is_dir() else ""
