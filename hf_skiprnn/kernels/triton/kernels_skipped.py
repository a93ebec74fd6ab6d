"""The backward kernel for skipped steps: it computes sums over runs of skipped steps.

At a skipped step an affine map is applied to the cotangents of accumulator and increment, y = (g_q, g_D)
(event_scan_skip_rnn.py):

    y <- M y + w (1, 1) (r + <g_s, S(s, x) - s>)      M = [[1 - w p, w (D~ - D)], [1 - w p, 1 + w (D~ - D)]]

with p the update_prob and w the gate's slope.

The state's cotangent g_s is constant along a run of skipped steps, except for the outputs' cotangents. So a whole run
is an affine map too: with v_j = M_1 .. M_(j-1) w_j (1, 1), it adds the sums of v_j r_j and <g_s, sum of v_j (S_j - s)>.
These sums do not need the state's cotangent, so `segments` computes them for all runs at once. The sequential kernel
then computes one dot product for each run, whatever its length.

A chunk has C steps. Run 0 begins with the chunk, and run j + 1 after the update at the chunk's step j. The other
entries of the [B, C + 1] runs are not written.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Steps(NamedTuple):
    """The gate's quantities at every step, and the cotangent r of its decision; [B, T] each."""

    kind: Tensor  # 0 skipped, 1 update, 2 masked
    update_prob: Tensor
    increment: Tensor  # before the step
    new_increment: Tensor  # after it
    grad_gates: Tensor
    slope: Tensor  # du / d(update_prob), see `gate_slope`


class Runs(NamedTuple):
    """Sums over every run; None if there is no learned gate, no c, or no output with a cotangent."""

    matrix: Tensor | None  # [B, C + 1, 2, 2], the product of its M
    constant: Tensor | None  # [B, C + 1, 2], sum of v r, and of the outputs' cotangents through v
    by_h: Tensor | None  # [2, L, B, C + 1, H], sum of v (S_h - h)
    by_c: Tensor | None  # likewise
    output_sum: Tensor | None  # [B, C + 1, H], sum of the outputs' cotangents


@triton.jit
def store_run(runs, run, place, copies, columns, output, sums, layers_ok, units_ok):
    """Write the sums of the run with this index among B * (C + 1)."""
    first, second, constant, by_h, by_c = sums
    pair = tl.arange(0, 2)
    if runs.output_sum is not None:
        tl.store(runs.output_sum + columns, output, mask=units_ok)
    if runs.matrix is not None:
        tl.store(runs.matrix + run * 4 + 2 * pair, first)
        tl.store(runs.matrix + run * 4 + 2 * pair + 1, second)
        tl.store(runs.constant + run * 2 + pair, constant)
        at = copies + place[None, :, :]
        tl.store(runs.by_h + at, by_h, mask=layers_ok)
        if runs.by_c is not None:
            tl.store(runs.by_c + at, by_c, mask=layers_ok)


@triton.jit(do_not_specialize=["B", "T", "C", "first_step"])
def segments(
    states,  # h and c before every step [L, B, C, H]
    new_states,  # after it, as if it were an update
    weights,
    steps,
    grad_sequence,  # [B, T, H] or None
    runs,
    B,
    T,
    C,
    first_step,  # of the chunk
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_LAYERS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    STATE: tl.constexpr,
):
    """Process one row of a chunk, run by run. Pairs [2] hold (g_q, g_D) or a column of a matrix M."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, 2)
    layers, units = tl.arange(0, BLOCK_LAYERS)[:, None], tl.arange(0, BLOCK_UNITS)
    units_ok = units < H
    ok = (layers < LAYERS) & units_ok[None, :]
    layers_ok = (pair < 2)[:, None, None] & ok[None, :, :]
    is_top = layers == LAYERS - 1
    copies = pair.to(tl.int64)[:, None, None] * LAYERS * B * (C + 1) * H
    place = (layers * B + row) * C * H + units[None, :]
    run_place = (layers * B + row) * (C + 1) * H + units[None, :]
    zero, none = tl.zeros([2, BLOCK_LAYERS, BLOCK_UNITS], STATE), tl.zeros([2], STATE)
    identity = (pair == 0).to(STATE)
    first, second, constant, by_h, by_c = identity, 1 - identity, none, zero, zero
    output = tl.zeros([BLOCK_UNITS], STATE)
    if weights.gate is not None:
        w_p = tl.load(weights.gate + units, mask=units_ok, other=0.0).to(STATE)
        b_p = tl.load(weights.gate_bias).to(STATE)
    run = row * (C + 1)
    for index in range(C):
        step = row * T + first_step + index
        kind = tl.load(steps.kind + step)
        if kind == 1:  # an update ends a run, and begins another
            here = run - row * (C + 1)
            sums = (first, second, constant, by_h, by_c)
            store_run(runs, run, run_place + here * H, copies, run * H + units, output, sums, layers_ok, units_ok)
            first, second, constant, by_h, by_c = identity, 1 - identity, none, zero, zero
            output = tl.zeros([BLOCK_UNITS], STATE)
            run = row * (C + 1) + index + 1
        if weights.gate is not None:
            if kind == 0:
                both = first + second
                slope = tl.load(steps.slope + step)
                v = both * slope
                change = tl.load(new_states.h + place + index * H, mask=ok, other=0.0)
                top = tl.where(is_top, change, 0.0)
                change -= tl.load(states.h + place + index * H, mask=ok, other=0.0)
                by_h += v[:, None, None] * change[None, :, :]
                if states.c is not None:
                    change = tl.load(new_states.c + place + index * H, mask=ok, other=0.0)
                    top = tl.where(is_top, change, 0.0)
                    change -= tl.load(states.c + place + index * H, mask=ok, other=0.0)
                    by_c += v[:, None, None] * change[None, :, :]
                increment = tl.sigmoid(tl.sum(tl.sum(top, 0) * w_p, 0) + b_p)
                second = v * (increment - tl.load(steps.increment + step)) + second
                first = both * (1 - slope * tl.load(steps.update_prob + step))
                constant += v * tl.load(steps.grad_gates + step)
        if grad_sequence is not None:
            grad = tl.load(grad_sequence + step * H + units, mask=units_ok, other=0.0).to(STATE)
            output += grad
            if weights.gate is not None:
                of_top = tl.sum(tl.where(is_top[None, :, :], by_h, 0.0), 1)
                constant += tl.sum(grad[None, :] * of_top, 1)
    here = run - row * (C + 1)
    sums = (first, second, constant, by_h, by_c)
    store_run(runs, run, run_place + here * H, copies, run * H + units, output, sums, layers_ok, units_ok)
