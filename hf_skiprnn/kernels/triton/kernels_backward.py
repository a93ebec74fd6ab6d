"""Backward in Triton: from update to update, latest first, each row at its own position, a chunk of time a launch.

What needs no order was computed before (triton_steps.py) or is computed after, from the cotangents of the gates'
pre-activations that are left here (triton_reverse.py). `resident_backward` and `streamed_backward` as in the forward.
"""

import triton
import triton.language as tl

from .kernels_common import gather, meet, product, share
from .kernels_forward import row_block


@triton.jit
def transposed_tile(matrix, inner, outer, K, H_OUT):
    """A tile [K, N] of a matrix [K, H_OUT] as torch stores it, zero beyond its edges."""
    ok = (inner[:, None] < K) & (outer[None, :] < H_OUT)
    return tl.load(matrix + inner[:, None].to(tl.int64) * H_OUT + outer[None, :], mask=ok, other=0.0)


@triton.jit
def add_transposed(
    total,  # [R, N]
    source,  # pointers to rows [R], K numbers each
    row_ok,
    matrix,  # [K, H]
    units,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE: tl.constexpr,
):
    """total + source @ matrix."""
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        d = tl.load(
            source[:, None] + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0.0, cache_modifier=".cg"
        )
        total += product(d, transposed_tile(matrix, k, units, K, H), PRECISION, STATE)
    return total


@triton.jit
def through_run(matrix, constant, at, ok, q, d, of_state_q, of_state_d):  # [R] each
    """(g_q, g_D) before a run of skipped steps from those after it."""
    m = matrix + at * 4
    m00, m01 = tl.load(m, mask=ok, other=1.0), tl.load(m + 1, mask=ok, other=0.0)
    m10, m11 = tl.load(m + 2, mask=ok, other=0.0), tl.load(m + 3, mask=ok, other=1.0)
    new_q = m00 * q + m01 * d + tl.load(constant + at * 2, mask=ok, other=0.0) + of_state_q
    new_d = m10 * q + m11 * d + tl.load(constant + at * 2 + 1, mask=ok, other=0.0) + of_state_d
    return tl.where(ok, new_q, q), tl.where(ok, new_d, d)


@triton.jit
def through_gate(
    grad_gates, since, times, increments, rows, event, moves, q, d, of_state, T, LEARNED: tl.constexpr
):  # [R] each
    """g_u at a row's update `event` (1, 2, ...), and the cotangent of its gate's pre-activation W_p top + b_p."""
    if LEARNED:
        step = rows * T + tl.load(times + rows * T + event - 1, mask=moves, other=0)
        e = increments + rows * (T + 1) + event
        now, before = tl.load(e, mask=moves, other=0.0), tl.load(e - 1, mask=moves, other=0.0)
        update_prob = tl.load(since + step, mask=moves, other=0.0) * before
        r = tl.load(grad_gates + step, mask=moves, other=0.0)
        return r + of_state + d * (now - before) - q * update_prob, d * now * (1 - now)
    return tl.zeros_like(q), tl.zeros_like(q)


@triton.jit
def lstm_backward(gh, gc, i, f, g, o, c_new, c_old):
    """Cotangents of the pre-activations i f g o, and of the previous c."""
    t = 2 * tl.sigmoid(2 * c_new) - 1
    gc = gc + gh * o * (1 - t * t)
    return gc * g * i * (1 - i), gc * c_old * f * (1 - f), gc * i * (1 - g * g), gh * t * o * (1 - o), gc * f


