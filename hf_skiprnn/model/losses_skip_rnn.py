"""The losses: of a task, with checked labels, and of the budget (section 3.3)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs_skip_rnn import can_read_values

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
IGNORED = -100  # label of what does not count, as everywhere in transformers


def budget_of(config: Any, num_updates: Tensor, lengths: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the budget loss of a config; `noise` [B] is the shift of each row's gate that was drawn in training."""
    weight: float | Tensor = config.budget_weight
    target, has_targets = config.budget_target, isinstance(config.gate_noise, list)
    if noise is not None and has_targets and config.budget_loss == "rate" and target is not None and 0 < target < 1:
        rates = noisy_rates(target, noise)  # the price is one of the share's logit, so that small shares count as much
        weight = (weight + config.budget_slope * noise) * target * (1 - target) / (rates * (1 - rates))
    return budget_loss(num_updates, lengths, weight, config.budget_loss, target)


def noisy_rates(target: float, noise: Tensor) -> Tensor:
    """Return the share of steps that a row shall read whose gate is shifted by `noise`: the target's logit follows."""
    return torch.sigmoid(math.log(target / (1 - target)) + noise)


def budget_loss(
    num_updates: Tensor, lengths: Tensor, weight: float | Tensor, kind: str, target: float | None
) -> Tensor:
    """Compute the budget loss: lambda times the cost of a row's updates, mean over rows.

    Args:
        num_updates: [B], N.
        lengths: [B], real steps of each row, L.
        weight: lambda; a number, or one for each row, [B].
        kind: "cost": N; "l1": |N - target * L|; "l2": (N - target * L)^2; "rate": N / L, 0 for a row without steps.
        target: wanted share of real steps read; only "l1" and "l2" use it.

    Returns:
        A scalar, differentiable through the straight-through gate.
    """
    if kind == "rate":
        cost = num_updates / lengths.clamp(min=1)
    elif kind == "cost" or target is None:
        cost = num_updates
    else:
        excess = num_updates - target * lengths
        cost = excess.abs() if kind == "l1" else excess.square()
    return weight * cost.mean() if isinstance(weight, float | int) else (weight * cost).mean()


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: ProblemType) -> Tensor:
    """Compute the loss of a classifier of sequences, mean over rows.

    Args:
        logits: [B, C].
        labels: [B] integers in [0, C) or -100 for "single_label_classification"; [B, C] of 0 and 1 for
            "multi_label_classification", or -100; [B] (C = 1) or [B, C] numbers for "regression".
        problem_type: as in transformers.

    Raises:
        ValueError: labels of another shape or type, or out of range.
    """
    batch, classes = logits.shape
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if problem_type == "regression":
        if labels.shape not in ((batch, classes), (batch,) if classes == 1 else (batch, classes)):
            raise ValueError(
                f"Regression labels must be [B, num_labels] = {(batch, classes)}; got {tuple(labels.shape)}."
            )
        return F.mse_loss(logits, labels.to(logits.dtype).view(batch, classes))
    if problem_type == "multi_label_classification":
        _check_shape(labels, (batch, classes), "[B, num_labels]")
        losses, counts = _binary_losses(logits, labels)
        return losses.sum() / counts.sum().clamp(min=1)
    _check_shape(labels, (batch,), "[B]")
    _check_classes(labels, classes)
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def frame_loss(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the loss of a classifier of steps: mean over a row's real, labelled steps, then over rows.

    So the mean over several processes does not depend on how rows are divided among them.

    Args:
        logits: [B, T, C].
        labels: [B, T] integers in [0, C), or [B, T, C] of 0 and 1 (several labels at a step; element-wise binary
            cross-entropy, mean over classes). -100 is ignored.
        mask: [B, T] bool, real steps; None: all.

    Raises:
        ValueError: labels of another shape or type, or out of range.
    """
    batch, steps, classes = logits.shape
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if labels.dim() == 3:
        _check_shape(labels, (batch, steps, classes), "[B, T, num_labels]")
        losses, counts = _binary_losses(logits, labels)
        losses, counts = losses.sum(-1) / counts.sum(-1).clamp(min=1), counts.any(-1)
    else:
        _check_shape(labels, (batch, steps), "[B, T]")
        _check_classes(labels, classes)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.long().flatten(), ignore_index=IGNORED, reduction="none")
        losses, counts = losses.view(batch, steps), labels != IGNORED
    if mask is not None:
        counts = counts & mask
    return (losses.where(counts, 0).sum(1) / counts.sum(1).clamp(min=1)).mean()


def infer_problem_type(labels: Tensor, num_labels: int) -> ProblemType:
    """Return the problem type by transformers' rule: regression for one output, classes for integers, else several."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _binary_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each label's loss (0 if it is ignored) and whether it counts.

    Raises:
        ValueError: a label is outside of [0, 1], where the loss has no lower bound. NaN is not refused: it shows.
    """
    counts = labels != IGNORED
    if can_read_values() and bool((((labels < 0) | (labels > 1)) & counts).any()):
        wrong = labels[((labels < 0) | (labels > 1)) & counts].unique().tolist()[:5]
        raise ValueError(f"Labels of several classes at once must be in [0, 1], or {IGNORED}; got {wrong}.")
    targets = labels.to(logits.dtype).where(counts, 0)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").where(counts, 0), counts


def _check_shape(labels: Tensor, shape: tuple[int, ...], legend: str) -> None:
    if labels.shape != shape:
        raise ValueError(f"labels must be {legend} = {shape}; got {tuple(labels.shape)}.")


def _check_classes(labels: Tensor, classes: int) -> None:
    """Raise ValueError for a label out of range; on a GPU it would make all further CUDA calls fail."""
    if labels.is_floating_point():
        raise ValueError(f"Class labels must be integers; got {labels.dtype}. Use problem_type or labels.long().")
    if not can_read_values() or not labels.numel():
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
    if bool(wrong.any()):
        values = labels[wrong].unique().tolist()[:5]
        raise ValueError(f"labels must be in [0, num_labels = {classes}) or {IGNORED}; got {values}. Set num_labels.")
