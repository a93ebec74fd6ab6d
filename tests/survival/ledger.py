"""Count the cases that the fuzz tests try, by their outcome; `make fuzz` writes the counts.

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
    """Count one more case of `subject` with this outcome."""
    _counts[subject, outcome] += 1


def write() -> None:
    """Write the counts of this process, by subject and outcome, if FUZZ_TABLE is set."""
    if not (path := os.environ.get("FUZZ_TABLE")) or not _counts:
        return
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("subject", "outcome", "cases"))
        writer.writerows((*key, count) for key, count in sorted(_counts.items()))
