"""The short form of `make faults`: a training with random gates is killed twice and ends like an uninterrupted one."""

import csv
import subprocess
import sys
from pathlib import Path

KILLS = Path(__file__).parents[1] / "survival" / "kills.py"
PLACES = ("start", "step", "save", "evaluate", "finish", "between")


def test_a_training_that_was_killed_twice_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Weights, optimizer, logs and metrics, which depend on random gates, are equal bit for bit."""
    table = tmp_path / "kills.csv"
    command = [sys.executable, str(KILLS), "--cases", "map, random gate", "--kills", "2", "--output", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["kills"]) for row in rows) == 2
    assert all(sum(int(row[place]) for place in PLACES) == int(row["kills"]) for row in rows)
    assert {row["different"] for row in rows} == {"nothing"}
