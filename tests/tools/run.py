"""Run the tests with other people's tools and print a table: tool, version, what was tried, outcome.

transformers imports torchao wherever it finds it, which slows every start and prints warnings. So torchao is no part of
the environment; it lies in build/torchao, for this run alone.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "tools"
TORCHAO = ROOT / "build" / "torchao"
PACKAGES = {"offload": "accelerate", "fsdp2": "torch", "common_tests": "transformers"}  # others: as the file


class Outcomes:
    """A pytest plugin that counts the outcomes of each file."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}

    def _count(self, node: str, outcome: str) -> None:
        counts = self.counts.setdefault(Path(node.partition("::")[0]).stem, {})
        counts[outcome] = counts.get(outcome, 0) + 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        is_part = hasattr(report, "context")  # a subtest, whose test is counted
        if report.outcome != "passed" or (report.when == "call" and not is_part):
            outcome = "failed as expected" if hasattr(report, "wasxfail") and report.skipped else report.outcome
            self._count(report.nodeid, outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed" and report.nodeid:
            self._count(report.nodeid, f"all {report.outcome}")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def print_table(outcomes: Outcomes) -> None:
    rows = [("tool", "version", "what was tried", "outcome")]
    for path in sorted(HERE.glob("*_*.py")):
        name = path.stem.removeprefix("test_")
        package = PACKAGES.get(name, name)
        tried = path.read_text().split('"""')[1].splitlines()[0]
        counts = outcomes.counts.get(path.stem, {})
        outcome = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "not run"
        rows.append((package, version_of(package), tried, outcome))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: list[str]) -> int:
    if not TORCHAO.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, "--target", TORCHAO, "torchao"], check=False)  # without it, its tests are skipped
    sys.path.append(str(TORCHAO))
    os.chdir(ROOT)
    outcomes = Outcomes()
    theirs = ["-o", "strict=false", "-r", "fExX", str(HERE / "common_tests.py")]  # they have marks of their own
    codes = [pytest.main([*paths, *arguments], plugins=[outcomes]) for paths in ([str(HERE)], theirs)]
    print_table(outcomes)
    return max(map(int, codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
