"""A line of tests/survival/matrix.csv: python tests/matrix/row.py NAME LOG_OF_PYTEST."""

import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    name, log = sys.argv[1:]
    summary = Path(log).read_text().strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped)", summary)}
    packages = [version(package) for package in ("torch", "transformers", "huggingface_hub", "datasets")]
    numbers = [str(counts.get(word, 0)) for word in ("passed", "failed", "skipped")]
    print(",".join([name, platform.python_version(), *packages, *numbers]))
