"""The backward kernels: they go from update to update, latest first, each row at its own position; one launch a chunk.

Everything that need not be sequential is computed before (kernels_skipped.py), or after from the cotangents of the
pre-activations that these kernels write (backward_pass.py). `resident_backward` and `streamed_backward` correspond to
the forward kernels.

`index` counts the runs of a chunk: run `index` (0 .. C) begins after the update at the chunk's step index - 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .kernels_common import (
    add_transposed,
    columns,
    gather,
    gru_backward,
    lstm_backward,
    meet,
    product,
    row_block,
    share,
    sum_place,
    tile_of,
    transposed_tile,
)
from .tiling import RESIDENT, STREAMED, tuned


class Chunk(NamedTuple):
    """The states and activations at a chunk's steps; N = B * C."""

    order: Tensor  # [B], the order in which rows are assigned to blocks
    previous: Tensor  # [B, C + 1], the latest run that begins at or before each place
    h: Tensor  # [L, N, H], before every step
    new_h: Tensor  # [L, N, H], after it, as if it were an update; and so the following
    c: Tensor | None
    new_c: Tensor | None
    activations: Tensor  # [L, 4, N, H], i f g o; r z n, and W_hn h + b_hn of "gru_reset_after"


class Gradients(NamedTuple):
    """The cotangents that a chunk's kernel writes at updates; they are zero elsewhere."""

    inputs: Tensor  # [L, N, G * H], cotangent of the input product
    recurrent: Tensor | None  # [L, N, H], cotangent of the recurrent product's n, for "gru_reset_after"
    gate: Tensor | None  # [N], cotangent of a learned gate's pre-activation W_p top + b_p


@triton.jit
def through_run(runs, run, alive, q, d, of_q, of_d):
    """Return (g_q, g_D) before a run of skipped steps, from those after it and the state's cotangent: [R] each."""
    m = runs.matrix + run * 4
    m00, m01 = tl.load(m, mask=alive, other=1.0), tl.load(m + 1, mask=alive, other=0.0)
    m10, m11 = tl.load(m + 2, mask=alive, other=0.0), tl.load(m + 3, mask=alive, other=1.0)
    new_q = m00 * q + m01 * d + tl.load(runs.constant + run * 2, mask=alive, other=0.0) + of_q
    new_d = m10 * q + m11 * d + tl.load(runs.constant + run * 2 + 1, mask=alive, other=0.0) + of_d
    return tl.where(alive, new_q, q), tl.where(alive, new_d, d)


@triton.jit
def through_gate(steps, step, moves, q, d, of_state):
    """Return w g_u at an update, and the cotangent of its gate's pre-activation W_p top + b_p: [R] each."""
    now = tl.load(steps.new_increment + step, mask=moves, other=0.0)
    before = tl.load(steps.increment + step, mask=moves, other=0.0)
    r = tl.load(steps.grad_gates + step, mask=moves, other=0.0)
    grad_u = r + of_state + d * (now - before) - q * tl.load(steps.update_prob + step, mask=moves, other=0.0)
    return grad_u * tl.load(steps.slope + step, mask=moves, other=0.0), d * now * (1 - now)


@triton.jit
def through_sums(by, g, run_tile, copy, ok):
    """Return the parts of g_q and g_D from one tile of the state's cotangent g: [R] each."""
    of_q = tl.sum(g * tl.load(by + run_tile, mask=ok, other=0.0), 1)
    return of_q, tl.sum(g * tl.load(by + copy + run_tile, mask=ok, other=0.0), 1)


@triton.jit
def of_change(old, new, g, tile, ok):
    """Return <g, S(s, x) - s> over one tile: [R]."""
    return tl.sum(g * (tl.load(new + tile, mask=ok, other=0.0) - tl.load(old + tile, mask=ok, other=0.0)), 1)


@triton.jit
def load_activations(chunk, layer, tile, ok, N, F):
    """Load the four activations of a tile; the fourth is not used for "gru"."""
    first = chunk.activations + layer * 3 * N * F.H + tile  # `tile` has passed `layer` times N * H
    a = ()
    for g in tl.static_range(4):
        a = a + (tl.load(first + g * N * F.H, mask=ok, other=0.0),)
    return a


