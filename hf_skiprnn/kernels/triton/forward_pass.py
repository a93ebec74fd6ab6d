"""The forward pass: compute a scan's results from checked tensors with one launch of a Triton kernel."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from hf_skiprnn.model.cells_skip_rnn import CELLS, state_dtype
from hf_skiprnn.model.event_forward_skip_rnn import Timeline

from .buffers import check, empty_results
from .kernels_common import Form, Scratch, States, Weights, form_name
from .kernels_forward import Results, Rows, resident_forward, streamed_forward
from .tiling import INLINE_INPUTS, LANGUAGE, Tiling, multiprocessors, precision, tiling


def stacked(weights: Sequence[Tensor], index: int, *shape: int) -> Tensor:
    """Return weight `index` of every layer, [L, ...]; zeros for a layer without it."""
    parts = [w if w.numel() else w.new_zeros(shape) for w in weights[index::4]]
    return parts[0].contiguous().unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def kernel_weights(weights: Sequence[Tensor], gate: Sequence[Tensor], cell: str, inline: bool) -> Weights:
    """Return the weights in the form that kernels use. `inline`: the kernel computes the input products too."""
    units = weights[1].shape[1]
    outputs = CELLS[cell].num_gates * units
    return Weights(
        weights[0].contiguous() if inline else None,
        stacked(weights, 1, outputs, units),
        stacked(weights[4:], 0, outputs, units) if len(weights) > 4 else None,
        stacked(weights, 2, outputs),
        stacked(weights, 3, units) if cell == "gru_reset_after" else None,
        *([part.contiguous() for part in gate] or (None, None)),
    )


def form_of(cut: Tiling, weights: Sequence[Tensor], cell: str, keep: bool) -> Form:
    """Return the constants for which a kernel is compiled."""
    operand = weights[1].dtype
    types = (LANGUAGE[state_dtype(weights[1])], LANGUAGE[operand], precision(operand))
    sizes = (weights[1].shape[1], len(weights) // 4, cell, CELLS[cell].num_gates, keep)
    return Form(*map(triton.language.constexpr, (*sizes, *types, *cut[1:])))


def cut_of(weights: Sequence[Tensor], cell: str, batch: int) -> Tiling:
    """Return how a scan of B rows is divided into programs on the weights' device."""
    units, layers, dtype = weights[1].shape[1], len(weights) // 4, weights[1].dtype
    return tiling(batch, units, CELLS[cell].num_gates, layers, dtype, multiprocessors(weights[1].device))


def partial_sums(cut: Tiling, blocks: int, sums: int, like: Tensor) -> Tensor | None:
    """Return memory for partial sums over units, if several programs share the units of a row block; else None."""
    return like.new_empty(blocks, 2, sums, cut.split, cut.block_rows) if cut.split > 1 else None


def row_order(time: Timeline, forced: Tensor | None) -> Tensor:
    """Return the rows [B] sorted by the largest possible number of updates, so that rows of a block end together.

    The number of updates of a learned gate is not known in advance.
    """
    if forced is not None and time.mask is not None:
        forced = forced & time.mask
    return (time.lengths if forced is None else forced.sum(1)).argsort(descending=True, stable=True)


def forward(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
    sequence: bool,
    record: bool,
) -> list[Tensor]:
    """Run a forward call: fill and return `empty_results`."""
    check(inputs, weights, gate, state, mask, forced, cell)
    results = empty_results(inputs, weights, state, sequence, record)
    held, h, c, last_increment, last_steps, num_updates, gates, all_h, all_c, increments = results
    (batch, steps), (layers, _, units) = inputs.shape[:2], h.shape
    h0, c0, increment, steps_since_update = state
    assert h0 is not None
    assert increment is not None
    assert steps_since_update is not None
    keep = record or sequence
    slots = steps + 1 if keep else 3
    states = States(_with_first(h0, all_h, slots), None if c0 is None else _with_first(c0, all_c, slots))
    counts = torch.zeros(batch, dtype=torch.int32, device=inputs.device)
    gates.zero_()
    if record:
        increments[:, 0] = increment
    if batch and steps:
        time = Timeline(batch, steps, mask, forced, inputs.device)
        written = Results(increments if record else None, last_increment, last_steps, counts)
        launch(inputs, weights, gate, (increment, steps_since_update), time, forced, cell, states, written, gates, keep)
    else:
        last_increment.copy_(increment)
        last_steps.copy_(steps_since_update)
    num_updates.copy_(counts)
    last = torch.where(counts > 0, 1 + (counts - 1) % max(1, slots - 1), 0).long()
    last = last.view(1, batch, 1, 1).expand(layers, -1, -1, units)
    h.copy_(states.h.gather(2, last).squeeze(2))
    if states.c is not None:
        c.copy_(states.c.gather(2, last).squeeze(2))
    if sequence:
        index = gates.cumsum(1).long().unsqueeze(-1).expand(-1, -1, units)
        torch.gather(states.h[-1], 1, index, out=held)
    return results


def _with_first(first: Tensor, kept: Tensor, slots: int) -> Tensor:
    """Return memory for states [L, B, S, H] that holds the initial one [L, B, H]: `kept`, if that is not empty."""
    states = kept if kept.numel() else first.new_empty(*first.shape[:2], slots, first.shape[2])
    states[:, :, 0] = first
    return states


def launch(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    clock: Sequence[Tensor],
    time: Timeline,
    forced: Tensor | None,
    cell: str,
    states: States,
    results: Results,
    gates: Tensor,
    keep: bool,
) -> None:
    """Launch the resident or the streamed kernel once; it writes `states`, `results` and `gates`, which are zero."""
    batch, steps, width = inputs.shape
    inline = width <= INLINE_INPUTS
    of_kernel = kernel_weights(weights, gate, cell, inline)
    # Wide inputs are multiplied before the scan, at skipped steps too, because only the scan knows which steps are
    # skipped. In the scan every update would fetch all of W_ih for each block of rows. By calculation, not measurement,
    # that takes longer than one product of all steps if at least a tenth of the steps are updates.
    # The kernel adds the bias, because half precision would round the sum.
    read = inputs.contiguous() if inline else F.linear(inputs, weights[0])
    source = Rows(
        read,
        row_order(time, forced),
        time.lengths.int(),
        None if time.positions is None else time.positions.int().contiguous(),
        None if time.planned is None else time.planned.int().contiguous(),
        *(part.contiguous() for part in clock),
    )
    cut = cut_of(weights, cell, batch)
    blocks, h = triton.cdiv(batch, cut.rows), states.h
    common, form = (source, of_kernel, states, results, gates), form_of(cut, weights, cell, keep)
    sizes = (batch, steps, width, h.shape[2], form, form_name(form))
    if cut.resident:
        resident_forward[(blocks,)](*common, *sizes, **cut.options())
        return
    reset = h.new_empty(batch, h.shape[3]) if cell == "gru" else None
    scratch = Scratch(reset, partial_sums(cut, blocks, 1, h))
    arrived = torch.zeros(blocks, dtype=torch.int32, device=h.device)
    streamed_forward[(blocks, cut.split)](*common, scratch, arrived, *sizes, **cut.options())
