"""Calibration: measure which share of the steps a trained model reads at which shift of its gate."""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_skiprnn.model.inputs_skip_rnn import real_lengths
from hf_skiprnn.model.operating_point_skip_rnn import shift_of_rate

WIDEST = 8.0  # shifts from -WIDEST to WIDEST are measured
COARSE = 17  # number of equally spaced shifts that are measured first
GAP = 0.05  # if two neighbouring shares differ by more (or by a fifth of the larger), the shift between is measured too
ROUNDS = 6  # rounds of halving; a limit, because shares jump where the gate goes from every second step to every step
CLOSE = 0.02  # relative difference to a share below which a shift is right
BETWEEN = 20  # number of shifts between two entries of the table that are measured if the interpolated one is not right


def calibrate(
    model: Any, batches: Iterable[Mapping[str, Any]], accelerator: Any = None, rate: float | None = None
) -> list[list[float]]:
    """Measure the share of steps read at many shifts of the gate, and keep the pairs in `config.gate_calibration`.

    `model(..., update_rate=R)` then looks up the shift at which R is read.

    Args:
        model: a Skip RNN with a learned gate, with or without a classifier.
        batches: validation rows as model inputs (labels are ignored). The model runs on them at about 30 shifts.
        accelerator: with several processes, adds up what they read.
        rate: a share that will be asked for. Between two entries of the table the share may jump up and down, mostly in
            models trained for one share. So the shift that is interpolated for `rate` is measured. If it reads another
            share, 20 shifts between the two entries are measured, and the best one becomes the entry of `rate`.

    Returns:
        Pairs [share of the steps read, shift], both increasing; they are also stored in the model's config.

    Raises:
        ValueError: there are no rows, or the model's gate is not learned.
    """
    rows = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    if not rows:
        raise ValueError("calibrate needs at least one batch of validation rows; got none.")
    if model.config.gate != "learned":
        raise ValueError(f"calibrate needs gate='learned'; this model has gate={model.config.gate!r}.")
    was_training = model.training
    model.eval()

    def measure(shift: float) -> float:
        return share_read(model, rows, shift, accelerator)

    step = 2 * WIDEST / (COARSE - 1)
    shares = {shift: measure(shift) for shift in (step * i - WIDEST for i in range(COARSE))}
    for _ in range(ROUNDS):
        known = sorted(shares.items())
        wide = [(a[0] + b[0]) / 2 for a, b in pairwise(known) if b[1] - a[1] > min(GAP, 0.2 * b[1])]
        shares |= {shift: measure(shift) for shift in wide}
    pairs: list[list[float]] = []
    for shift, share in sorted(shares.items()):
        if not pairs or share > pairs[-1][0]:
            pairs.append([share, shift])
    if rate is not None and pairs[0][0] < rate < pairs[-1][0]:
        add_measured(pairs, rate, measure)
    model.train(was_training)
    model.config.gate_calibration = pairs
    return pairs


def add_measured(pairs: list[list[float]], rate: float, measure: Callable[[float], float]) -> None:
    """Add an entry for `rate` to the table, unless the shift that is interpolated for it reads this share."""
    after = next(i for i, pair in enumerate(pairs) if pair[0] >= rate)
    (below, low), (above, high) = pairs[after - 1], pairs[after]
    shift = low + (high - low) * (rate - below) / (above - below)
    shares = {shift: measure(shift)}
    if abs(shares[shift] - rate) > CLOSE * rate:
        between = (low + (high - low) * i / (BETWEEN + 1) for i in range(1, BETWEEN + 1))
        shares |= {other: measure(other) for other in between}
    nearest = min(shares, key=lambda other: (abs(shares[other] - rate), abs(other - shift)))
    if nearest != shift:
        pairs.insert(after, [rate, nearest])


def set_update_rate(model: Any, rate: float) -> float:
    """Set the gate shift of a calibrated model so that it reads the share `rate`; return the share that was looked up.

    A rate outside the measured shares is replaced by the nearest one. Between two measured shares the shift is
    interpolated, so the share that is read may differ; `share_read` measures it. Unlike the argument `update_rate=` of
    a call, the shift is saved with the checkpoint, in `config.gate_shift`.

    Raises:
        ValueError: the model is not calibrated.
    """
    pairs = model.config.gate_calibration
    if not pairs:
        raise ValueError("set_update_rate needs a calibrated model: call calibrate(model, batches) on validation rows.")
    reachable = min(max(rate, pairs[0][0]), pairs[-1][0])
    model.set_gate_shift(float(shift_of_rate(pairs, torch.tensor([reachable], dtype=torch.float64))))
    return reachable


@torch.no_grad()
def share_read(model: Any, batches: Iterable[Mapping[str, Any]], shift: float, accelerator: Any = None) -> float:
    """Measure the share of steps that a model reads at a gate shift: the updates of all rows over their real steps.

    With several processes, an accelerator adds their updates and steps.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        parts = (model(**inputs, gate_shift=shift).num_updates, real_lengths(inputs))
        sums += torch.stack([part.sum().cpu() for part in parts])
    if accelerator is not None:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum")
    updates, steps = sums.tolist()
    return updates / max(steps, 1.0)
