"""The forward kernels: a block of rows computes all its updates in one launch, each row at its own position.

`resident_forward` is for one layer whose recurrent weights stay on chip; the state is in registers. `streamed_forward`
is for any stack: it reads weights and states through the caches. If one multiprocessor would have to read too much,
SPLIT programs share the units of a row block and wait for each other after every product.

Slot 0 of `states` [L, B, S, H] holds a row's initial state, which is not overwritten. The state after the e-th update
is in slot 1 + (e - 1) % (S - 1): with S = T + 1 every state is kept, with S = 3 the last two.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .kernels_common import (
    add_products,
    columns,
    gather,
    gru_step,
    lowest_inputs,
    lstm_step,
    meet,
    product,
    reset_bias,
    row_block,
    share,
    steps_to_update,
    sum_place,
    tile_of,
    weight_tile,
    zeros,
)
from .tiling import RESIDENT, STREAMED, tuned


class Rows(NamedTuple):
    """The inputs of a scan."""

    inputs: Tensor  # [B * T, I], or input products without the bias [B * T, G * H]
    order: Tensor  # [B], the order in which rows are assigned to blocks
    lengths: Tensor  # [B], real steps
    positions: Tensor | None  # [B, T], of the real steps; None: all are real
    planned: Tensor | None  # [B, T + 1]: for each real step, the first forced update from it on
    increment: Tensor  # [B]
    steps_since_update: Tensor  # [B]


class Results(NamedTuple):
    """The results of a scan other than the states and the gates."""

    increments: Tensor | None  # [B, T + 1], after every update; for the backward pass
    increment: Tensor  # [B], after the last update
    steps_since_update: Tensor  # [B]
    counts: Tensor  # [B], updates


@triton.jit
def next_update(source, weights, increment, steps_since_update, ran, length, rows, ok, T):
    """Return the real index of each row's first update after `ran` real steps, or at least its length: [R]."""
    if source.planned is not None:
        ran = tl.load(source.planned + rows * (T + 1) + ran, mask=ok, other=0)
    elif weights.gate is not None:
        ran += steps_to_update(increment, steps_since_update, length - ran) - 1
    return ran


@triton.jit
def start(source, weights, rows, ok, T):
    """Return each row's length and clock: increment, steps_since_update, steps run, updates, next update, is alive.

    A row is alive while it has another update.
    """
    length = tl.load(source.lengths + rows, mask=ok, other=0)
    increment = tl.load(source.increment + rows, mask=ok, other=0.0)
    steps_since_update = tl.load(source.steps_since_update + rows, mask=ok, other=0.0)
    ran = tl.zeros_like(length)
    at = next_update(source, weights, increment, steps_since_update, ran, length, rows, ok, T)
    return length, (increment, steps_since_update, ran, ran, at, ok & (at < length))


@triton.jit
def position(source, rows, at, alive, T):
    """Return the index into [B * T] of each row's real step `at`."""
    if source.positions is not None:
        at = tl.load(source.positions + rows * T + at, mask=alive, other=0)
    return rows * T + at


@triton.jit
def slot_of(event, S):
    """Return the slot of the state after `event` updates."""
    return tl.where(event > 0, 1 + (event - 1) % (S - 1), 0)


@triton.jit
def advance(source, weights, results, gates, rows, flat, event, new_increment, length, clock, writes, T):
    """Store the update `event` of the rows that are alive, find their next updates, and return the new clock."""
    increment, steps_since_update, ran, count, at, alive = clock
    increment = tl.where(alive, new_increment, increment)
    one = tl.full(flat.shape, 1, gates.dtype.element_ty)
    tl.store(gates + flat, one, mask=alive & writes)
    if results.increments is not None:
        tl.store(results.increments + rows * (T + 1) + event, increment, mask=alive & writes)
    count += alive.to(tl.int32)
    ran = tl.where(alive, at + 1, ran)
    steps_since_update = tl.where(alive, 0.0, steps_since_update)
    at = next_update(source, weights, increment, steps_since_update, ran, length, rows, alive, T)
    return increment, steps_since_update, ran, count, at, alive & (at < length)


@triton.jit
def finish(results, rows, ok, length, clock):
    """Write the rows' last increment, steps_since_update and number of updates."""
    increment, steps_since_update, ran, count, _, _ = clock
    tl.store(results.increment + rows, increment, mask=ok)
    tl.store(results.steps_since_update + rows, steps_since_update + (length - ran), mask=ok)
    tl.store(results.counts + rows, count, mask=ok)


@triton.jit
def store_state(states, place, h, c, ok):
    """Write h and, for an LSTM, c."""
    tl.store(states.h + place, h, mask=ok)
    if states.c is not None:
        tl.store(states.c + place, c, mask=ok)


