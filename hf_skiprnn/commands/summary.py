"""The summary printed after training: quality of the model, share of steps read, its folder and the next commands."""

from pathlib import Path
from typing import Any

import numpy as np

from hf_skiprnn.hub.card import MAIN_METRICS, number, percent

# The gate has learned nothing below CLOSED updates a row, or above the share of steps OPEN.
CLOSED, OPEN = 1.5, 0.95


class LabelWatch:
    """A task's compute_metrics that also keeps the labels of the last evaluation, to compute a trivial baseline.

    Args:
        compute_metrics: the task's function; called with every EvalPrediction.
    """

    def __init__(self, compute_metrics: Any) -> None:
        self.compute_metrics = compute_metrics
        self.labels = np.empty(0)

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Return the task's metrics."""
        self.labels = np.asarray(prediction.label_ids)
        return self.compute_metrics(prediction)

    def guess(self) -> tuple[str, float] | None:
        """Return (metric, value) of the baseline that ignores its input: the most frequent class, or the mean."""
        if self.labels.ndim == 1 and len(self.labels) and np.issubdtype(self.labels.dtype, np.integer):
            return "accuracy", float(np.unique(self.labels, return_counts=True)[1].max() / len(self.labels))
        if self.labels.ndim <= 2 and self.labels.size and np.issubdtype(self.labels.dtype, np.floating):
            return "mse", float(self.labels.var(axis=0).mean())
        return None


def summary(results: dict[str, Any], guess: tuple[str, float] | None, folder: Path, picture: str) -> str:
    """Return the lines printed at the end of a training.

    Args:
        results: content of results.json.
        guess: what LabelWatch.guess returned.
        folder: the model's folder.
        picture: path of the picture of the steps that were read, or how to get it.
    """
    test, repo = results["metrics"]["test"], f"YOUR_NAME/{folder.name}"
    lines = [*quality_lines(test, guess), reading_line(test), *gate_lines(results), f"folder: {folder}"]
    lines += [f"picture: {picture}", "next:"]
    lines += [f"  hf-skiprnn evaluate {folder}", f"  hf-skiprnn publish {folder} {repo} --dry-run"]
    return "\n".join(lines)


def quality_lines(test: dict[str, float], guess: tuple[str, float] | None) -> list[str]:
    """Return the main metric on the test split beside that of the trivial baseline."""
    name = next((name for name in MAIN_METRICS if name in test), None)
    if name is None:
        return [f"test loss: {number(test['loss'])}"]
    if guess is None or guess[0] != name:
        return [f"test {name}: {number(test[name])}"]
    what = "the most frequent class" if name == "accuracy" else "the mean"
    return [f"test {name}: {number(test[name])} (always guessing {what}: {number(guess[1])})"]


def reading_line(test: dict[str, float]) -> str:
    """Return a line with the number of steps read."""
    return f"steps read: {number(test['updates'])} of {number(test['updates'] / max(test['update_rate'], 1e-9))} a row"


def gate_lines(results: dict[str, Any]) -> list[str]:
    """Return a warning and a remedy if a learned gate has closed or reads nearly every step.

    If a share was asked for, RateController says whether it was reached.
    """
    test = results["metrics"]["test"]
    if results["model"]["gate"] != "learned" or results.get("steering"):
        return []
    line = ""
    if test["updates"] < CLOSED:
        line = (
            "The gate has closed: only about one step of a row is read. Lower --budget_weight, let it grow with "
            "--budget_warmup_steps 0.3, or ask for a share with --target_update_rate 0.3."
        )
    elif test["update_rate"] > OPEN:
        line = (
            f"The gate hardly skips: {percent(test['update_rate'])} of the steps are read. Raise --budget_weight, or "
            "ask for a share with --target_update_rate 0.3."
        )
    return [line] if line else []
