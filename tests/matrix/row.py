"""A line of tests/survival/matrix.csv: python tests/matrix/row.py NAME LOG_OF_PYTEST."""

import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    name, log = sys.argv[1:]
    summary = Path(log).read_text().strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    if not counts:
        raise SystemExit(f"{log} does not end with pytest's summary")
    packages = [version(package) for package in ("torch", "transformers", "huggingface_hub", "datasets")]
    failed = counts.get("failed", 0) + counts.get("error", 0)
    numbers = map(str, (counts.get("passed", 0), failed, counts.get("skipped", 0)))
    print(",".join([name, platform.python_version(), *packages, *numbers]))