@triton.jit
def store_gradient(pointer, value, ok):
    """Store a gradient in the weights' precision."""
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=ok)


@triton.jit
def resident_cell(tiles, chunk, gradients, gh, gc, into_gate, n, units, ok, B, C, F):
    """Go back through an update of all units; return the cotangents of the previous h and c."""
    N = B.to(tl.int64) * C
    tile = tile_of(n, units, F)
    a = load_activations(chunk, 0, tile, ok, N, F)
    out = gradients.inputs + n[:, None] * (F.GATES * F.H) + units[None, :]
    if F.CELL == "lstm":
        c_new, c_old = tl.load(chunk.new_c + tile, mask=ok, other=0.0), tl.load(chunk.c + tile, mask=ok, other=0.0)
        d, gc = lstm_backward(gh, gc + into_gate, a, c_new, c_old)
        gh = product(d[0], tiles[0], F) + product(d[1], tiles[1], F)
        gh += product(d[2], tiles[2], F) + product(d[3], tiles[3], F)
        store_gradient(out + 3 * F.H, d[3], ok)
    else:
        h_old = tl.load(chunk.h + tile, mask=ok, other=0.0)
        grad = gh + into_gate
        d1, d2 = gru_backward(grad, a[1], a[2], h_old)
        if F.CELL == "gru":
            of_reset = product(d2, tiles[2], F)
            d = (of_reset * h_old * a[0] * (1 - a[0]), d1, d2)
            gh = grad * a[1] + of_reset * a[0]
        else:
            d = (d2 * a[3] * a[0] * (1 - a[0]), d1, d2)
            gh = grad * a[1] + product(d2 * a[0], tiles[2], F)
            store_gradient(gradients.recurrent + tile, d2 * a[0], ok)
        gh += product(d[0], tiles[0], F) + product(d1, tiles[1], F)
        gc = gh
    for g in tl.static_range(3):
        store_gradient(out + g * F.H, d[g], ok)
    return gh, gc


@tuned(RESIDENT, restores=["carry", "clock"])
@triton.jit(do_not_specialize=["B", "T", "C", "first_step"])
def resident_backward(
    chunk,
    weights,
    steps,
    runs,
    gradients,
    carry,  # [1 or 2, L, B, H], cotangents of h and c, in and out
    clock,  # [2, B], of the accumulator and the increment, in and out
    B,
    T,
    C,
    first_step,
    F,
    FORM: tl.constexpr,
):
    """Process a chunk of a block of rows: one layer, with its recurrent weights on chip and cotangents in registers."""
    rows, ok = row_block(chunk.order, B, F)
    units, carry_ok = columns(0, F.H, ok, F)
    carried = tile_of(rows, units, F)
    gh = tl.load(carry + carried, mask=carry_ok, other=0.0)
    gc = gh
    if F.CELL == "lstm":
        gc = tl.load(carry + B * F.H + carried, mask=carry_ok, other=0.0)
    q, d = tl.load(clock + rows, mask=ok, other=0.0), tl.load(clock + B + rows, mask=ok, other=0.0)
    tiles = ()
    for g in tl.static_range(F.GATES):
        tiles = tiles + (transposed_tile(weights.recurrent + g * F.H * F.H, units, units, F.H, F.H),)
    copy = B.to(tl.int64) * (C + 1) * F.H  # from by_h of g_q to that of g_D
    into_gate = tl.zeros([F.BLOCK_ROWS, F.BLOCK_UNITS], F.STATE)
    if weights.gate is not None:
        w_p = tl.load(weights.gate + units, mask=units < F.H, other=0.0).to(F.STATE)[None, :]
    index = tl.load(chunk.previous + rows * (C + 1) + C, mask=ok, other=0)
    alive = ok
    while tl.max(alive.to(tl.int32), 0) > 0:
        run = rows * (C + 1) + index
        run_tile, run_ok = tile_of(run, units, F), alive[:, None] & carry_ok
        if weights.gate is not None:
            of_q, of_d = through_sums(runs.by_h, gh, run_tile, copy, run_ok)
            if F.CELL == "lstm":
                more_q, more_d = through_sums(runs.by_c, gc, run_tile, copy, run_ok)
                of_q, of_d = of_q + more_q, of_d + more_d
            q, d = through_run(runs, run, alive, q, d, of_q, of_d)
        if runs.output_sum is not None:
            gh += tl.load(runs.output_sum + run_tile, mask=run_ok, other=0.0)
        # The update after which the run begins.
        moves = alive & (index > 0)
        n = rows * C + index - 1
        tile, tile_ok = tile_of(n, units, F), moves[:, None] & carry_ok
        grad_u = tl.zeros_like(q)
        if weights.gate is not None:
            of_state = of_change(chunk.h, chunk.new_h, gh, tile, tile_ok)
            if F.CELL == "lstm":
                of_state += of_change(chunk.c, chunk.new_c, gc, tile, tile_ok)
            step = rows * T + first_step + index - 1
            grad_u, grad_z = through_gate(steps, step, moves, q, d, of_state)
            tl.store(gradients.gate + n, grad_z, mask=moves)
            into_gate = grad_z[:, None] * w_p
        q, d = tl.where(moves, grad_u, q), tl.where(moves, grad_u, d)
        old_gh, old_gc = resident_cell(tiles, chunk, gradients, gh, gc, into_gate, n, units, tile_ok, B, C, F)
        gh, gc = tl.where(moves[:, None], old_gh, gh), tl.where(moves[:, None], old_gc, gc)
        alive = moves
        index = tl.load(chunk.previous + run - 1, mask=moves, other=0)
    tl.store(carry + carried, gh, mask=carry_ok)
    if F.CELL == "lstm":
        tl.store(carry + B * F.H + carried, gc, mask=carry_ok)
    tl.store(clock + rows, q, mask=ok)
    tl.store(clock + B + rows, d, mask=ok)


