"""Render the table of the checkpoints in this repository, with the paper's numbers beside ours.

Every number comes from a results.json or a CSV file under model_cards/, or from the paper's tables. documents.py puts
the table into the README.
"""

import json
from pathlib import Path
from typing import Any

from hf_skiprnn.evaluation.paper import PublishedRow, published_rows
from hf_skiprnn.hub.card import INSTRUCTION_SETS, MAIN_METRICS, RESULTS, number, percent, published_value, speed_rows

from .tables import TABLES, Group, groups_of, line, read_table, spread


def checkpoint_folders(cards: Path) -> list[Path]:
    """Return the checkpoint folders under `cards`, sorted by name; those of large checkpoints hold no weights."""
    return sorted(path.parent for path in cards.glob("*/config.json"))


def readme_table(cards: Path) -> str:
    """Render the table in Markdown, one line for each checkpoint."""
    head = ["checkpoint in `model_cards/`", "test split", "steps read", "over seeds", "the paper's (4 seeds)"]
    head += ["inference, times faster", "training step, times faster"]
    rows = [line(checkpoint_cells(cards, folder)) for folder in checkpoint_folders(cards)]
    return "\n".join([line(head), line(["---"] * len(head)), *rows])


def checkpoint_cells(cards: Path, folder: Path) -> list[str]:
    """Return the cells of a checkpoint's line."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    test, paper = results["metrics"]["test"], paper_row(results)
    steps = round(test["updates"] / test["update_rate"])
    return [
        f"[{folder.name}](model_cards/{folder.name})",
        quality(test),
        f"{number(test['updates'])} of {steps} ({percent(test['update_rate'])})",
        over_seeds(group_of(cards, results)),
        "" if paper is None else f"{published_value(paper)}, {number(paper.updates)} steps ({paper.model})",
        *speed_ups(cards, folder.name),
    ]


def speed_ups(cards: Path, name: str) -> list[str]:
    """Return the speed-ups of the whole model over nn.LSTM or nn.GRU, in inference and in training.

    They are measured on one thread, at the share of steps that the model reads (scripts/benchmark.py --checkpoints).
    Each names its instruction set. "" stands for a speed-up that was not measured.
    """
    found: dict[str, list[str]] = {"inference": [], "training": []}
    for row in speed_rows(cards / "speed", name):
        found[row["mode"]].append(f"{row['native_over_this']:.1f}x ({INSTRUCTION_SETS[row['instruction_set']]})")
    return [", ".join(texts) for texts in found.values()]


def quality(test: dict[str, float]) -> str:
    """Return the main metric on the test split; for tasks that can be solved, "solved" or "not solved" before it."""
    metric = next(name for name in MAIN_METRICS if name in test)
    solved = {None: "", 0.0: "not solved, ", 1.0: "solved, "}[test.get("solved")]
    return solved + (percent(test[metric]) if metric == "accuracy" else f"{metric} {number(test[metric])}")


def paper_row(results: dict[str, Any]) -> PublishedRow | None:
    """Return the paper's row of the same task, options and cell that reads the fewest steps, or None."""
    rows = published_rows(results["task"], results["model"]["cell_type"], results["task_options"])
    return min((row for row in rows if row.gate == "learned"), key=lambda row: row.updates, default=None)


def group_of(cards: Path, results: dict[str, Any]) -> Group | None:
    """Return the group in the stored tables that holds this run and its other seeds; None if no table holds the run."""
    for table, (task, columns) in TABLES.items():
        for options in columns if task == results["task"] else ():
            for group in groups_of(read_table(cards, table), options):
                if any(run["finished"] == results["finished"] for run in group.runs):
                    return group
    return None


def over_seeds(group: Group | None) -> str:
    """Return mean and standard deviation over several seeds; "" if there is only one."""
    if group is None or len(group.runs) < 2:
        return ""
    test = group.runs[0]["metrics"]["test"]
    solved = f"{sum(map(bool, group.values('solved')))} of {len(group.runs)} solved" if "solved" in test else ""
    told = solved or f"{len(group.runs)} seeds: {spread(group.values('accuracy'))}"
    return f"{told}, {spread(group.values('updates'))} steps"
