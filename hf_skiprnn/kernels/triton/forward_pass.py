"""Calls of the Triton kernels on checked tensors: the forward scan. The backward pass is in `triton_reverse`."""

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from hf_skiprnn.model.cells_skip_rnn import CELLS, state_dtype
from hf_skiprnn.model.event_forward_skip_rnn import Timeline

from .buffers import Optional, check, empty_results
from .kernels_forward import resident_forward, streamed_forward
from .tiling import INLINE_INPUTS, LANGUAGE, Choice, Tiling, multiprocessors, precision, tiling
from .tuning import choose, trial

GROUPS_ROWS = True  # rows with like numbers of updates side by side; False, as they came: the benchmark compares


def stacked(weights: Sequence[Tensor], index: int, *shape: int) -> Tensor:
    """Weight `index` of every layer: [L, ...]; zero where a layer has none."""
    parts = [w if w.numel() else w.new_zeros(shape) for w in weights[index::4]]
    return parts[0].contiguous().unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def by_length(updates: Tensor) -> Tensor:
    """Rows [B] by a bound on their updates, most first: a block of rows ends with its slowest."""
    return updates.argsort(descending=True) if GROUPS_ROWS else torch.arange(len(updates), device=updates.device)


def row_order(time: Timeline, forced: Optional) -> Tensor:
    """`by_length`, by how many updates rows can have; of a learned gate's nothing is known beforehand."""
    if forced is not None:
        return by_length(forced.sum(1) if time.mask is None else (forced & time.mask).sum(1))
    if time.mask is not None:
        return by_length(time.lengths)
    return torch.arange(time.batch, device=time.lengths.device)


def forward(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Optional],
    mask: Optional,
    forced: Optional,
    cell: str,
    sequence: bool,
    record: bool,
    slots: int = 0,
    choice: Choice | None = None,
) -> list[Tensor]:
    """A forward call: `empty_results`, filled; the choice is the tuned one, if none is given."""
    check(inputs, weights, gate, state, mask, forced, cell)
    results = empty_results(inputs, weights, state, sequence, record, slots)
    (batch, steps), units, layers = inputs.shape[:2], weights[1].shape[1], len(weights) // 4
    h0, c0, increment, since = state
    assert h0 is not None
    assert increment is not None
    assert since is not None
    dtype, keeps = state_dtype(weights[1]), record or sequence
    slots = results[7].shape[2] if record else steps + 1 if keeps else 2
    h = results[7] if record else h0.new_empty(layers, batch, slots, units)
    h[:, :, 0] = h0
    c = h
    if c0 is not None:
        c = results[8] if record else h0.new_empty(layers, batch, slots, units)
        c[:, :, 0] = c0
    gates = results[6].zero_()
    increments, times = results[9:11]
    counts = results[11] if record else h0.new_empty(batch, dtype=torch.int32)
    if record:
        increments[:, 0] = increment
    if not batch or not steps:
        counts.zero_()
        results[3].copy_(increment)
        results[4].copy_(since)
    else:
        time = Timeline(batch, steps, mask, forced, inputs.device)
        choice = choice or best_choice(weights, cell, inputs.shape[2])
        processors = multiprocessors(inputs.device)
        cut = tiling(batch, units, CELLS[cell].num_gates, layers, weights[1].dtype, processors, choice)
        recorded = (h, c, gates, times, increments, results[3], results[4], counts)
        launch(cut, inputs, weights, gate, increment, since, time, forced, cell, keeps, record, recorded, dtype)
    results[5].copy_(counts)
    last = (counts.long() % slots).view(1, batch, 1, 1).expand(layers, -1, -1, units)
    results[1].copy_(h.gather(2, last).squeeze(2))
    if c0 is not None:
        results[2].copy_(c.gather(2, last).squeeze(2))
    if sequence:
        held = gates.cumsum(1).long().unsqueeze(-1).expand(-1, -1, units)
        torch.gather(h[-1], 1, held, out=results[0])
    return results


def best_choice(weights: Sequence[Tensor], cell: str, width: int) -> Choice:
    """The tuned choice for layers like these."""

    def prepare() -> Callable[[Choice], object]:
        inputs, like, gate, state = trial(weights, cell, width)
        return lambda choice: forward(inputs, like, gate, state, None, None, cell, False, False, choice=choice)

    return choose("forward", weights, cell, width, prepare)


def launch(
    cut: Tiling,
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    increment: Tensor,
    since: Tensor,
    time: Timeline,
    forced: Optional,
    cell: str,
    keeps: bool,
    record: bool,
    recorded: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """One launch of the kernel that fits; results go to `recorded`."""
    (batch, steps, width), units, layers = inputs.shape, weights[1].shape[1], len(weights) // 4
    outputs = CELLS[cell].num_gates * units
    h, c, gates, times, increments, last_increment, last_since, counts = recorded
    inline = width <= INLINE_INPUTS
    bias = stacked(weights, 2, outputs)
    # Wide inputs of skipped steps are multiplied too: which are skipped is known in the scan only, where every update
    # would fetch all of W_ih for each block of rows. By arithmetic, not measured, that takes longer than one product of
    # all steps, down to a tenth of them being updates.
    read = inputs.contiguous() if inline else torch.nn.functional.linear(inputs, weights[0], bias[0])
    blocks = triton.cdiv(batch, cut.rows)
    empty = h.new_empty(1)
    kernel = resident_forward if cut.resident else streamed_forward
    kernel[(blocks, cut.split)](
        read,
        weights[0].contiguous(),
        stacked(weights, 1, outputs, units),
        stacked(weights[4:], 0, outputs, units) if layers > 1 else weights[0],
        bias,
        stacked(weights, 3, units),
        gate[0].contiguous() if gate else empty,
        gate[1].contiguous() if gate else empty,
        row_order(time, forced),
        time.lengths.int(),
        empty if time.positions is None else time.positions.int().contiguous(),
        empty if time.planned is None else time.planned.int().contiguous(),
        h,
        c,
        increment.contiguous(),
        since.contiguous(),
        gates,
        times,
        increments if record else empty,
        last_increment,
        last_since,
        counts,
        h.new_empty(batch, units) if cell == "gru" and not cut.resident else empty,
        h.new_empty(blocks, 2, cut.split, cut.block_rows) if cut.split > 1 else empty,
        torch.zeros(blocks, dtype=torch.int32, device=h.device),
        batch,
        steps,
        width,
        h.shape[2],
        H=units,
        LAYERS=layers,
        CELL=cell,
        LEARNED=bool(gate),
        PLANNED=time.planned is not None,
        MASKED=time.positions is not None,
        KEEP=keeps,
        RECORD=record,
        INLINE=inline,
        STATE=LANGUAGE[dtype],
        PRECISION=precision(weights[1].dtype),
        **cut.constants(),
        **cut.options(),
    )