@triton.jit
def output_cotangent(runs, rows, index, units, ok, C, F):
    """Return the sum of the outputs' cotangents over a run, for a tile of the top layer: [R, N]."""
    return tl.load(runs.output_sum + tile_of(rows * (C + 1) + index, units, F), mask=ok, other=0.0)


@triton.jit
def streamed_sums(chunk, runs, carry, rows, index, alive, moves, B, C, F):
    """Return the parts of g_q, g_D and <g, S(s, x) - s> from this program's units: [R] each."""
    of_q = tl.zeros([F.BLOCK_ROWS], F.STATE)
    of_d, of_state = of_q, of_q
    copy = F.LAYERS * B.to(tl.int64) * (C + 1) * F.H  # from by_h of g_q to that of g_D
    for layer in range(F.LAYERS):
        row = layer * B + rows
        for first in range(tl.program_id(1) * F.BLOCK_UNITS, F.H, F.SPLIT * F.BLOCK_UNITS):
            units, ok = columns(first, F.H, alive, F)
            run_tile, tile = tile_of(row * (C + 1) + index, units, F), tile_of(row * C + index - 1, units, F)
            tile_ok, carried = ok & moves[:, None], carry + tile_of(row, units, F)
            g = tl.load(carried, mask=ok, other=0.0)
            more_q, more_d = through_sums(runs.by_h, g, run_tile, copy, ok)
            of_q, of_d = of_q + more_q, of_d + more_d
            if runs.output_sum is not None:
                if layer == F.LAYERS - 1:
                    g += output_cotangent(runs, rows, index, units, ok, C, F)
            of_state += of_change(chunk.h, chunk.new_h, g, tile, tile_ok)
            if F.CELL == "lstm":
                g = tl.load(carried + F.LAYERS * B * F.H, mask=ok, other=0.0)
                more_q, more_d = through_sums(runs.by_c, g, run_tile, copy, ok)
                of_q, of_d = of_q + more_q, of_d + more_d
                of_state += of_change(chunk.c, chunk.new_c, g, tile, tile_ok)
    return of_q, of_d, of_state


