"""Every committed number names the commit that made it: a clean commit in the history."""

import csv
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import CARDS, ROOT

from hf_skiprnn.training import provenance

LOST = "commit lost"
# Exceptions: how many numbers of a file have lost their commit, and why. Measure them again; do not add exceptions.
DIRTY = "the checkout had changes that were never committed"
REBASED = "the commit was replaced before it was pushed, and the history does not hold it"
NOT_KEPT = "the run is older than the field `commit`"
EXCEPTIONS = {
    "fsdd-pareto/results.json": (8, NOT_KEPT),
    "imdb-learned-to-skip/gate-shifts.json": (1, NOT_KEPT),
    "imdb-learned-to-skip/learned-to-skip.json": (1, NOT_KEPT),
    "skip-gru-mnist/results.json": (1, NOT_KEPT),
    "table1-adding/results.json": (2, f"{REBASED}; {NOT_KEPT}"),
    "table2-mnist/results.json": (2, NOT_KEPT),
    "table4-frequency/results.json": (7, f"{REBASED}; {DIRTY}"),
    "table5-imdb/results.json": (4, REBASED),
}


def commits_in(value: Any) -> Iterator[str]:
    """Yield the commit of every run in a JSON value; "" if a run names none."""
    if isinstance(value, dict) and ("commit" in value or "metrics" in value):
        yield value.get("commit", "")
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from commits_in(part)


def commits_of(path: Path) -> list[str]:
    """Return the commits that a file of results names."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [row.get("commit", "") for row in csv.DictReader(file)]
    return list(commits_in(json.loads(path.read_text(encoding="utf-8"))))


def result_files() -> Iterator[Path]:
    settings = ("config.json", "preprocessor_config.json")
    yield from (path for path in sorted(CARDS.rglob("*.json")) if path.name not in settings)
    yield from sorted(CARDS.rglob("*.csv"))


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(CARDS))) for path in result_files()])
def test_every_result_names_a_commit(path: Path) -> None:
    commits = Counter(commits_of(path))
    assert commits, "no run in it names a commit"
    expected, _ = EXCEPTIONS.get(path.relative_to(CARDS).as_posix(), (0, ""))
    assert commits[LOST] == expected, "numbers without a commit are exceptions, counted in EXCEPTIONS"


def test_every_commit_is_clean_and_in_the_history() -> None:
    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-c", "safe.directory=*", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    try:
        shallow = git("rev-parse", "--is-shallow-repository")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if shallow.returncode or not (ROOT / ".git").exists():
        pytest.skip(f"not a git checkout: {shallow.stderr.strip()}")
    if shallow.stdout.strip() != "false":
        pytest.skip("a shallow clone: its history is cut off")
    named = {commit: path for path in result_files() for commit in commits_of(path) if commit != LOST}
    assert len(named) > 10
    wrong = [f"{path}: {c}" for c, path in named.items() if git("merge-base", "--is-ancestor", c, "HEAD").returncode]
    assert not wrong  # "abc1234-dirty" names no commit


def test_runs_without_a_commit_are_noticed() -> None:
    runs = {"table": 1, "runs": [{"metrics": {}, "commit": "abc"}, {"metrics": {}}, {"row": {"commit": LOST}}]}
    assert list(commits_in(runs)) == ["abc", "", LOST]


def test_the_commit_is_this_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed inside another project's checkout does not name that project's commit."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "hf_skiprnn" / "training" / "provenance.py"))
    assert provenance.commit() == provenance.UNKNOWN
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "model_cards" / "speed.csv").write_text("x\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    clean = provenance.commit()
    assert len(clean) == 12
    (tmp_path / "model_cards" / "speed.csv").write_text("y\n")
    assert provenance.commit() == clean
    (tmp_path / "code.py").write_text("x = 2\n")
    assert provenance.commit() == f"{clean}-dirty"
