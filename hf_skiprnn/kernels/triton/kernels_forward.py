"""Forward in Triton: a block of rows runs through all its updates in one launch, each row at its own position.

`resident_forward`: one layer whose recurrent weights stay on chip, the state in registers. `streamed_forward`: any
stack; weights and states pass through the caches, and where one multiprocessor would read too much, SPLIT programs
share the units of one row block and meet after every product.

The state after the e-th update of a row stands in slot e % S of `h` and `c` [L, B, S, H]; slot 0 is the initial state.
S is 2 where no states are kept; T + 1 is room for all, and less is too, where no row has S updates (triton_room.py).
"""

import triton
import triton.language as tl

from .kernels_common import add_products, gather, input_product, meet, next_update, product, share, tanh, weight_tile


@triton.jit
def row_block(order, B, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Rows of this program, [BLOCK_ROWS] int64, and which of them there are: blocks hold ROWS."""
    lane = tl.arange(0, BLOCK_ROWS)
    place = tl.program_id(0) * ROWS + lane
    ok = (lane < ROWS) & (place < B)
    return tl.load(order + place, mask=ok, other=0).to(tl.int64), ok


@triton.jit
def position(positions, rows, real_index, alive, T, MASKED: tl.constexpr):
    """Index into [B * T] of each row's real step."""
    if MASKED:
        real_index = tl.load(positions + rows * T + real_index, mask=alive, other=0)
    return rows * T + real_index


@triton.jit
def record(gates, times, increments, rows, flat, event, increment, ok, T, STATE: tl.constexpr, RECORD: tl.constexpr):
    """Note an update: its gate, and for the backward pass its time and increment."""
    tl.store(gates + flat, tl.full(flat.shape, 1, STATE), mask=ok)
    if RECORD:
        tl.store(times + rows * T + event - 1, (flat - rows * T).to(tl.int32), mask=ok)
        tl.store(increments + rows * (T + 1) + event, increment, mask=ok)


@triton.jit
def finish(last_increment, last_steps, counts, rows, ok, increment, steps, count):
    """What a row carries on."""
    tl.store(last_increment + rows, increment, mask=ok)
    tl.store(last_steps + rows, steps, mask=ok)
    tl.store(counts + rows, count, mask=ok)


@triton.jit(do_not_specialize=["B", "T", "I", "S"])
def resident_forward(
    inputs,  # [B * T, I], or products [B * T, G * H]
    weight_ih,  # [G * H, I]
    weight_hh,  # [1, G * H, H]
    upper_ih,  # unused: there is one layer
    bias,  # [1, G * H]
    bias_n,  # [1, H]
    gate_weight,  # [H]
    gate_bias,  # [1]
    order,  # [B]
    lengths,  # [B]
    positions,  # [B, T]
    planned,  # [B, T + 1]
    h,  # [1, B, S, H]
    c,  # likewise
    first_increment,  # [B]
    first_steps,  # [B]
    gates,  # [B, T]
    times,  # [B, T]
    increments,  # [B, T + 1]
    last_increment,  # [B]
    last_steps,  # [B]
    counts,  # [B]
    scratch,  # unused
    partial,  # unused
    arrived,  # unused
    B,
    T,
    I,
    S,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    CELL: tl.constexpr,
    LEARNED: tl.constexpr,
    PLANNED: tl.constexpr,
    MASKED: tl.constexpr,
    KEEP: tl.constexpr,
    RECORD: tl.constexpr,
    INLINE: tl.constexpr,
    STATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """All updates of a block of rows, one layer, the recurrent weights on chip, the state in registers."""
    G: tl.constexpr = 4 if CELL == "lstm" else 3
    rows, ok = row_block(order, B, ROWS, BLOCK_ROWS)
    units = tl.arange(0, BLOCK_UNITS)
    tile_ok = ok[:, None] & (units < H)[None, :]
    place = rows[:, None] * S * H + units[None, :]
    h_now = tl.load(h + place, mask=tile_ok, other=0.0)
    c_now = h_now
    if CELL == "lstm":
        c_now = tl.load(c + place, mask=tile_ok, other=0.0)
    w0 = weight_tile(weight_hh, units, units, H, H)
    w1 = weight_tile(weight_hh + H * H, units, units, H, H)
    w2 = weight_tile(weight_hh + 2 * H * H, units, units, H, H)
    w3 = w2
    if CELL == "lstm":
        w3 = weight_tile(weight_hh + 3 * H * H, units, units, H, H)
    b_n = tl.load(bias_n + units, mask=units < H, other=0.0).to(STATE)[None, :]
    w_p, b_p = tl.zeros([BLOCK_UNITS], STATE), 0.0
    if LEARNED:
        w_p = tl.load(gate_weight + units, mask=units < H, other=0.0).to(STATE)
        b_p = tl.load(gate_bias).to(STATE)

    length = tl.load(lengths + rows, mask=ok, other=0)
    increment = tl.load(first_increment + rows, mask=ok, other=0.0)
    steps = tl.load(first_steps + rows, mask=ok, other=0.0)
    ran = tl.zeros_like(length)
    count = tl.zeros_like(length)
    at = next_update(increment, steps, ran, length, planned, rows, ok, T, LEARNED, PLANNED)
    alive = ok & (at < length)
    event = 0
    while tl.max(alive.to(tl.int32), 0) > 0:
        event += 1
        flat = position(positions, rows, at, alive, T, MASKED)
        x0 = input_product(inputs, weight_ih, bias, flat, alive, units, I, H, G, 0, INLINE, STATE)
        x1 = input_product(inputs, weight_ih, bias, flat, alive, units, I, H, G, 1, INLINE, STATE)
        x2 = input_product(inputs, weight_ih, bias, flat, alive, units, I, H, G, 2, INLINE, STATE)
        a0 = tl.sigmoid(x0 + product(h_now, w0, PRECISION, STATE))
        a1 = tl.sigmoid(x1 + product(h_now, w1, PRECISION, STATE))
        if CELL == "lstm":
            x3 = input_product(inputs, weight_ih, bias, flat, alive, units, I, H, G, 3, INLINE, STATE)
            g = tanh(x2 + product(h_now, w2, PRECISION, STATE))
            o = tl.sigmoid(x3 + product(h_now, w3, PRECISION, STATE))
            c_new = a1 * c_now + a0 * g
            h_new = o * tanh(c_new)
        else:
            if CELL == "gru":
                n = tanh(x2 + product(a0 * h_now, w2, PRECISION, STATE))
            else:
                n = tanh(x2 + a0 * (product(h_now, w2, PRECISION, STATE) + b_n))
            h_new = (1 - a1) * n + a1 * h_now
            c_new = h_new
        increment_new = tl.zeros_like(increment)
        if LEARNED:
            increment_new = tl.sigmoid(tl.sum(tl.where((units < H)[None, :], c_new * w_p[None, :], 0.0), 1) + b_p)
        moves = alive[:, None]
        h_now = tl.where(moves, h_new, h_now)
        c_now = tl.where(moves, c_new, c_now)
        increment = tl.where(alive, increment_new, increment)
        if KEEP:
            slot = (rows * S + event % S)[:, None] * H + units[None, :]
            tl.store(h + slot, h_now, mask=tile_ok & moves)
            if CELL == "lstm":
                tl.store(c + slot, c_now, mask=tile_ok & moves)
        record(gates, times, increments, rows, flat, event, increment, alive, T, STATE, RECORD)
        count += alive.to(tl.int32)
        ran = tl.where(alive, at + 1, ran)
        steps = tl.where(alive, 0.0, steps)
        at = next_update(increment, steps, ran, length, planned, rows, alive, T, LEARNED, PLANNED)
        alive = alive & (at < length)
    finish(last_increment, last_steps, counts, rows, ok, increment, steps + (length - ran), count)
    if not KEEP:  # a row's last state stands where its number of updates says
        slot = (rows * S + count % S)[:, None] * H + units[None, :]
        tl.store(h + slot, h_now, mask=tile_ok)
        if CELL == "lstm":
            tl.store(c + slot, c_now, mask=tile_ok)


@triton.jit(do_not_specialize=["B", "T", "I", "S"])
def streamed_forward(
    inputs,  # as resident_forward's, and so the rest, but for L layers
    weight_ih,
    weight_hh,  # [L, G * H, H]
    upper_ih,  # [L - 1, G * H, H]
    bias,  # [L, G * H]
    bias_n,  # [L, H]
    gate_weight,
    gate_bias,
    order,
    lengths,
    positions,
    planned,
    h,  # [L, B, S, H]
    c,
    first_increment,
    first_steps,
    gates,
    times,
    increments,
    last_increment,
    last_steps,
    counts,
    scratch,  # [B, H]: r * h of a GRU
    partial,  # [blocks, 2, SPLIT, BLOCK_ROWS]
    arrived,  # [blocks], zero
    B,
    T,
    I,
    S,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    CELL: tl.constexpr,
    LEARNED: tl.constexpr,
    PLANNED: tl.constexpr,
    MASKED: tl.constexpr,
    KEEP: tl.constexpr,
    RECORD: tl.constexpr,
    INLINE: tl.constexpr,
    STATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """All updates of a block of rows, any stack; SPLIT programs share the units of a row block."""
    G: tl.constexpr = 4 if CELL == "lstm" else 3
    rows, ok = row_block(order, B, ROWS, BLOCK_ROWS)
    program = tl.program_id(1)
    leader = (tl.zeros([BLOCK_ROWS], tl.int32) + program) == 0
    arrived += tl.program_id(0)
    partial += tl.program_id(0) * 2 * SPLIT * BLOCK_ROWS
    first_unit, all_units = program * BLOCK_UNITS, SPLIT * BLOCK_UNITS
    b_p = 0.0
    if LEARNED:
        b_p = tl.load(gate_bias).to(STATE)

    length = tl.load(lengths + rows, mask=ok, other=0)
    increment = tl.load(first_increment + rows, mask=ok, other=0.0)
    steps = tl.load(first_steps + rows, mask=ok, other=0.0)
    ran = tl.zeros_like(length)
    count = tl.zeros_like(length)
    at = next_update(increment, steps, ran, length, planned, rows, ok, T, LEARNED, PLANNED)
    alive = ok & (at < length)
    event = 0
    visits = 0
    while tl.max(alive.to(tl.int32), 0) > 0:
        event += 1
        flat = position(positions, rows, at, alive, T, MASKED)
        gate_sum = tl.zeros([BLOCK_ROWS], STATE)
        for layer in range(LAYERS):
            before = ((layer * B + rows) * S + (event - 1) % S) * H  # [R], where this layer's states stand
            after = ((layer * B + rows) * S + event % S) * H
            below = h + ((layer * B - B + rows) * S + event % S) * H
            w_hh = weight_hh + layer * G * H * H
            w_ih = upper_ih + (layer - 1) * G * H * H
            if CELL == "gru":  # the reset gate of all units comes before the product that it enters
                for start in range(first_unit, H, all_units):
                    units = start + tl.arange(0, BLOCK_UNITS)
                    tile_ok = alive[:, None] & (units < H)[None, :]
                    r = tl.zeros([BLOCK_ROWS, BLOCK_UNITS], STATE)
                    if layer == 0:
                        r += input_product(inputs, weight_ih, bias, flat, alive, units, I, H, G, 0, INLINE, STATE)
                    else:
                        r += tl.load(bias + layer * G * H + units, mask=units < H, other=0.0).to(STATE)[None, :]
                        r, _, _, _ = add_products(
                            r, r, r, r, below, alive, w_ih, units, H, H, 1, BLOCK_K, PRECISION, STATE
                        )
                    r, _, _, _ = add_products(
                        r, r, r, r, h + before, alive, w_hh, units, H, H, 1, BLOCK_K, PRECISION, STATE
                    )
                    held = tl.load(h + before[:, None] + units[None, :], mask=tile_ok, other=0.0)
                    tl.store(scratch + rows[:, None] * H + units[None, :], tl.sigmoid(r) * held, mask=tile_ok)
                visits += 1
                meet(arrived, visits, SPLIT)
            for start in range(first_unit, H, all_units):
                units = start + tl.arange(0, BLOCK_UNITS)
                unit_ok = units < H
                tile_ok = alive[:, None] & unit_ok[None, :]
                a0 = tl.zeros([BLOCK_ROWS, BLOCK_UNITS], STATE)
                a1, a2, a3 = a0, a0, a0
                if layer == 0:
                    a0 += input_product(inputs, weight_ih, bias, flat, alive, units, I, H, G, 0, INLINE, STATE)
                    a1 += input_product(inputs, weight_ih, bias, flat, alive, units, I, H, G, 1, INLINE, STATE)
                    a2 += input_product(inputs, weight_ih, bias, flat, alive, units, I, H, G, 2, INLINE, STATE)
                    if CELL == "lstm":
                        a3 += input_product(inputs, weight_ih, bias, flat, alive, units, I, H, G, 3, INLINE, STATE)
                else:
                    b = bias + layer * G * H + units
                    a0 += tl.load(b, mask=unit_ok, other=0.0).to(STATE)[None, :]
                    a1 += tl.load(b + H, mask=unit_ok, other=0.0).to(STATE)[None, :]
                    a2 += tl.load(b + 2 * H, mask=unit_ok, other=0.0).to(STATE)[None, :]
                    if CELL == "lstm":
                        a3 += tl.load(b + 3 * H, mask=unit_ok, other=0.0).to(STATE)[None, :]
                    a0, a1, a2, a3 = add_products(
                        a0, a1, a2, a3, below, alive, w_ih, units, H, H, G, BLOCK_K, PRECISION, STATE
                    )
                held_at = before[:, None] + units[None, :]
                new_at = after[:, None] + units[None, :]
                source = h + before
                if CELL == "lstm":
                    a0, a1, a2, a3 = add_products(
                        a0, a1, a2, a3, source, alive, w_hh, units, H, H, G, BLOCK_K, PRECISION, STATE
                    )
                    c_new = tl.sigmoid(a1) * tl.load(c + held_at, mask=tile_ok, other=0.0)
                    c_new += tl.sigmoid(a0) * tanh(a2)
                    h_new = tl.sigmoid(a3) * tanh(c_new)
                    tl.store(c + new_at, c_new, mask=tile_ok)
                else:
                    if CELL == "gru":
                        a1, _, _, _ = add_products(
                            a1, a1, a1, a1, source, alive, w_hh + H * H, units, H, H, 1, BLOCK_K, PRECISION, STATE
                        )
                        a2, _, _, _ = add_products(
                            a2,
                            a2,
                            a2,
                            a2,
                            scratch + rows * H,
                            alive,
                            w_hh + 2 * H * H,
                            units,
                            H,
                            H,
                            1,
                            BLOCK_K,
                            PRECISION,
                            STATE,
                        )
                    else:
                        a3 += tl.load(bias_n + layer * H + units, mask=unit_ok, other=0.0).to(STATE)[None, :]
                        a0, a1, a3, _ = add_products(
                            a0, a1, a3, a3, source, alive, w_hh, units, H, H, 3, BLOCK_K, PRECISION, STATE
                        )
                        a2 += tl.sigmoid(a0) * a3
                    z = tl.sigmoid(a1)
                    h_new = (1 - z) * tanh(a2) + z * tl.load(h + held_at, mask=tile_ok, other=0.0)
                    c_new = h_new
                tl.store(h + new_at, h_new, mask=tile_ok)
                if LEARNED:
                    if layer == LAYERS - 1:
                        w_p = tl.load(gate_weight + units, mask=unit_ok, other=0.0).to(STATE)
                        gate_sum += tl.sum(tl.where(unit_ok[None, :], c_new * w_p[None, :], 0.0), 1)
            turn = partial + (event % 2) * SPLIT * BLOCK_ROWS
            if layer == LAYERS - 1:
                share(gate_sum, turn, program, SPLIT, BLOCK_ROWS)
            visits += 1
            meet(arrived, visits, SPLIT)
        increment_new = tl.zeros_like(increment)
        if LEARNED:
            gate_sum = gather(gate_sum, partial + (event % 2) * SPLIT * BLOCK_ROWS, SPLIT, BLOCK_ROWS)
            increment_new = tl.sigmoid(gate_sum + b_p)
        increment = tl.where(alive, increment_new, increment)
        record(gates, times, increments, rows, flat, event, increment, alive & leader, T, STATE, RECORD)
        count += alive.to(tl.int32)
        ran = tl.where(alive, at + 1, ran)
        steps = tl.where(alive, 0.0, steps)
        at = next_update(increment, steps, ran, length, planned, rows, alive, T, LEARNED, PLANNED)
        alive = alive & (at < length)
    finish(last_increment, last_steps, counts, rows, ok & leader, increment, steps + (length - ran), count)
