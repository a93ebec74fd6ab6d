"""Render Markdown tables of learned gates beside baselines (every step, random skips, strides), from model_cards/.

The runs were stored by `python -m scripts.paper.pareto` and `python -m scripts.paper.learn_to_skip`.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from statistics import fmean
from typing import Any

from hf_skiprnn.hub.card import RESULTS, number, percent
from scripts.benchmarks import gates

from .speed_tables import table

GATES = {
    "learned": "Skip {cell}",
    "always": "{cell}, every step",
    "random": "{cell}, random skips",
    "strided": "{cell}, one step in {stride}",
}
COLUMNS = ["what", "run", "test accuracy", "steps read", "share of steps", "optimizer steps", "started from", "commit"]


def pareto_table(cards: Path, folder: str) -> str:
    """Render the runs of a folder that scripts/paper/pareto.py wrote, sorted by the share of steps read."""
    runs = read(cards / folder / RESULTS).items()
    lines = [run_cells(name, run) for name, run in sorted(runs, key=lambda item: share_of(item[1]))]
    return table(COLUMNS, lines)


def gates_report(cards: Path) -> str:
    """Render the runs of scripts/benchmarks/gates.py: means and standard deviations over seeds, and differences."""
    rows = gate_runs(cards)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{gates.report(rows)}\n\nCommits: {commits}."


def gate_differences(cards: Path) -> str:
    """Render the differences between the models of scripts/benchmarks/gates.py, for the tasks with a stride."""
    rows = gate_runs(cards)
    compared = {row["task"] for row in rows if row["kind"] == "strided"}
    return "\n".join(gates.verdicts([row for row in rows if row["task"] in compared]))


def gates_summary(cards: Path, share: float = 0.2) -> str:
    """Render mean test accuracies: a line for learned gates, strides and every step, a column for each task."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in gate_runs(cards):
        if row["metric"] == "accuracy" and (row["kind"] == "plain" or row["share"] == share):
            values.setdefault((row["task"], row["kind"]), []).append(row["value"])
    tasks = dict.fromkeys(task for task, kind in values if kind == "strided")
    names = {"learned": "Skip LSTM", "strided": f"LSTM, every {round(1 / share)}th step", "plain": "LSTM, every step"}

    def cells(kind: str) -> list[str]:
        return [f"{fmean(found):.1%}" if (found := values.get((task, kind))) else "-" for task in tasks]

    return table(["test accuracy", *tasks], [[name, *cells(kind)] for kind, name in names.items()])


def gate_runs(cards: Path) -> list[dict[str, Any]]:
    """Return the stored rows of scripts/benchmarks/gates.py."""
    rows: list[dict[str, Any]] = json.loads((cards / "gates" / RESULTS).read_text(encoding="utf-8"))
    return rows


def checkpoint_table(cards: Path, folder: str) -> str:
    """Render the result of one checkpoint, in the columns of `pareto_table`."""
    return table(COLUMNS, [run_cells(folder, read(cards / folder / RESULTS))])


def run_cells(name: str, run: dict[str, Any]) -> list[str]:
    """Return the cells of a run's line."""
    model, test = run["model"], run["metrics"]["test"]
    what = GATES[model["gate"]].format(cell=model["cell_type"].upper(), stride=model["stride"])
    read = [number(test["updates"]), percent(test["update_rate"])]
    start = re.search(r"--model_name_or_path[ =](\S+)", run.get("command", ""))
    training = [str(run["train"]["steps"]), PurePath(start[1]).name if start else ""]
    return [what, name, percent(test["accuracy"]), *read, *training, run["commit"]]


def share_of(run: dict[str, Any]) -> float:
    """Return the share of steps that a run reads on its test split."""
    return float(run["metrics"]["test"]["update_rate"])


def learned_to_skip(cards: Path) -> str:
    """Render the results of an nn.LSTM before and after it learns to skip (scripts/paper/learn_to_skip.py)."""
    found = read(cards / "imdb-learned-to-skip" / "learned-to-skip.json")
    names = {
        "before": "the trained nn.LSTM",
        "not fine-tuned": "with a gate, before fine-tuning",
        "after": "with a gate, fine-tuned",
        "strided": "with a stride, fine-tuned",
    }
    lines = [point_cells(text, found[name]) for name, text in names.items()]
    return f"{table(['model', 'test accuracy', 'steps read', 'share of steps'], lines)}\n\nCommit: {found['commit']}."


def gate_shifts(cards: Path) -> str:
    """Render the results of the same model at several gate shifts (scripts/evaluate.py --gate_shifts)."""
    points: Iterable[dict[str, float]] = read(cards / "imdb-learned-to-skip" / "gate-shifts.json")["operating_points"]
    lines = [point_cells(f"{point['gate_shift']:+g}", point) for point in points]
    return table(["gate shift", "test accuracy", "steps read", "share of steps"], lines)


def point_cells(name: str, point: dict[str, float]) -> list[str]:
    """Return the cells of a line: name, accuracy, steps read, share of steps."""
    return [name, percent(point["accuracy"]), number(point["updates"]), percent(point["update_rate"])]


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