@triton.jit
def streamed_cell(chunk, weights, runs, gradients, carry, above, grad_z, layer, rows, index, alive, moves, B, C, F):
    """Go back through an update of this program's units of a layer, as far as other units are not needed."""
    row = layer * B + rows
    n = row * C + index - 1
    for first in range(tl.program_id(1) * F.BLOCK_UNITS, F.H, F.SPLIT * F.BLOCK_UNITS):
        units, ok = columns(first, F.H, alive, F)
        tile, tile_ok, carried = tile_of(n, units, F), ok & moves[:, None], carry + tile_of(row, units, F)
        gh = tl.load(carried, mask=ok, other=0.0)
        into_gate = tl.zeros([F.BLOCK_ROWS, F.BLOCK_UNITS], F.STATE)
        if layer == F.LAYERS - 1:
            if runs.output_sum is not None:
                gh += output_cotangent(runs, rows, index, units, ok, C, F)
                tl.store(carried, gh, mask=ok)
            if weights.gate is not None:
                w_p = tl.load(weights.gate + units, mask=units < F.H, other=0.0).to(F.STATE)
                into_gate += grad_z[:, None] * w_p[None, :]
        elif weights.upper is not None:
            gh += tl.load(above + tile_of(rows, units, F), mask=tile_ok, other=0.0)
        a = load_activations(chunk, layer, tile, tile_ok, B.to(tl.int64) * C, F)
        out = gradients.inputs + n[:, None] * (F.GATES * F.H) + units[None, :]
        if F.CELL == "lstm":
            carried += F.LAYERS * B * F.H
            gc = tl.load(carried, mask=tile_ok, other=0.0) + into_gate
            c_new = tl.load(chunk.new_c + tile, mask=tile_ok, other=0.0)
            d, gc = lstm_backward(gh, gc, a, c_new, tl.load(chunk.c + tile, mask=tile_ok, other=0.0))
            tl.store(carried, gc, mask=tile_ok)
            for g in tl.static_range(4):
                store_gradient(out + g * F.H, d[g], tile_ok)
        else:
            grad = gh + into_gate
            d1, d2 = gru_backward(grad, a[1], a[2], tl.load(chunk.h + tile, mask=tile_ok, other=0.0))
            if F.CELL == "gru_reset_after":  # else r waits for the product with W_hn
                store_gradient(out, d2 * a[3] * a[0] * (1 - a[0]), tile_ok)
                store_gradient(gradients.recurrent + tile, d2 * a[0], tile_ok)
            tl.store(carried, grad * a[1], mask=tile_ok)
            store_gradient(out + F.H, d1, tile_ok)
            store_gradient(out + 2 * F.H, d2, tile_ok)


@triton.jit
def streamed_reset(chunk, weights, gradients, carry, layer, rows, index, moves, B, C, F):
    """Go back through the reset gate of "gru", which was multiplied before the product with W_hn."""
    row = layer * B + rows
    n = row * C + index - 1
    d, matrix = gradients.inputs + n * (F.GATES * F.H), weights.recurrent + (layer * F.GATES + 2) * F.H * F.H
    for first in range(tl.program_id(1) * F.BLOCK_UNITS, F.H, F.SPLIT * F.BLOCK_UNITS):
        units, ok = columns(first, F.H, moves, F)
        tile, carried = tile_of(n, units, F), carry + tile_of(row, units, F)
        of_reset = tl.zeros([F.BLOCK_ROWS, F.BLOCK_UNITS], F.STATE)
        of_reset = add_transposed(of_reset, d + 2 * F.H, moves, matrix, units, F.H, F)
        r = load_activations(chunk, layer, tile, ok, B.to(tl.int64) * C, F)[0]
        tl.store(carried, tl.load(carried, mask=ok, other=0.0) + of_reset * r, mask=ok)
        h_old = tl.load(chunk.h + tile, mask=ok, other=0.0)
        store_gradient(d[:, None] + units[None, :], of_reset * h_old * r * (1 - r), ok)


