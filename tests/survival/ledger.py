"""Count the cases of the fuzz tests by outcome; `make fuzz` writes the counts to a CSV file.

FUZZ_SCALE multiplies the number of random cases (default 1, as in `make test`). FUZZ_TABLE names the CSV file.
"""

import csv
import os
from collections import Counter
from pathlib import Path

SCALE = int(os.environ.get("FUZZ_SCALE", "1"))

_counts: Counter[tuple[str, str]] = Counter()


def note(subject: str, outcome: str) -> None:
    """Count one case of `subject` with this outcome."""
    _counts[subject, outcome] += 1


def write() -> None:
    """Write the counts of this process, by subject and outcome, if FUZZ_TABLE is set."""
    if not (path := os.environ.get("FUZZ_TABLE")) or not _counts:
        return
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("subject", "outcome", "cases"))
        writer.writerows((*key, count) for key, count in sorted(_counts.items()))
