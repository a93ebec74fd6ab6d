"""Print a line of tests/survival/matrix.csv from logs of pytest: python tests/matrix/row.py NAME TESTS LOG...

TESTS describes which tests were run; the logs are from `pytest -v`. Tests that were collected but did not end, because
the run was interrupted or a worker died, count as unfinished.
"""

import platform
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

OUTCOMES = re.compile(
    r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED)\b|(PASSED|FAILED|ERROR|SKIPPED)(?: \(.*\))? +\[ *\d+%\]$",
    re.MULTILINE,
)
COLLECTED = re.compile(r"collected (\d+) items?|\d+ workers? \[(\d+) items?\]")

if __name__ == "__main__":
    name, tests, *logs = sys.argv[1:]
    texts = [Path(log).read_text() for log in logs]
    counts = Counter(found[1] or found[2] for text in texts for found in OUTCOMES.finditer(text))
    collected = sum(int(found[1] or found[2]) for text in texts for found in COLLECTED.finditer(text))
    packages = [version(package) for package in ("torch", "transformers", "huggingface_hub", "datasets")]
    failed = counts["FAILED"] + counts["ERROR"]
    numbers = (counts["PASSED"], failed, counts["SKIPPED"], collected - counts.total())
    print(",".join([name, tests, platform.python_version(), *packages, *map(str, numbers)]))
