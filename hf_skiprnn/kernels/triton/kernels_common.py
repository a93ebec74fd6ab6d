"""What the Triton kernels share: the gate's clock, tiled products, and a meeting point of programs.

Tiles: R rows of the batch by N units, or K of a product's inner dimension. Names are those of `cells_skip_rnn`.
Imported only where Triton is; with TRITON_INTERPRET=1 in the environment the kernels run on the CPU.
"""

import triton
import triton.language as tl
from triton import knobs

# Interpreted bfloat16 products are wrong in Triton: there, operands are rounded first and multiplied in float32.
WIDEN = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def tanh(x):
    """To the rounding of 1. The hardware's own is coarser; libdevice's is absent when interpreted."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def gate_opens(steps, increment):
    """Whether the step `steps` (1, 2, ...) after an update is an update: `cells_skip_rnn.gate_opens`."""
    return (steps * increment < 0.5) == 0


@triton.jit
def steps_to_update(increment, steps, remaining):
    """The first n in 1 .. remaining at which the gate opens, else remaining + 1: `cells_skip_rnn.steps_to_update`."""
    d, k, limit = increment.to(tl.float32), steps.to(tl.float32), remaining.to(tl.float32) + 1
    n = tl.where(d > 0, tl.ceil(0.5 / d), float("inf")) - k
    n = tl.where(d != d, 1.0, n)
    n = tl.minimum(tl.maximum(n, 1.0), limit)
    n = tl.where(gate_opens(k + n, d), n, n + 1)
    n = tl.where((n > 1) & gate_opens(k + n - 1, d), n - 1, n)
    return tl.minimum(n, limit).to(tl.int32)


@triton.jit
def next_update(
    increment, steps, ran, length, planned, rows, alive, T, LEARNED: tl.constexpr, PLANNED: tl.constexpr
):  # [R] each
    """Real index of each row's first update after `ran` real steps; at least its length where there is none."""
    if PLANNED:
        return tl.load(planned + rows.to(tl.int64) * (T + 1) + ran, mask=alive, other=0)
    if LEARNED:
        return ran + steps_to_update(increment, steps, length - ran) - 1
    return ran


@triton.jit
def product(a, b, PRECISION: tl.constexpr, STATE: tl.constexpr):
    """a [R, K] in the weights' precision times b [K, N], summed in the state's."""
    a = a.to(b.dtype)
    if WIDEN:
        a, b = a.to(STATE), b.to(STATE)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=STATE)


@triton.jit
def weight_tile(matrix, outputs, inputs, H_OUT, K):
    """A tile [K, N] of a matrix [H_OUT, K] as torch stores it, zero beyond its edges."""
    ok = (inputs[:, None] < K) & (outputs[None, :] < H_OUT)
    return tl.load(matrix + outputs[None, :].to(tl.int64) * K + inputs[:, None], mask=ok, other=0.0)


@triton.jit
def add_products(
    a0,
    a1,
    a2,
    a3,
    source,  # pointers to rows [R], K numbers each
    row_ok,
    matrix,  # [GATES * H, K], from the first gate on
    units,  # [N]
    K,
    H: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE: tl.constexpr,
):
    """a_g + source @ matrix_g.T for the first GATES gates: each [R, N]."""
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        # Other programs may have written it since: past the first-level cache.
        x = tl.load(
            source[:, None] + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0.0, cache_modifier=".cg"
        )
        a0 += product(x, weight_tile(matrix, units, k, H, K), PRECISION, STATE)
        if GATES > 1:
            a1 += product(x, weight_tile(matrix + H * K, units, k, H, K), PRECISION, STATE)
        if GATES > 2:
            a2 += product(x, weight_tile(matrix + 2 * H * K, units, k, H, K), PRECISION, STATE)
        if GATES > 3:
            a3 += product(x, weight_tile(matrix + 3 * H * K, units, k, H, K), PRECISION, STATE)
    return a0, a1, a2, a3


@triton.jit
def input_product(
    inputs,  # [B * T, I], or their products [B * T, GATES * H] with the bias in them
    weight_ih,  # [GATES * H, I]
    bias,  # [GATES * H]
    flat,  # [R], index of the step
    row_ok,
    units,  # [N]
    I,
    H: tl.constexpr,
    GATES: tl.constexpr,
    GATE: tl.constexpr,
    INLINE: tl.constexpr,
    STATE: tl.constexpr,
):
    """W_ih x + b of one gate in the lowest layer: [R, N]; INLINE: computed here, from the inputs that are read."""
    unit_ok = units < H
    if INLINE:
        out = tl.load(bias + GATE * H + units, mask=unit_ok, other=0.0).to(STATE)[None, :]
        out += tl.zeros((flat.shape[0], units.shape[0]), STATE)
        for i in range(I):
            x = tl.load(inputs + flat * I + i, mask=row_ok, other=0.0).to(STATE)
            w = tl.load(weight_ih + (GATE * H + units).to(tl.int64) * I + i, mask=unit_ok, other=0.0).to(STATE)
            out += x[:, None] * w[None, :]
        return out
    place = flat[:, None] * (GATES * H) + GATE * H + units[None, :]
    return tl.load(inputs + place, mask=row_ok[:, None] & unit_ok[None, :], other=0.0).to(STATE)


@triton.jit
def meet(arrived, visits, SPLIT: tl.constexpr):
    """All programs of a row block have come here `visits` times, and see what the others wrote.

    They run at the same time: the launch is cooperative, so the driver refuses a grid that does not fit. All take the
    same turns, as what decides a turn is added up in one order by all. One thread counts for its program: released at
    the device's scope after the program's own barrier, its count covers the writes of all threads; acquired before the
    next barrier, the others' counts cover their reads. Counts may wrap around.
    """
    tl.debug_barrier()
    if SPLIT > 1:
        tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
        while tl.atomic_add(arrived, 0, sem="acq_rel", scope="gpu") - visits * SPLIT < 0:
            pass
        tl.debug_barrier()


@triton.jit
def share(
    mine,  # [R]
    partial,  # [SPLIT, R] of this row block and turn
    program,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Leave this program's part of a sum over units; after `meet`, `gather` adds the parts up."""
    if SPLIT > 1:
        tl.store(partial + program * ROWS + tl.arange(0, ROWS), mine)


@triton.jit
def gather(mine, partial, SPLIT: tl.constexpr, ROWS: tl.constexpr):
    """The sum of all parts, in one order in every program: [R]."""
    if SPLIT > 1:
        total = tl.zeros_like(mine)
        for index in range(SPLIT):
            total += tl.load(partial + index * ROWS + tl.arange(0, ROWS), cache_modifier=".cg")
        return total
    return mine
