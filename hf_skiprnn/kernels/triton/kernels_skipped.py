"""The part of the backward pass that is not sequential, in Triton: what the steps of a chunk of time contribute.

At a skipped step the cotangents of increment and accumulator, y = (g_q, g_D), take an affine step
(event_scan_skip_rnn.py),

    y <- M y + (1, 1) (r + <g_s, S(s, x) - s>)        M = [[1 - p, D~ - D], [1 - p, 1 + D~ - D]],  p: update_prob

where g_s, the state's cotangent, is the same along a run of skipped steps but for the outputs' cotangents. So a
whole run is one affine step too: with v_j = M_1 .. M_(j-1) (1, 1), it adds the sums of v_j r_j and <g_s, sum of
v_j (S_j - s)>. These sums need no cotangent of the state: `segments` computes them for all runs at once, and the
sequential kernel does one dot product a run, however many steps it skips.

A chunk has C steps, and rows with at most U updates in them; its slot j (0 .. U) is the state after the j-th update in
it, slot 0 the state that it starts from.
"""

import triton
import triton.language as tl

from .kernels_common import input_product, tanh


@triton.jit(do_not_specialize=["N", "I", "V"])
def transition(
    inputs,  # [N, I], or products [N, G * H]; N = B * V
    weight_ih,  # [G * H, I]
    bias,  # [G * H]
    recurrent,  # [B * (U + 1), G * H]; for "gru" the first 2 * H
    reset_product,  # [N, H], W_hn (r * h) of "gru"
    bias_n,  # [H]
    held,  # [N], index of the state before each step
    is_update,  # [N]
    held_h,  # [B * (U + 1), H]
    held_c,  # likewise
    new_h,  # [N, H], out where KEEP
    new_c,  # likewise
    gates,  # [B * U, 4, H], out, at updates: i f g o; r z n m
    reset_h,  # [N, H], r * h of "gru"
    N,
    I,
    V,  # steps of a row
    H: tl.constexpr,
    CELL: tl.constexpr,
    RESETS: tl.constexpr,
    INLINE: tl.constexpr,
    KEEP: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """S(s, x) of every step, as if all were updates; RESETS: only the reset gate of "gru", before its product."""
    G: tl.constexpr = 4 if CELL == "lstm" else 3
    R: tl.constexpr = 2 if CELL == "gru" else G
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    is_step = n < N
    ok = is_step[:, None] & (units < H)[None, :]
    slot = tl.load(held + n, mask=is_step, other=0).to(tl.int64)
    at, before = n[:, None] * H + units[None, :], slot[:, None] * H + units[None, :]
    rec = recurrent + slot[:, None] * (R * H) + units[None, :]
    h = tl.load(held_h + before, mask=ok, other=0.0)
    a0 = input_product(inputs, weight_ih, bias, n, is_step, units, I, H, G, 0, INLINE, STATE)
    a0 = tl.sigmoid(a0 + tl.load(rec, mask=ok, other=0.0).to(STATE))
    if RESETS:
        tl.store(reset_h + at, (a0 * h).to(reset_h.dtype.element_ty), mask=ok)
    else:
        a1 = input_product(inputs, weight_ih, bias, n, is_step, units, I, H, G, 1, INLINE, STATE)
        a1 = tl.sigmoid(a1 + tl.load(rec + H, mask=ok, other=0.0).to(STATE))
        a2 = input_product(inputs, weight_ih, bias, n, is_step, units, I, H, G, 2, INLINE, STATE)
        a3 = a2
        if CELL == "lstm":
            a2 = tanh(a2 + tl.load(rec + 2 * H, mask=ok, other=0.0).to(STATE))
            a3 = input_product(inputs, weight_ih, bias, n, is_step, units, I, H, G, 3, INLINE, STATE)
            a3 = tl.sigmoid(a3 + tl.load(rec + 3 * H, mask=ok, other=0.0).to(STATE))
            if KEEP:
                c = a1 * tl.load(held_c + before, mask=ok, other=0.0) + a0 * a2
                tl.store(new_c + at, c, mask=ok)
                tl.store(new_h + at, a3 * tanh(c), mask=ok)
        else:
            if CELL == "gru":
                a2 = tanh(a2 + tl.load(reset_product + at, mask=ok, other=0.0).to(STATE))
            else:
                a3 = tl.load(rec + 2 * H, mask=ok, other=0.0).to(STATE)
                a3 += tl.load(bias_n + units, mask=units < H, other=0.0).to(STATE)[None, :]
                a2 = tanh(a2 + a0 * a3)
            if KEEP:
                tl.store(new_h + at, (1 - a1) * a2 + a1 * h, mask=ok)
        ok = ok & tl.load(is_update + n, mask=is_step, other=0)[:, None]
        place = gates + (slot - n // V)[:, None] * (4 * H) + units[None, :]  # a row has a state more than updates
        tl.store(place, a0, mask=ok)
        tl.store(place + H, a1, mask=ok)
        tl.store(place + 2 * H, a2, mask=ok)
        tl.store(place + 3 * H, a3, mask=ok)


@triton.jit(do_not_specialize=["B", "T", "C", "U", "first"])
def segments(
    new_h,  # [L, B, C, H]
    new_c,
    held_h,  # [L, B, U + 1, H]
    held_c,
    gate_weight,  # [H]
    gate_bias,  # [1]
    kind,  # [B, T]: 0 skipped, 1 update, 2 masked
    since,  # [B, T], k
    grad_gates,  # [B, T], r
    grad_sequence,  # [B, T, H]
    increments,  # [B, T + 1]
    base,  # [B], updates before the chunk
    matrix,  # [B, U + 1, 4], out: the product of a run's M
    constant,  # [B, U + 1, 2], out: sum of v r, and of the outputs' cotangents through v
    by_h,  # [2, L, B, U + 1, H], out: sum of v (S_h - h)
    by_c,  # likewise
    output_sum,  # [B, U + 1, H], out: sum of a slot's output cotangents
    B,
    T,
    C,
    U,
    first,  # first step of the chunk
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_LAYERS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HAS_C: tl.constexpr,
    LEARNED: tl.constexpr,
    SEQUENCE: tl.constexpr,
    STATE: tl.constexpr,
):
    """One row of a chunk, run by run."""
    row = tl.program_id(0) + tl.zeros([1], tl.int64)  # what a row has one of is a block of one, [1]
    layers, units = tl.arange(0, BLOCK_LAYERS)[:, None], tl.arange(0, BLOCK_UNITS)
    unit_ok = units < H
    ok = (layers < LAYERS) & unit_ok[None, :]
    is_top = layers == LAYERS - 1
    stack = (layers * B + row) * (U + 1) * H + units[None, :]  # slot 0 of every layer
    copy = (LAYERS * B + row * 0) * (U + 1) * H  # from by_h of g_q to that of g_D
    steps = (layers * B + row) * C * H + units[None, :]
    zero = tl.zeros([BLOCK_LAYERS, BLOCK_UNITS], STATE)
    q_h, d_h, q_c, d_c, h, c = zero, zero, zero, zero, zero, zero
    total = tl.zeros([BLOCK_UNITS], STATE)
    q_sum = tl.zeros([1], STATE)
    d_sum, p00, p01, p10, p11 = q_sum, q_sum + 1, q_sum, q_sum, q_sum + 1
    increment, w_p, b_p = q_sum, total, q_sum
    slot = tl.zeros([1], tl.int32)
    events = increments + row * (T + 1) + tl.load(base + row)
    if LEARNED:
        w_p = tl.load(gate_weight + units, mask=unit_ok, other=0.0).to(STATE)
        b_p = tl.load(gate_bias).to(STATE)
        increment = tl.load(events)
        h = tl.load(held_h + stack, mask=ok, other=0.0)
        if HAS_C:
            c = tl.load(held_c + stack, mask=ok, other=0.0)
    for index in range(C):
        step = row * T + first + index
        what = tl.load(kind + step)
        updates, skips = what == 1, what == 0
        # An update closes a run: what was summed belongs to the slot before it.
        row_slot = row * (U + 1) + slot
        if SEQUENCE:
            tl.store(output_sum + row_slot * H + units, total, mask=unit_ok & updates)
            total = tl.where(updates, 0.0, total)
        if LEARNED:
            tl.store(matrix + row_slot * 4 + tl.arange(0, 4), _four(p00, p01, p10, p11), mask=updates)
            tl.store(constant + row_slot * 2 + tl.arange(0, 2), _two(q_sum, d_sum), mask=updates)
            tl.store(by_h + stack + slot * H, q_h, mask=ok & updates)
            tl.store(by_h + copy + stack + slot * H, d_h, mask=ok & updates)
            new = tl.load(new_h + steps + index * H, mask=ok, other=0.0)
            top = tl.where(is_top, new, 0.0)
            if HAS_C:
                tl.store(by_c + stack + slot * H, q_c, mask=ok & updates)
                tl.store(by_c + copy + stack + slot * H, d_c, mask=ok & updates)
                new_cell = tl.load(new_c + steps + index * H, mask=ok, other=0.0)
                top = tl.where(is_top, new_cell, 0.0)
            slope = tl.sigmoid(tl.sum(tl.sum(top, 0) * w_p, 0, keep_dims=True) + b_p) - increment
            update_prob = tl.load(since + step) * increment
            v_q, v_d = tl.where(skips, p00 + p01, 0.0), tl.where(skips, p10 + p11, 0.0)
            r = tl.load(grad_gates + step)
            q_sum = tl.where(updates, 0.0, q_sum + v_q * r)
            d_sum = tl.where(updates, 0.0, d_sum + v_d * r)
            p00 = tl.where(updates, 1.0, tl.where(skips, v_q * (1 - update_prob), p00))
            p01 = tl.where(updates, 0.0, tl.where(skips, v_q * slope + p01, p01))
            p10 = tl.where(updates, 0.0, tl.where(skips, v_d * (1 - update_prob), p10))
            p11 = tl.where(updates, 1.0, tl.where(skips, v_d * slope + p11, p11))
            change = tl.where(skips, new - h, 0.0)
            q_h = tl.where(updates, 0.0, q_h + v_q * change)
            d_h = tl.where(updates, 0.0, d_h + v_d * change)
            if HAS_C:
                change = tl.where(skips, new_cell - c, 0.0)
                q_c = tl.where(updates, 0.0, q_c + v_q * change)
                d_c = tl.where(updates, 0.0, d_c + v_d * change)
        slot += updates.to(tl.int32)
        if LEARNED:
            moved = ok & updates
            h = tl.load(held_h + stack + slot * H, mask=moved, other=0.0) + tl.where(updates, 0.0, h)
            if HAS_C:
                c = tl.load(held_c + stack + slot * H, mask=moved, other=0.0) + tl.where(updates, 0.0, c)
            increment = tl.load(events + slot)
        if SEQUENCE:
            of_output = tl.load(grad_sequence + step * H + units, mask=unit_ok, other=0.0).to(STATE)
            total += of_output
            if LEARNED:
                q_sum += tl.sum(of_output * tl.sum(tl.where(is_top, q_h, 0.0), 0), 0, keep_dims=True)
                d_sum += tl.sum(of_output * tl.sum(tl.where(is_top, d_h, 0.0), 0), 0, keep_dims=True)
    row_slot = row * (U + 1) + slot
    if SEQUENCE:
        tl.store(output_sum + row_slot * H + units, total, mask=unit_ok)
    if LEARNED:
        tl.store(matrix + row_slot * 4 + tl.arange(0, 4), _four(p00, p01, p10, p11))
        tl.store(constant + row_slot * 2 + tl.arange(0, 2), _two(q_sum, d_sum))
        tl.store(by_h + stack + slot * H, q_h, mask=ok)
        tl.store(by_h + copy + stack + slot * H, d_h, mask=ok)
        if HAS_C:
            tl.store(by_c + stack + slot * H, q_c, mask=ok)
            tl.store(by_c + copy + stack + slot * H, d_c, mask=ok)


@triton.jit
def _two(a, b):
    return tl.where(tl.arange(0, 2) == 0, a, b)


@triton.jit
def _four(a, b, c, d):
    i = tl.arange(0, 4)
    return tl.where(i < 2, tl.where(i == 0, a, b), tl.where(i == 2, c, d))
