"""Convert streams to named tensors, which safetensors can save, and check such tensors when they are loaded."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .cells_skip_rnn import LARGEST_COUNT, NEVER
from .outputs_skip_rnn import SkipRNNState
from .reader_skip_rnn import Reader


def pack(state: SkipRNNState, step: Tensor, wait: Tensor) -> dict[str, Tensor]:
    """Return a stream's tensors by name.

    Args:
        state: state of N rows.
        step: [N] int64, the index of each row's next step.
        wait: [N] int64, the number of steps that each row then skips.
    """
    named = state._asdict() | {"step": step, "steps_to_skip": wait}
    return {name: part.contiguous() for name, part in named.items() if part is not None}


def unpack(saved: Mapping[str, Tensor], reader: Reader) -> tuple[SkipRNNState, Tensor, Tensor]:
    """Return the arguments of `pack`.

    Raises:
        ValueError: names, shapes, types or values cannot be from a stream of this model.
    """
    wanted = {"h", "increment", "steps_since_update", "step", "steps_to_skip"}
    wanted |= {"c"} if reader.cell.has_cell_state else set()
    if set(saved) != wanted:
        raise ValueError(f"A saved stream must hold {sorted(wanted)}; got {sorted(saved)}.")
    rows = len(saved["increment"])
    for name in ("step", "steps_to_skip"):
        part = saved[name]
        if part.shape != (rows,) or part.dtype != torch.long:
            raise ValueError(
                f"A saved stream of {rows} rows needs {name} [{rows}] int64; got {tuple(part.shape)} {part.dtype}."
            )
        if bool((part < 0).any()):
            raise ValueError(f"A saved stream's {name} must be 0 or more; got {part.tolist()}.")
    moved = {name: part.to(reader.device) for name, part in saved.items()}
    given = SkipRNNState(moved["h"], moved.get("c"), moved["increment"], moved["steps_since_update"])
    state, step, wait = reader.start(given, rows), saved["step"].cpu().clone(), saved["steps_to_skip"].cpu()
    _check_waits(reader, state, step, wait)
    return state, step, wait


def _check_waits(reader: Reader, state: SkipRNNState, step: Tensor, wait: Tensor) -> None:
    """Raise ValueError if the saved steps to skip do not follow from the saved state, or a counter would overflow."""
    if reader.base.gate == "random":  # any number is possible, but a fresh row reads its first step
        limits = torch.where(state.increment == 1, 0, LARGEST_COUNT).tolist()
        wrong = [row for row, limit in enumerate(limits) if wait[row] > limit]
    else:
        limits = reader.waits(state)
        wrong = [row for row, limit in enumerate(limits) if wait[row] != limit]
    if wrong:
        row = wrong[0]
        raise ValueError(
            f"A saved stream's steps_to_skip must follow from its state: row {row} skips {limits[row]} steps; got "
            f"{int(wait[row])}. The state is of another model, or damaged."
        )
    if bool((step > NEVER // 2).any()):
        raise ValueError(f"A saved stream's step must be below {NEVER // 2}; got {step.tolist()}.")