@triton.jit
def resident_step(tiles, inputs, weights, flat, alive, units, h, c, I, F):
    """Return h and c after an update of all units; `tiles` holds the recurrent weights."""
    x = lowest_inputs(inputs, weights, flat, alive, units, 0, F.GATES, I, F)
    a0, a1 = x[0] + product(h, tiles[0], F), x[1] + product(h, tiles[1], F)
    if F.CELL == "lstm":
        a2 = x[2] + product(h, tiles[2], F)
        tl.debug_barrier()  # else LLVM of Triton 3.9 aborts while it vectorises exact float32 products
        h, c = lstm_step((a0, a1, a2, x[3] + product(h, tiles[3], F)), c)
    else:
        if F.CELL == "gru":
            a2 = x[2] + product(tl.sigmoid(a0) * h, tiles[2], F)
        else:
            a2 = x[2] + tl.sigmoid(a0) * (product(h, tiles[2], F) + reset_bias(weights, 0, units, F))
        h = gru_step((a0, a1, a2), h)
        c = h
    return h, c


@tuned(RESIDENT, resets=["gates"])
@triton.jit(do_not_specialize=["B", "T", "I", "S"])
def resident_forward(source, weights, states, results, gates, B, T, I, S, F, FORM: tl.constexpr):
    """Compute all updates of a block of rows: one layer, with recurrent weights on chip and the state in registers.

    `gates` [B, T] is zero before, and 1 at updates afterwards.
    """
    rows, ok = row_block(source.order, B, F)
    units, tile_ok = columns(0, F.H, ok, F)
    first = rows[:, None] * S * F.H + units[None, :]
    h = tl.load(states.h + first, mask=tile_ok, other=0.0)
    c = h
    if states.c is not None:
        c = tl.load(states.c + first, mask=tile_ok, other=0.0)
    tiles = ()
    for g in tl.static_range(F.GATES):
        tiles = tiles + (weight_tile(weights.recurrent + g * F.H * F.H, units, units, F.H, F.H),)
    if weights.gate is not None:
        w_p = tl.load(weights.gate + units, mask=units < F.H, other=0.0).to(F.STATE)[None, :]
        b_p = tl.load(weights.gate_bias).to(F.STATE)
    length, clock = start(source, weights, rows, ok, T)
    event = 0
    while tl.max(clock[5].to(tl.int32), 0) > 0:
        event += 1
        alive = clock[5]
        flat = position(source, rows, clock[4], alive, T)
        new_h, new_c = resident_step(tiles, source.inputs, weights, flat, alive, units, h, c, I, F)
        increment = tl.zeros_like(clock[0])
        if weights.gate is not None:
            increment = tl.sigmoid(tl.sum(tl.where((units < F.H)[None, :], new_c * w_p, 0.0), 1) + b_p)
        h = tl.where(alive[:, None], new_h, h)
        c = tl.where(alive[:, None], new_c, c)
        if F.KEEP:
            place = first + slot_of(event, S) * F.H
            store_state(states, place, h, c, tile_ok & alive[:, None])
        clock = advance(source, weights, results, gates, rows, flat, event, increment, length, clock, ok, T)
    finish(results, rows, ok, length, clock)
    if not F.KEEP:
        moved = tile_ok & (clock[3] > 0)[:, None]
        store_state(states, first + slot_of(clock[3], S)[:, None] * F.H, h, c, moved)


@triton.jit
def upper_inputs(weights, layer, below, alive, units, FIRST, N: tl.constexpr, F):
    """Return W_ih x + b for N gates from FIRST on, above the lowest layer; `below` points to the layer below's rows."""
    bias = weights.bias + (layer * F.GATES + FIRST) * F.H + units
    none, tiles = zeros(1, F)[0], ()
    for g in tl.static_range(N):
        tiles = tiles + (none + tl.load(bias + g * F.H, mask=units < F.H, other=0.0).to(F.STATE)[None, :],)
    return add_products(tiles, below, alive, weights.upper + ((layer - 1) * F.GATES + FIRST) * F.H * F.H, units, N, F)


@triton.jit
def layer_inputs(source, weights, layer, below, flat, alive, units, FIRST, N: tl.constexpr, I, F):
    """Return W_ih x + b for N gates from FIRST on, in any layer: a tuple of N tiles."""
    tiles = zeros(N, F)
    if layer == 0:
        tiles = lowest_inputs(source.inputs, weights, flat, alive, units, FIRST, N, I, F)
    elif weights.upper is not None:
        tiles = upper_inputs(weights, layer, below, alive, units, FIRST, N, F)
    return tiles


@triton.jit
def streamed_reset(source, weights, reset, states, layer, below, before, rows, flat, alive, I, F):
    """Write r * h of "gru" for this program's units into `reset`; the product with W_hn needs it for all units."""
    matrix = weights.recurrent + layer * F.GATES * F.H * F.H
    for first in range(tl.program_id(1) * F.BLOCK_UNITS, F.H, F.SPLIT * F.BLOCK_UNITS):
        units, tile_ok = columns(first, F.H, alive, F)
        r = layer_inputs(source, weights, layer, below, flat, alive, units, 0, 1, I, F)
        r = add_products(r, states.h + before, alive, matrix, units, 1, F)
        h = tl.load(states.h + before[:, None] + units[None, :], mask=tile_ok, other=0.0)
        tl.store(reset + tile_of(rows, units, F), tl.sigmoid(r[0]) * h, mask=tile_ok)


