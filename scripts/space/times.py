"""Time the app's reaction: from what a visitor gave to the answer with its picture, without the browser.

    python scripts/space/times.py

It prints the median and the 90th percentile of 20 readings in milliseconds, for each tab that has a checkpoint.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import examples
import numpy as np
import soundfile
import torch
from checkpoints import Kind, dial, found, load
from drawings import value_of
from reading import show

REPEATS = 20
RATE = 8000


def inputs(folder: Path) -> dict[Kind, Any]:
    """Return an input of each kind; the sound is a second of noise."""
    sound = folder / "noise.wav"
    soundfile.write(sound, 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    return {
        "image": value_of(examples.canvases()[0]),
        "text": examples.REVIEW,
        "sound": str(sound),
        "series": examples.SERIES,
    }


def milliseconds(kind: Kind, name: str, raw: Any) -> np.ndarray:
    """Return how long each of REPEATS readings took; the first ones, which load the checkpoint, do not count."""
    start, taken = dial(load(name).config).start, []
    for _ in range(REPEATS + 2):
        begin = time.perf_counter()
        show([kind], name, start, raw)
        taken.append(1000 * (time.perf_counter() - begin))
    return np.array(taken[2:])


def main() -> None:
    """Print the table."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'tab':8} {'checkpoint':40} {'p50 ms':>8} {'p90 ms':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for kind, raw in inputs(Path(folder)).items():
            for name in found(kind)[:1]:
                middle, slow = np.percentile(milliseconds(kind, name, raw), (50, 90))
                print(f"{kind:8} {name:40} {middle:8.0f} {slow:8.0f}")


if __name__ == "__main__":
    main()
