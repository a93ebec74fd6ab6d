"""What is measured: accuracy, squared error, updates, and the operations that the updates cost.

Every function takes NumPy arrays and returns Python floats, so that results go straight into JSON.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

GATES_PER_CELL = {"lstm": 4, "gru": 3}
PERCENTILES = (20, 50, 80)


class RecurrentConfig(Protocol):
    """The fields of SkipRNNConfig that decide what an update costs."""

    cell_type: Any
    input_size: Any
    hidden_size: Any
    num_hidden_layers: Any


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows whose largest logit is the label; logits [N, C], labels [N] integer."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"accuracy needs logits [N, C] and labels [N]; got {logits.shape} and {labels.shape}.")
    return float(np.mean(logits.argmax(axis=1) == labels))


def mean_squared_error(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Mean of the squared difference in float64; predictions [N] or [N, 1], targets [N] or [N, 1]."""
    predictions, targets = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    if predictions.size != targets.size or predictions.shape[:1] != targets.shape[:1]:
        raise ValueError(
            f"mean_squared_error needs one prediction per target; got {predictions.shape} and {targets.shape}."
        )
    return float(np.mean((predictions.reshape(-1) - targets.reshape(-1)) ** 2))


def real_lengths(inputs: Mapping[str, Tensor]) -> Tensor:
    """Real steps of each row of a batch of model inputs: -> [B] integer.

    Where there is no `attention_mask` every step is real: T of `input_values` [B, T, I] or `input_ids` [B, T], H * W of
    `pixel_values` [B, C, H, W].
    """
    mask = inputs.get("attention_mask")
    if mask is not None:
        return (mask != 0).sum(dim=1)
    for name in ("input_values", "input_ids", "pixel_values"):
        if (value := inputs.get(name)) is not None:
            steps = value.shape[2] * value.shape[3] if name == "pixel_values" else value.shape[1]
            return torch.full((value.shape[0],), steps, dtype=torch.long, device=value.device)
    raise ValueError(f"A batch needs input_values, input_ids or pixel_values; got {sorted(inputs)}.")


def update_statistics(updates: ArrayLike, lengths: ArrayLike) -> dict[str, float]:
    """Updates per row and the share of real steps that were updates.

    updates [N], lengths [N] real steps. Returns `updates` (mean), `updates_std` (population), `updates_p20`, `_p50`,
    `_p80` over rows, and `update_rate`: all updates over all real steps.
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
    """Multiply-accumulates of a sequence with that many updates, counted as the paper's tables count FLOPs.

    One per weight of the gates' matrix products: updates * G * H * (H + I) with G = 4 (LSTM) or 3 (GRU), summed over
    the layers; biases, nonlinearities, the update gate and the classifier are left out.
    """
    gates, units = GATES_PER_CELL[config.cell_type], config.hidden_size
    inputs = [config.input_size] + [units] * (config.num_hidden_layers - 1)
    return float(updates * sum(gates * units * (units + width) for width in inputs))


def operation_counts(config: RecurrentConfig, statistics: Mapping[str, float]) -> dict[str, float]:
    """Multiply-accumulates per sequence, from update_statistics: of the updates, and of reading every real step."""
    updates, rate = statistics["updates"], statistics["update_rate"]
    every = updates / rate if rate else 0.0
    return {"read": multiply_accumulates(config, updates), "every_step": multiply_accumulates(config, every)}