@triton.jit
def streamed_step(source, weights, reset, states, layer, below, before, rows, flat, alive, units, ok, I, F):
    """Return h and c after an update of one tile of a layer's units; `before`: pointer to the layer's states."""
    matrix = weights.recurrent + layer * F.GATES * F.H * F.H
    a = layer_inputs(source, weights, layer, below, flat, alive, units, 0, F.GATES, I, F)
    held = before[:, None] + units[None, :]
    if F.CELL == "lstm":
        a = add_products(a, states.h + before, alive, matrix, units, 4, F)
        h, c = lstm_step(a, tl.load(states.c + held, mask=ok, other=0.0))
    else:
        if F.CELL == "gru":
            z = add_products((a[1],), states.h + before, alive, matrix + F.H * F.H, units, 1, F)
            n = add_products((a[2],), reset + rows * F.H, alive, matrix + 2 * F.H * F.H, units, 1, F)
            a = (a[0], z[0], n[0])
        else:
            m = zeros(1, F)[0] + reset_bias(weights, layer, units, F)
            p = add_products((a[0], a[1], m), states.h + before, alive, matrix, units, 3, F)
            a = (p[0], p[1], a[2] + tl.sigmoid(p[0]) * p[2])
        h = gru_step(a, tl.load(states.h + held, mask=ok, other=0.0))
        c = h
    return h, c


@triton.jit
def streamed_layer(source, weights, reset, states, layer, below, before, after, rows, flat, alive, I, F):
    """Update this program's units of a layer; return their part of W_p top for the top layer: [R]."""
    gate_sum = tl.zeros([F.BLOCK_ROWS], F.STATE)
    for first in range(tl.program_id(1) * F.BLOCK_UNITS, F.H, F.SPLIT * F.BLOCK_UNITS):
        units, ok = columns(first, F.H, alive, F)
        h, c = streamed_step(source, weights, reset, states, layer, below, before, rows, flat, alive, units, ok, I, F)
        store_state(states, after[:, None] + units[None, :], h, c, ok)
        if weights.gate is not None:
            if layer == F.LAYERS - 1:
                w_p = tl.load(weights.gate + units, mask=units < F.H, other=0.0).to(F.STATE)[None, :]
                gate_sum += tl.sum(tl.where(ok, c * w_p, 0.0), 1)
    return gate_sum


@tuned(STREAMED, resets=["gates", "arrived"])
@triton.jit(do_not_specialize=["B", "T", "I", "S"])
def streamed_forward(source, weights, states, results, gates, scratch, arrived, B, T, I, S, F, FORM: tl.constexpr):
    """Compute all updates of a block of rows, for any stack; SPLIT programs share the units of a row block.

    `gates` [B, T] is zero before, and 1 at updates afterwards.
    """
    rows, ok = row_block(source.order, B, F)
    writes = (rows * 0 + tl.program_id(1)) == 0  # the first of the programs that share a row
    arrived += tl.program_id(0)
    visits = 0
    length, clock = start(source, weights, rows, ok, T)
    event = 0
    while tl.max(clock[5].to(tl.int32), 0) > 0:
        event += 1
        alive = clock[5]
        flat = position(source, rows, clock[4], alive, T)
        gate_sum = tl.zeros([F.BLOCK_ROWS], F.STATE)
        for layer in range(F.LAYERS):
            row = (layer * B + rows) * S
            before, after = (row + slot_of(event - 1, S)) * F.H, (row + slot_of(event, S)) * F.H
            below = states.h + ((layer * B - B + rows) * S + slot_of(event, S)) * F.H
            reset = scratch.units
            if F.CELL == "gru":
                streamed_reset(source, weights, reset, states, layer, below, before, rows, flat, alive, I, F)
                visits += 1
                meet(arrived, visits, F)
            gate_sum = streamed_layer(
                source, weights, reset, states, layer, below, before, after, rows, flat, alive, I, F
            )
            share(gate_sum, scratch.partial, sum_place(event, 0, 1, F), F)
            visits += 1
            meet(arrived, visits, F)
        increment = tl.zeros_like(clock[0])
        if weights.gate is not None:
            gate_sum = gather(gate_sum, scratch.partial, sum_place(event, 0, 1, F), F)
            increment = tl.sigmoid(gate_sum + tl.load(weights.gate_bias).to(F.STATE))
        clock = advance(source, weights, results, gates, rows, flat, event, increment, length, clock, writes, T)
    finish(results, rows, ok & writes, length, clock)