@triton.jit
def streamed_products(weights, gradients, carry, above, layer, rows, index, moves, B, C, F):
    """Compute the cotangents of the previous h and of the layer's input, which need the cotangents of all units."""
    row = layer * B + rows
    n = row * C + index - 1
    d, matrix = gradients.inputs + n * (F.GATES * F.H), weights.recurrent + layer * F.GATES * F.H * F.H
    for first in range(tl.program_id(1) * F.BLOCK_UNITS, F.H, F.SPLIT * F.BLOCK_UNITS):
        units, ok = columns(first, F.H, moves, F)
        carried = carry + tile_of(row, units, F)
        gh = tl.zeros([F.BLOCK_ROWS, F.BLOCK_UNITS], F.STATE)
        if F.CELL == "lstm":
            gh = add_transposed(gh, d, moves, matrix, units, 4 * F.H, F)
        else:
            gh += tl.load(carried, mask=ok, other=0.0)
            gh = add_transposed(gh, d, moves, matrix, units, 2 * F.H, F)
            if F.CELL == "gru_reset_after":
                of_n = gradients.recurrent + n * F.H
                gh = add_transposed(gh, of_n, moves, matrix + 2 * F.H * F.H, units, F.H, F)
        tl.store(carried, gh, mask=ok)
        if weights.upper is not None:
            if layer > 0:
                of_input = tl.zeros([F.BLOCK_ROWS, F.BLOCK_UNITS], F.STATE)
                upper = weights.upper + (layer - 1) * F.GATES * F.H * F.H
                of_input = add_transposed(of_input, d, moves, upper, units, F.GATES * F.H, F)
                tl.store(above + tile_of(rows, units, F), of_input, mask=ok)


@tuned(STREAMED, resets=["arrived"], restores=["carry", "clock"])
@triton.jit(do_not_specialize=["B", "T", "C", "first_step"])
def streamed_backward(
    chunk, weights, steps, runs, gradients, carry, clock, scratch, arrived, B, T, C, first_step, F, FORM: tl.constexpr
):
    """Process a chunk of a block of rows, for any stack; SPLIT programs share the units of a row block."""
    rows, ok = row_block(chunk.order, B, F)
    writes = (rows * 0 + tl.program_id(1)) == 0  # the first of the programs that share a row
    arrived += tl.program_id(0)
    visits = 0
    q, d = tl.load(clock + rows, mask=ok, other=0.0), tl.load(clock + B + rows, mask=ok, other=0.0)
    index = tl.load(chunk.previous + rows * (C + 1) + C, mask=ok, other=0)
    alive = ok
    turn = 0
    while tl.max(alive.to(tl.int32), 0) > 0:
        moves = alive & (index > 0)
        grad_u, grad_z = tl.zeros_like(q), tl.zeros_like(q)
        if weights.gate is not None:
            sums = streamed_sums(chunk, runs, carry, rows, index, alive, moves, B, C, F)
            for g in tl.static_range(3):
                share(sums[g], scratch.partial, sum_place(turn, g, 3, F), F)
            visits += 1
            meet(arrived, visits, F)
            totals = ()
            for g in tl.static_range(3):
                totals = totals + (gather(sums[g], scratch.partial, sum_place(turn, g, 3, F), F),)
            q, d = through_run(runs, rows * (C + 1) + index, alive, q, d, totals[0], totals[1])
            step = rows * T + first_step + index - 1
            grad_u, grad_z = through_gate(steps, step, moves, q, d, totals[2])
            tl.store(gradients.gate + rows * C + index - 1, grad_z, mask=moves & writes)
        q, d = tl.where(moves, grad_u, q), tl.where(moves, grad_u, d)
        for down in range(F.LAYERS):
            layer = F.LAYERS - 1 - down
            streamed_cell(
                chunk, weights, runs, gradients, carry, scratch.units, grad_z, layer, rows, index, alive, moves, B, C, F
            )
            visits += 1
            meet(arrived, visits, F)
            if F.CELL == "gru":
                streamed_reset(chunk, weights, gradients, carry, layer, rows, index, moves, B, C, F)
                visits += 1
                meet(arrived, visits, F)
            streamed_products(weights, gradients, carry, scratch.units, layer, rows, index, moves, B, C, F)
            tl.debug_barrier()  # the units that a program reads next, it wrote itself
        alive = moves
        index = tl.load(chunk.previous + rows * (C + 1) + index - 1, mask=moves, other=0)
        turn += 1
    tl.store(clock + rows, q, mask=ok & writes)
    tl.store(clock + B + rows, d, mask=ok & writes)
