"""What the fuzz tests tried, and what came of it: counted while they run, written by `make fuzz`.

FUZZ_SCALE (default 1, the short form in `make test`) multiplies the number of random cases; FUZZ_TABLE names the CSV
file that the counts go to.
"""

import csv
import os
from collections import Counter
from pathlib import Path

SCALE = int(os.environ.get("FUZZ_SCALE", "1"))

_counts: Counter[tuple[str, str]] = Counter()


def note(subject: str, outcome: str) -> None:
    """One more case of `subject` ended so."""
    _counts[subject, outcome] += 1


def write() -> None:
    """The counts of this process, by subject and outcome; nothing without FUZZ_TABLE."""
    if not (path := os.environ.get("FUZZ_TABLE")) or not _counts:
        return
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("subject", "outcome", "cases"))
        writer.writerows((*key, count) for key, count in sorted(_counts.items()))