@triton.jit(do_not_specialize=["B", "T", "U"])
def resident_backward(
    weight_hh,  # [1, G * H, H]
    upper_ih,  # unused: there is one layer
    gate_weight,  # [H]
    order,  # [B]
    updates,  # [B], in the chunk
    base,  # [B], before it
    times,  # [B, T]
    increments,  # [B, T + 1]
    since,  # [B, T]
    grad_gates,  # [B, T]
    held_h,  # [L, B, U + 1, H]
    held_c,
    gates,  # [L, B, U, 4, H]
    matrix,  # [B, U + 1, 4]; this and the following: see `segments`
    constant,
    by_h,
    by_c,
    output_sum,
    carry_h,  # [L, B, H], in and out
    carry_c,
    carry_d,  # [B]
    carry_q,
    grad_inputs,  # [L, B, U, G * H], out: of the input product, at updates
    grad_recurrent,  # [L, B, U, H], out: of the recurrent product's n, for "gru_reset_after"
    grad_gate,  # [B, U], out: of the gate's pre-activation
    above,  # unused
    partial,  # unused
    arrived,  # unused
    B,
    T,
    U,  # updates in the chunk of the row with most of them
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    CELL: tl.constexpr,
    LEARNED: tl.constexpr,
    SEQUENCE: tl.constexpr,
    STATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A chunk of a block of rows, one layer, the recurrent weights on chip, the cotangents in registers."""
    G: tl.constexpr = 4 if CELL == "lstm" else 3
    HAS_C: tl.constexpr = CELL == "lstm"
    rows, ok = row_block(order, B, ROWS, BLOCK_ROWS)
    units = tl.arange(0, BLOCK_UNITS)
    unit_ok = units < H
    carried = rows[:, None] * H + units[None, :]
    carried_ok = ok[:, None] & unit_ok[None, :]
    gh = tl.load(carry_h + carried, mask=carried_ok, other=0.0)
    gc = gh
    if HAS_C:
        gc = tl.load(carry_c + carried, mask=carried_ok, other=0.0)
    d, q = tl.load(carry_d + rows, mask=ok, other=0.0), tl.load(carry_q + rows, mask=ok, other=0.0)
    w0 = transposed_tile(weight_hh, units, units, H, H)
    w1 = transposed_tile(weight_hh + H * H, units, units, H, H)
    w2 = transposed_tile(weight_hh + 2 * H * H, units, units, H, H)
    w3 = w2
    if HAS_C:
        w3 = transposed_tile(weight_hh + 3 * H * H, units, units, H, H)
    w_p = tl.zeros([1, BLOCK_UNITS], STATE)
    if LEARNED:
        w_p = tl.load(gate_weight + units, mask=unit_ok, other=0.0).to(STATE)[None, :]
    copy = B * (U + 1) * H + rows * 0  # from by_h of g_q to that of g_D
    slot = tl.load(updates + rows, mask=ok, other=0)
    events = tl.load(base + rows, mask=ok, other=0)
    alive = ok
    while tl.max(alive.to(tl.int32), 0) > 0:
        at = rows * (U + 1) + slot
        moves = alive & (slot > 0)
        tile, tile_ok = at[:, None] * H + units[None, :], alive[:, None] & unit_ok[None, :]
        if LEARNED:
            of_q = tl.sum(gh * tl.load(by_h + tile, mask=tile_ok, other=0.0), 1)
            of_d = tl.sum(gh * tl.load(by_h + copy[:, None] + tile, mask=tile_ok, other=0.0), 1)
            if HAS_C:
                of_q += tl.sum(gc * tl.load(by_c + tile, mask=tile_ok, other=0.0), 1)
                of_d += tl.sum(gc * tl.load(by_c + copy[:, None] + tile, mask=tile_ok, other=0.0), 1)
            q, d = through_run(matrix, constant, at, alive, q, d, of_q, of_d)
        if SEQUENCE:
            gh += tl.load(output_sum + tile, mask=tile_ok, other=0.0)
        # The update that made this slot's state.
        n = rows * U + slot - 1
        tile_ok = moves[:, None] & unit_ok[None, :]
        now, before = n[:, None] * H + units[None, :], tile - H
        h_new, h_old = (
            tl.load(held_h + tile, mask=tile_ok, other=0.0),
            tl.load(held_h + before, mask=tile_ok, other=0.0),
        )
        of_state = tl.sum(gh * (h_new - h_old), 1)
        c_new, c_old = h_new, h_old
        if HAS_C:
            c_new = tl.load(held_c + tile, mask=tile_ok, other=0.0)
            c_old = tl.load(held_c + before, mask=tile_ok, other=0.0)
            of_state += tl.sum(gc * (c_new - c_old), 1)
        grad_u, grad_z = through_gate(
            grad_gates, since, times, increments, rows, events + slot, moves, q, d, of_state, T, LEARNED
        )
        place = gates + n[:, None] * (4 * H) + units[None, :]
        a0 = tl.load(place, mask=tile_ok, other=0.0)
        a1 = tl.load(place + H, mask=tile_ok, other=0.0)
        a2 = tl.load(place + 2 * H, mask=tile_ok, other=0.0)
        a3 = tl.load(place + 3 * H, mask=tile_ok, other=0.0)
        out = grad_inputs + n[:, None] * (G * H) + units[None, :]
        if HAS_C:
            d0, d1, d2, d3, gc_old = lstm_backward(gh, gc + grad_z[:, None] * w_p, a0, a1, a2, a3, c_new, c_old)
            gc = tl.where(moves[:, None], gc_old, gc)
            tl.store(out + 3 * H, d3.to(out.dtype.element_ty), mask=tile_ok)
            gh_old = product(d0, w0, PRECISION, STATE)
            gh_old += product(d1, w1, PRECISION, STATE)
            gh_old += product(d2, w2, PRECISION, STATE)
            gh_old += product(d3, w3, PRECISION, STATE)
        else:
            g = gh + grad_z[:, None] * w_p
            d2 = g * (1 - a1) * (1 - a2 * a2)
            d1 = g * (h_old - a2) * a1 * (1 - a1)
            if CELL == "gru":
                of_reset = product(d2, w2, PRECISION, STATE)
                d0 = of_reset * h_old * a0 * (1 - a0)
                gh_old = g * a1 + of_reset * a0
            else:
                d0 = d2 * a3 * a0 * (1 - a0)
                gh_old = g * a1 + product(d2 * a0, w2, PRECISION, STATE)
                recurrent = grad_recurrent + now
                tl.store(recurrent, (d2 * a0).to(recurrent.dtype.element_ty), mask=tile_ok)
            gh_old += product(d0, w0, PRECISION, STATE)
            gh_old += product(d1, w1, PRECISION, STATE)
        tl.store(out, d0.to(out.dtype.element_ty), mask=tile_ok)
        tl.store(out + H, d1.to(out.dtype.element_ty), mask=tile_ok)
        tl.store(out + 2 * H, d2.to(out.dtype.element_ty), mask=tile_ok)
        tl.store(grad_gate + n, grad_z, mask=moves)
        gh = tl.where(moves[:, None], gh_old, gh)
        q, d = tl.where(moves, grad_u, q), tl.where(moves, grad_u, d)
        slot -= 1
        alive = alive & (slot >= 0)
    tl.store(carry_h + carried, gh, mask=carried_ok)
    if HAS_C:
        tl.store(carry_c + carried, gc, mask=carried_ok)
    tl.store(carry_d + rows, d, mask=ok)
    tl.store(carry_q + rows, q, mask=ok)


@triton.jit(do_not_specialize=["B", "T", "U"])
def streamed_backward(
    weight_hh,  # [L, G * H, H]; as resident_backward's, and so the rest
    upper_ih,  # [L - 1, G * H, H]
    gate_weight,
    order,
    updates,
    base,
    times,
    increments,
    since,
    grad_gates,
    held_h,
    held_c,
    gates,
    matrix,
    constant,
    by_h,
    by_c,
    output_sum,
    carry_h,
    carry_c,
    carry_d,
    carry_q,
    grad_inputs,
    grad_recurrent,
    grad_gate,
    above,  # [B, H], of a layer's input from the layer above
    partial,  # [blocks, 2, 3, SPLIT, BLOCK_ROWS]
    arrived,  # [blocks], zero
    B,
    T,
    U,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    CELL: tl.constexpr,
    LEARNED: tl.constexpr,
    SEQUENCE: tl.constexpr,
    STATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A chunk of a block of rows, any stack; SPLIT programs share the units of a row block."""
    G: tl.constexpr = 4 if CELL == "lstm" else 3
    HAS_C: tl.constexpr = CELL == "lstm"
    rows, ok = row_block(order, B, ROWS, BLOCK_ROWS)
    program = tl.program_id(1)
    leader = (tl.zeros([BLOCK_ROWS], tl.int32) + program) == 0
    arrived += tl.program_id(0)
    partial += tl.program_id(0) * 6 * SPLIT * BLOCK_ROWS
    part = SPLIT * BLOCK_ROWS
    first_unit, all_units = program * BLOCK_UNITS, SPLIT * BLOCK_UNITS
    d, q = tl.load(carry_d + rows, mask=ok, other=0.0), tl.load(carry_q + rows, mask=ok, other=0.0)
    slot = tl.load(updates + rows, mask=ok, other=0)
    events = tl.load(base + rows, mask=ok, other=0)
    alive = ok
    visits = 0
    rounds = 0
    while tl.max(alive.to(tl.int32), 0) > 0:
        moves = alive & (slot > 0)
        # What all units together say to the gate.
        of_q, of_d, of_state = tl.zeros_like(q), tl.zeros_like(q), tl.zeros_like(q)
        if LEARNED:
            for layer in range(LAYERS):
                for start in range(first_unit, H, all_units):
                    units = start + tl.arange(0, BLOCK_UNITS)
                    ok_now = alive[:, None] & (units < H)[None, :]
                    ok_move = moves[:, None] & (units < H)[None, :]
                    held = ((layer * B + rows) * (U + 1) + slot)[:, None] * H + units[None, :]
                    copy = (((LAYERS + layer) * B + rows) * (U + 1) + slot)[:, None] * H + units[None, :]
                    g = tl.load(carry_h + (layer * B + rows)[:, None] * H + units[None, :], mask=ok_now, other=0.0)
                    of_q += tl.sum(g * tl.load(by_h + held, mask=ok_now, other=0.0), 1)
                    of_d += tl.sum(g * tl.load(by_h + copy, mask=ok_now, other=0.0), 1)
                    if SEQUENCE:
                        if layer == LAYERS - 1:
                            at = (rows * (U + 1) + slot)[:, None] * H + units[None, :]
                            g += tl.load(output_sum + at, mask=ok_now, other=0.0)
                    change = tl.load(held_h + held, mask=ok_move, other=0.0)
                    change -= tl.load(held_h + held - H, mask=ok_move, other=0.0)
                    of_state += tl.sum(g * change, 1)
                    if HAS_C:
                        g = tl.load(carry_c + (layer * B + rows)[:, None] * H + units[None, :], mask=ok_now, other=0.0)
                        of_q += tl.sum(g * tl.load(by_c + held, mask=ok_now, other=0.0), 1)
                        of_d += tl.sum(g * tl.load(by_c + copy, mask=ok_now, other=0.0), 1)
                        change = tl.load(held_c + held, mask=ok_move, other=0.0)
                        change -= tl.load(held_c + held - H, mask=ok_move, other=0.0)
                        of_state += tl.sum(g * change, 1)
            turn = partial + (rounds % 2) * 3 * part
            share(of_q, turn, program, SPLIT, BLOCK_ROWS)
            share(of_d, turn + part, program, SPLIT, BLOCK_ROWS)
            share(of_state, turn + 2 * part, program, SPLIT, BLOCK_ROWS)
            visits += 1
            meet(arrived, visits, SPLIT)
            of_q = gather(of_q, turn, SPLIT, BLOCK_ROWS)
            of_d = gather(of_d, turn + part, SPLIT, BLOCK_ROWS)
            of_state = gather(of_state, turn + 2 * part, SPLIT, BLOCK_ROWS)
            q, d = through_run(matrix, constant, rows * (U + 1) + slot, alive, q, d, of_q, of_d)
        grad_u, grad_z = through_gate(
            grad_gates, since, times, increments, rows, events + slot, moves, q, d, of_state, T, LEARNED
        )
        tl.store(grad_gate + rows * U + slot - 1, grad_z, mask=moves & leader)

        for down in range(LAYERS):
            layer = LAYERS - 1 - down
            w_hh = weight_hh + layer * G * H * H
            n = (layer * B + rows) * U + slot - 1
            row = (layer * B + rows) * H
            d_rows = grad_inputs + n * (G * H)
            for start in range(first_unit, H, all_units):
                units = start + tl.arange(0, BLOCK_UNITS)
                unit_ok = units < H
                ok_now, tile_ok = alive[:, None] & unit_ok[None, :], moves[:, None] & unit_ok[None, :]
                carried = row[:, None] + units[None, :]
                now = n[:, None] * H + units[None, :]
                before = ((layer * B + rows) * (U + 1) + slot - 1)[:, None] * H + units[None, :]
                gh = tl.load(carry_h + carried, mask=ok_now, other=0.0)
                into_gate = tl.zeros([BLOCK_ROWS, BLOCK_UNITS], STATE)
                if down == 0:
                    if SEQUENCE:
                        at = (rows * (U + 1) + slot)[:, None] * H + units[None, :]
                        gh += tl.load(output_sum + at, mask=ok_now, other=0.0)
                        tl.store(carry_h + carried, gh, mask=ok_now)
                    if LEARNED:
                        w_p = tl.load(gate_weight + units, mask=unit_ok, other=0.0).to(STATE)
                        into_gate += grad_z[:, None] * w_p[None, :]
                else:
                    gh += tl.load(above + rows[:, None] * H + units[None, :], mask=tile_ok, other=0.0)
                place = gates + n[:, None] * (4 * H) + units[None, :]
                a0 = tl.load(place, mask=tile_ok, other=0.0)
                a1 = tl.load(place + H, mask=tile_ok, other=0.0)
                a2 = tl.load(place + 2 * H, mask=tile_ok, other=0.0)
                a3 = tl.load(place + 3 * H, mask=tile_ok, other=0.0)
                out = d_rows[:, None] + units[None, :]
                if HAS_C:
                    gc = tl.load(carry_c + carried, mask=tile_ok, other=0.0) + into_gate
                    c_new = tl.load(held_c + before + H, mask=tile_ok, other=0.0)
                    c_old = tl.load(held_c + before, mask=tile_ok, other=0.0)
                    d0, d1, d2, d3, gc = lstm_backward(gh, gc, a0, a1, a2, a3, c_new, c_old)
                    tl.store(carry_c + carried, gc, mask=tile_ok)
                    tl.store(out, d0.to(out.dtype.element_ty), mask=tile_ok)
                    tl.store(out + 3 * H, d3.to(out.dtype.element_ty), mask=tile_ok)
                else:
                    g = gh + into_gate
                    h_old = tl.load(held_h + before, mask=tile_ok, other=0.0)
                    d2 = g * (1 - a1) * (1 - a2 * a2)
                    d1 = g * (h_old - a2) * a1 * (1 - a1)
                    if CELL != "gru":  # else it waits for the product with W_hn
                        d0 = d2 * a3 * a0 * (1 - a0)
                        tl.store(out, d0.to(out.dtype.element_ty), mask=tile_ok)
                        recurrent = grad_recurrent + now
                        tl.store(recurrent, (d2 * a0).to(recurrent.dtype.element_ty), mask=tile_ok)
                    tl.store(carry_h + carried, g * a1, mask=tile_ok)
                tl.store(out + H, d1.to(out.dtype.element_ty), mask=tile_ok)
                tl.store(out + 2 * H, d2.to(out.dtype.element_ty), mask=tile_ok)
            visits += 1
            meet(arrived, visits, SPLIT)
            if CELL == "gru":
                for start in range(first_unit, H, all_units):
                    units = start + tl.arange(0, BLOCK_UNITS)
                    tile_ok = moves[:, None] & (units < H)[None, :]
                    carried = row[:, None] + units[None, :]
                    before = ((layer * B + rows) * (U + 1) + slot - 1)[:, None] * H + units[None, :]
                    of_reset = tl.zeros([BLOCK_ROWS, BLOCK_UNITS], STATE)
                    of_reset = add_transposed(
                        of_reset, d_rows + 2 * H, moves, w_hh + 2 * H * H, units, H, H, BLOCK_K, PRECISION, STATE
                    )
                    a0 = tl.load(gates + n[:, None] * (4 * H) + units[None, :], mask=tile_ok, other=0.0)
                    gh = tl.load(carry_h + carried, mask=tile_ok, other=0.0)
                    tl.store(carry_h + carried, gh + of_reset * a0, mask=tile_ok)
                    d0 = of_reset * tl.load(held_h + before, mask=tile_ok, other=0.0) * a0 * (1 - a0)
                    out = d_rows[:, None] + units[None, :]
                    tl.store(out, d0.to(out.dtype.element_ty), mask=tile_ok)
                visits += 1
                meet(arrived, visits, SPLIT)
            for start in range(first_unit, H, all_units):
                units = start + tl.arange(0, BLOCK_UNITS)
                tile_ok = moves[:, None] & (units < H)[None, :]
                carried = row[:, None] + units[None, :]
                gh = tl.zeros([BLOCK_ROWS, BLOCK_UNITS], STATE)
                if CELL == "lstm":
                    gh = add_transposed(gh, d_rows, moves, w_hh, units, 4 * H, H, BLOCK_K, PRECISION, STATE)
                else:
                    gh += tl.load(carry_h + carried, mask=tile_ok, other=0.0)
                    gh = add_transposed(gh, d_rows, moves, w_hh, units, 2 * H, H, BLOCK_K, PRECISION, STATE)
                    if CELL != "gru":
                        gh = add_transposed(
                            gh, grad_recurrent + n * H, moves, w_hh + 2 * H * H, units, H, H, BLOCK_K, PRECISION, STATE
                        )
                tl.store(carry_h + carried, gh, mask=tile_ok)
                if layer > 0:
                    of_input = tl.zeros([BLOCK_ROWS, BLOCK_UNITS], STATE)
                    w_ih = upper_ih + (layer - 1) * G * H * H
                    of_input = add_transposed(of_input, d_rows, moves, w_ih, units, G * H, H, BLOCK_K, PRECISION, STATE)
                    tl.store(above + rows[:, None] * H + units[None, :], of_input, mask=tile_ok)
            tl.debug_barrier()  # the units that a program reads next, it wrote itself
        q, d = tl.where(moves, grad_u, q), tl.where(moves, grad_u, d)
        slot -= 1
        rounds += 1
        alive = alive & (slot >= 0)
    tl.store(carry_d + rows, d, mask=ok & leader)
    tl.store(carry_q + rows, q, mask=ok & leader)
