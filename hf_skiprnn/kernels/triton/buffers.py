"""What the Triton engine takes and returns: shapes and dtypes, without Triton itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_skiprnn.kernels.operands import check_operands
from hf_skiprnn.model.cells_skip_rnn import state_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHUNK_NUMBERS = 1 << 25  # in a chunk's buffers: 128 MiB of float32
SHORTEST_CHUNK = 16  # steps


def check(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
) -> None:
    """Check everything that the kernels rely on."""
    if inputs.dtype not in DTYPES:
        raise ValueError(f"Inputs and weights must be one of {', '.join(map(str, DTYPES))}; got {inputs.dtype}.")
    check_operands(inputs, weights, gate, state, mask, forced, cell, kept=state_dtype(inputs))


def empty_results(
    inputs: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor | None], sequence: bool, record: bool
) -> list[Tensor]:
    """Empty tensors for a forward call's results, and with `record` for what its backward pass needs.

    The results are held [B, T, H], h and c [L, B, H], increment, steps_since_update and num_updates [B], update_gates
    [B, T]. The records are the states before the first and after every update, h and c [L, B, T + 1, H], and the
    increments [B, T + 1]: there is memory for an update at every step, as how many there will be is not known. What is
    not asked for is empty.
    """
    (batch, steps), (layers, units) = inputs.shape[:2], (len(weights) // 4, weights[1].shape[1])
    dtype, has_c = state_dtype(inputs), state[1] is not None

    def empty(*shape: int, needed: bool = True) -> Tensor:
        return inputs.new_empty(shape if needed else (0,), dtype=dtype)

    return [
        empty(batch, steps, units, needed=sequence),
        empty(layers, batch, units),
        empty(layers, batch, units, needed=has_c),
        empty(batch),
        empty(batch),
        empty(batch),
        empty(batch, steps),
        empty(layers, batch, steps + 1, units, needed=record),
        empty(layers, batch, steps + 1, units, needed=record and has_c),
        empty(batch, steps + 1, needed=record),
    ]


def chunk_steps(batch: int, steps: int, width: int, units: int, layers: int) -> int:
    """Steps a chunk of the backward pass, from shapes alone, as the last bits of gradients depend on it.

    Its buffers have at most CHUNK_NUMBERS numbers: a step has 16 a unit and layer, and 12 of the layer at hand.
    """
    numbers = max(1, batch) * (units * (16 * layers + 12) + width)
    return max(1, min(steps, max(SHORTEST_CHUNK, CHUNK_NUMBERS // numbers)))
