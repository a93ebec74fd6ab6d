"""Compute metrics: accuracy, errors, updates, and the number of operations that the updates cost.

Functions take NumPy arrays (or lists) and return Python floats, so that results can be written as JSON. scikit-learn is
imported when it is used: only the extra `train` installs it.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

GATES_PER_CELL = {"lstm": 4, "gru": 3}
PERCENTILES = (20, 50, 80)


class RecurrentConfig(Protocol):
    """The fields of SkipRNNConfig that decide how many operations an update takes."""

    cell_type: Any
    input_size: Any
    hidden_size: Any
    num_hidden_layers: Any


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Compute the share of rows whose largest logit is the label.

    Args:
        logits: [N, C].
        labels: [N] integer classes.

    Raises:
        ValueError: the shapes differ from these.
    """
    from sklearn.metrics import accuracy_score

    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"accuracy needs logits [N, C] and labels [N]; got {logits.shape} and {labels.shape}.")
    return float(accuracy_score(labels, logits.argmax(axis=1)))


def balanced_accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Compute the mean recall of the classes that occur in `labels`; logits [N, C], labels [N] integer classes."""
    from sklearn.metrics import recall_score

    # balanced_accuracy_score gives the same number, but warns of predicted classes that are in no label.
    return float(recall_score(labels, np.argmax(logits, axis=1), labels=np.unique(labels), average="macro"))


def micro_f1(logits: ArrayLike, labels: ArrayLike) -> float:
    """Compute micro-averaged F1 from logits [N, C] (above 0: the class is predicted) and labels [N, C] of 0 and 1."""
    from sklearn.metrics import f1_score

    pairs = [np.asarray(part).reshape(-1) > 0 for part in (labels, logits)]
    return float(f1_score(*pairs, zero_division=0.0))


def mean_squared_error(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Compute the mean squared difference in float64.

    Args:
        predictions: [N] or [N, C].
        targets: the same shape as predictions.

    Raises:
        ValueError: the shapes of the two differ.
    """
    from sklearn.metrics import mean_squared_error as of_columns

    return float(of_columns(*_columns("mean_squared_error", predictions, targets)))


def explained_variance(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Compute R2, the share of the targets' variance that the predictions explain; shapes as in mean_squared_error.

    Several columns are weighted by their variance. The result for a single row, which has no variance, is NaN.
    """
    from sklearn.metrics import r2_score

    targets, predictions = _columns("explained_variance", predictions, targets)
    return float("nan") if len(targets) < 2 else float(r2_score(targets, predictions, multioutput="variance_weighted"))


def _columns(name: str, predictions: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return (targets, predictions), each float64 [N, C]."""
    predictions, targets = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    if predictions.size != targets.size or predictions.shape[:1] != targets.shape[:1]:
        raise ValueError(f"{name} needs one prediction per target; got {predictions.shape} and {targets.shape}.")
    return targets.reshape(len(targets), -1), predictions.reshape(len(targets), -1)


def update_statistics(updates: ArrayLike, lengths: ArrayLike) -> dict[str, float]:
    """Compute statistics of the number of steps that the model read in each row.

    Args:
        updates: [N], updates of each row.
        lengths: [N], real steps of each row.

    Returns:
        `updates` (mean over rows), `updates_std` (population standard deviation), the percentiles `updates_p20`,
        `updates_p50` and `updates_p80`, and `update_rate`: the sum of updates over the sum of real steps.

    Raises:
        ValueError: there are no rows, or the shapes differ from these.
    """
    updates, lengths = np.asarray(updates, np.float64), np.asarray(lengths, np.float64)
    if updates.shape != lengths.shape or updates.ndim != 1 or updates.size == 0:
        raise ValueError(f"update_statistics needs updates [N] and lengths [N]; got {updates.shape}, {lengths.shape}.")
    percentiles = np.percentile(updates, PERCENTILES)
    return {
        "updates": float(updates.mean()),
        "updates_std": float(updates.std()),
        **{f"updates_p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
        "update_rate": float(updates.sum() / max(lengths.sum(), 1.0)),
    }


def multiply_accumulates(config: RecurrentConfig, updates: float) -> float:
    """Count the multiply-accumulates of a sequence with `updates` updates, as the paper's tables count FLOPs.

    Each update takes one for each weight of the cell's matrix products: updates * G * H * (H + I) with G = 4 (LSTM) or
    3 (GRU), summed over the layers. Biases, nonlinearities, the update gate and the classifier are not counted.
    """
    gates, units = GATES_PER_CELL[config.cell_type], config.hidden_size
    inputs = [config.input_size] + [units] * (config.num_hidden_layers - 1)
    return float(updates * sum(gates * units * (units + width) for width in inputs))


def operation_counts(config: RecurrentConfig, statistics: Mapping[str, float]) -> dict[str, float]:
    """Count multiply-accumulates per sequence: `read`, for the updates, and `every_step`, if every step were read.

    statistics: what update_statistics returned.
    """
    updates, rate = statistics["updates"], statistics["update_rate"]
    every = updates / rate if rate else 0.0
    return {"read": multiply_accumulates(config, updates), "every_step": multiply_accumulates(config, every)}
