"""The operating point of a learned gate: a shift of the gate's bias changes how many steps each row reads.

D = sigmoid(W_p s + b_p + shift): with a shift below 0 a row reads fewer steps, above 0 more. `gate_shift` is the shift
itself. `update_rate` is the share of steps to read; its shift is looked up in `config.gate_calibration`, which holds
shares that were measured on validation rows at several shifts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cells_skip_rnn import state_dtype
from .configuration_skip_rnn import SkipRNNConfig
from .inputs_skip_rnn import can_read_values

Shift = float | Sequence[float] | Tensor


def row_shifts(
    config: SkipRNNConfig,
    batch: int,
    like: Tensor,
    gate_shift: Shift | None,
    update_rate: Shift | None,
    training: bool,
    generator: torch.Generator | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return each row's shift, and the noise in it; both [B] in the dtype and on the device of `like`.

    The shift is None if every row has the shift `config.gate_shift`. The noise is drawn in training only, from the
    uniform distribution of `config.gate_noise`; else it is None.

    Raises:
        ValueError: both arguments are given, one has a wrong shape or value, the gate is not learned, or a rate is
            given without calibration.
    """
    low, high = config.noise_range() if training else (0.0, 0.0)
    is_noisy = bool(low or high)
    if gate_shift is None and update_rate is None and not is_noisy:
        return None, None
    if config.gate != "learned":
        if gate_shift is None and update_rate is None:
            return None, None
        raise ValueError(f"gate_shift and update_rate need gate='learned'; this model has gate={config.gate!r}.")
    if gate_shift is not None and update_rate is not None:
        raise ValueError("Give gate_shift or update_rate, not both: a rate is looked up as a shift.")
    if update_rate is not None:
        shift = shift_of_rate(config.gate_calibration, _by_row("update_rate", update_rate, batch, like))
    else:
        shift = _by_row("gate_shift", config.gate_shift if gate_shift is None else gate_shift, batch, like)
    if not is_noisy:
        return shift, None
    draws = torch.rand(batch, generator=generator, device=generator.device if generator else like.device)
    noise = low + (high - low) * draws.to(like)
    return shift + noise, noise


def fixed_shifts(model: Any, batch: int, gate_shift: Shift | None, update_rate: Shift | None) -> Tensor | None:
    """Return the shifts of `row_shifts` for inference, on the model's device and in the dtype of its states."""
    weight = model.base_model.current_weight()
    like = torch.empty(0, dtype=state_dtype(weight), device=weight.device)
    return row_shifts(model.config, batch, like, gate_shift, update_rate, training=False)[0]


def stream_shift(model: Any, batch: int, gate_shift: Shift | None, update_rate: Shift | None) -> Tensor | None:
    """Return `fixed_shifts`, but one number [] where one was given: it also holds for rows that join later."""
    given = update_rate if gate_shift is None else gate_shift
    if given is None or np.ndim(given):
        return fixed_shifts(model, batch, gate_shift, update_rate)
    shift = fixed_shifts(model, 1, gate_shift, update_rate)
    return None if shift is None else shift[0]


def _by_row(name: str, value: Shift, batch: int, like: Tensor) -> Tensor:
    """Return [B] numbers from one number, or from one for each row; they must be finite."""
    try:
        rows = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number, or [B] = ({batch},) numbers; got {value!r}.") from error
    if rows.shape not in ((), (batch,)):
        raise ValueError(f"{name} must be a number, or [B] = ({batch},) numbers; got shape {tuple(rows.shape)}.")
    if can_read_values() and not bool(rows.isfinite().all()):
        raise ValueError(f"{name} must be finite; got {rows.tolist()}.")
    return rows.expand(batch)


def shift_of_rate(calibration: Sequence[Sequence[float]] | None, rate: Tensor) -> Tensor:
    """Return the shifts at which the shares `rate` are read, by linear interpolation in the calibration.

    Args:
        calibration: (share of steps read, shift) pairs, both increasing; see `SkipRNNConfig.gate_calibration`.
        rate: [B], shares of steps to read.

    Raises:
        ValueError: there is no calibration, or a rate is outside the measured range.
    """
    if not calibration:
        raise ValueError(
            "update_rate needs a calibrated model: call hf_skiprnn.training.calibrate(model, batches) on validation "
            "rows, or give gate_shift."
        )
    shares, shifts = torch.tensor(calibration, dtype=rate.dtype, device=rate.device).T.contiguous().unbind()
    low, high = calibration[0][0], calibration[-1][0]
    slack = 1e-6  # a share of the table, rounded to the precision of the model
    if can_read_values() and bool(((rate < low - slack) | (rate > high + slack)).any()):
        raise ValueError(
            f"update_rate must lie in what was measured, {low:.3f} to {high:.3f}; got {float(rate.min()):.3f} to "
            f"{float(rate.max()):.3f}. Calibrate over "
            "a wider range of shifts for more."
        )
    if len(shares) == 1:
        return shifts.expand_as(rate)
    rate = rate.clamp(low, high)
    after = torch.searchsorted(shares, rate.contiguous()).clamp(1, len(shares) - 1)
    weight = (rate - shares[after - 1]) / (shares[after] - shares[after - 1])
    return torch.lerp(shifts[after - 1], shifts[after], weight)
