"""Write data sets of the UCR/UEA archive of time series as folders, which gates.py trains on as a user's own data.

    pip install --no-deps sktime scikit-base
    python -m scripts.benchmarks.archive                    # runs/data/PLAID, runs/data/JapaneseVowels
    python -m scripts.benchmarks.gates --tasks own_plaid own_vowels

The package sktime holds these two and needs no network for them. PLAID (Gao et al. 2014): currents of household
appliances, 537 series of 100 to 1344 steps for training, whose amplitudes differ by a factor of 10^5. Japanese Vowels
(Kudo et al. 1999): 12 features of a spoken vowel, 270 series of 7 to 26 steps for training.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

FOLDER = Path("runs", "data")


def loaders() -> dict[str, Callable[..., Any]]:
    """Return sktime's function for each data set: split -> series [N, channels] (a data frame of series), labels."""
    from sktime.datasets import load_japanese_vowels, load_plaid

    return {"PLAID": load_plaid, "JapaneseVowels": load_japanese_vowels}


def as_lists(row: Any) -> list[Any]:
    """Return one series as [T], or with several channels as [T][channels]."""
    channels = np.stack([np.asarray(channel, np.float64) for channel in row], axis=1)
    return (channels[:, 0] if channels.shape[1] == 1 else channels).tolist()


def main(argv: list[str] | None = None) -> int:
    """Write train and test of each data set as Parquet files."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    folder = parser.parse_args(argv).folder
    for name, load in loaders().items():
        for split in ("train", "test"):
            table, labels = load(split, return_X_y=True)
            rows = {"series": [as_lists(row) for row in table.to_numpy()], "label": [str(label) for label in labels]}
            (folder / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(rows).to_parquet(folder / name / f"{split}.parquet")
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
