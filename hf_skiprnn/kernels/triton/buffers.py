"""What the Triton engine takes and returns: shapes and dtypes, without Triton itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_skiprnn.model.cells_skip_rnn import CELLS, state_dtype

Optional = Tensor | None
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def empty_results(
    inputs: Tensor, weights: Sequence[Tensor], state: Sequence[Optional], sequence: bool, record: bool, slots: int = 0
) -> list[Tensor]:
    """Tensors for a forward call's results: held, h, c, increment, since, num_updates, update_gates; and its records.

    These are the states h and c in `slots` slots a row (see `triton_forward`), the updates' increments, times and
    counts; empty unless `record`. 0 slots: T + 1, as always with `sequence`.
    """
    (batch, steps), (layers, units) = inputs.shape[:2], (len(weights) // 4, weights[1].shape[1])
    dtype = state_dtype(weights[1])
    has_c = state[1] is not None
    slots = steps + 1 if sequence or not slots else slots

    def empty(*shape: int, needed: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return inputs.new_empty(shape if needed else (0,), dtype=dtype)

    return [
        empty(batch, steps, units, needed=sequence),
        empty(layers, batch, units),
        empty(layers, batch, units, needed=has_c),
        empty(batch),
        empty(batch),
        empty(batch),
        empty(batch, steps),
        empty(layers, batch, slots, units, needed=record),
        empty(layers, batch, slots, units, needed=record and has_c),
        empty(batch, steps + 1, needed=record),
        empty(batch, steps, needed=record, dtype=torch.int32),
        empty(batch, needed=record, dtype=torch.int32),
    ]


def check(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Optional],
    mask: Optional,
    forced: Optional,
    cell: str,
) -> None:
    """Everything the kernels rely on."""
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}; got {cell!r}.")
    if inputs.dim() != 3 or inputs.shape[-1] < 1:
        raise ValueError(f"inputs must be [B, T, I] with I >= 1; got {tuple(inputs.shape)}.")
    if not weights or len(weights) % 4 or weights[1].dim() != 2 or weights[1].shape[1] < 1:
        raise ValueError(f"Four weights a layer, H >= 1, are needed; got {[tuple(w.shape) for w in weights]}.")
    if weights[1].dtype not in DTYPES:
        raise ValueError(f"Weights must be one of {', '.join(map(str, DTYPES))}; got {weights[1].dtype}.")
    (batch, steps), units, layers = inputs.shape[:2], weights[1].shape[1], len(weights) // 4
    gates, operand, kept = CELLS[cell].num_gates, weights[1].dtype, state_dtype(weights[1])

    def expect(name: str, tensor: Tensor, *shape: int, dtype: torch.dtype = operand) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != inputs.device:
            raise ValueError(
                f"{name} must be {dtype} of shape {shape} on {inputs.device}; "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}."
            )

    expect("inputs", inputs, batch, steps, inputs.shape[-1])
    for i in range(layers):
        input_weight, recurrent_weight, bias, bias_hh_n = weights[4 * i : 4 * i + 4]
        expect(f"layer {i}: weight_ih", input_weight, gates * units, units if i else inputs.shape[-1])
        expect(f"layer {i}: weight_hh", recurrent_weight, gates * units, units)
        if bias.numel():
            expect(f"layer {i}: bias", bias, gates * units)
        if bias_hh_n.numel():
            expect(f"layer {i}: bias_hh_n", bias_hh_n, units)
            if cell != "gru_reset_after":
                raise ValueError(f"layer {i}: bias_hh_n belongs to 'gru_reset_after'; the cell is {cell!r}.")
    if gate:
        expect("gate weight", gate[0], 1, units, dtype=kept)
        expect("gate bias", gate[1], 1, dtype=kept)
    h, c, increment, since = state
    if h is None or increment is None or since is None or (c is not None) != CELLS[cell].has_cell_state:
        raise ValueError(
            f"The state of a {cell!r} has h{', c' if CELLS[cell].has_cell_state else ''}, increment, steps."
        )
    for name, part in (("h", h), ("c", c)):
        if part is not None:
            expect(f"state.{name}", part, layers, batch, units, dtype=kept)
    expect("state.increment", increment, batch, dtype=kept)
    expect("state.steps_since_update", since, batch, dtype=kept)
    for name, part in (("mask", mask), ("forced_gates", forced)):
        if part is not None:
            expect(name, part, batch, steps, dtype=torch.bool)
