"""Code that the Triton kernels share: arguments, the gate, cells, tiled products, and a barrier between programs.

A tile has R rows of the batch by N units, or by K elements of a product's inner dimension. Names are those of
`cells_skip_rnn`. This module needs Triton; with TRITON_INTERPRET=1 in the environment the kernels run on the CPU.

Tensors are passed in named tuples. A tensor that a scan does not have is None. This is known when a kernel is compiled,
so that the code under `weights.gate is not None` is left out without a gate.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# Triton's interpreter computes bfloat16 products wrongly. There, operands are rounded and then multiplied in float32.
WIDEN = tl.constexpr(bool(knobs.runtime.interpret))


class Form(NamedTuple):
    """The constants for which a kernel is compiled; in kernels every field is a tl.constexpr."""

    H: Any  # units
    LAYERS: Any
    CELL: Any
    GATES: Any  # number of gates of the cell
    KEEP: Any  # whether the states after all updates are stored
    STATE: Any  # Triton's dtype of states and sums
    OPERAND: Any  # Triton's dtype of weights
    PRECISION: Any  # precision of products: "ieee" or "tf32"
    ROWS: Any  # rows of the batch for each program
    BLOCK_ROWS: Any  # rows of its tiles: at least ROWS
    BLOCK_UNITS: Any
    BLOCK_K: Any
    SPLIT: Any  # number of programs that share the units of a row block


def form_name(form: Form) -> str:
    """Return a text that tells a Form from every other one."""
    return " ".join(str(constant.value) for constant in form)


class Weights(NamedTuple):
    """The weights of all layers."""

    input: Tensor | None  # [G * H, I] of the lowest layer; None if the input products are already computed
    recurrent: Tensor  # [L, G * H, H]
    upper: Tensor | None  # [L - 1, G * H, H], W_ih of the layers above the lowest
    bias: Tensor  # [L, G * H]
    bias_n: Tensor | None  # [L, H], for "gru_reset_after"
    gate: Tensor | None  # [1, H], W_p
    gate_bias: Tensor | None  # [1]


class States(NamedTuple):
    """h and, for an LSTM, c."""

    h: Tensor
    c: Tensor | None


class Scratch(NamedTuple):
    """Memory of a streamed kernel for values that its products need from all units."""

    units: Tensor | None  # [B, H]
    partial: Tensor | None  # [blocks, 2, sums, SPLIT, BLOCK_ROWS], parts of sums over units


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, with an error of about the rounding of 1.

    The hardware's function is less exact, and libdevice's does not work in the interpreter.
    """
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def gate_opens(steps_since_update, increment):
    """Return whether the k-th step (1, 2, ...) after an update is an update: `cells_skip_rnn.gate_opens`."""
    return (steps_since_update * increment < 0.5) == 0


@triton.jit
def steps_to_update(increment, steps_since_update, remaining):
    """Return the first n in 1 .. remaining at which the gate opens, else remaining + 1; see `cells_skip_rnn`."""
    d, k, limit = increment.to(tl.float32), steps_since_update.to(tl.float32), remaining.to(tl.float32) + 1
    n = tl.where(d > 0, tl.ceil(0.5 / d), float("inf")) - k
    n = tl.where(d != d, 1.0, n)
    n = tl.minimum(tl.maximum(n, 1.0), limit)
    n = tl.where(gate_opens(k + n, d), n, n + 1)
    n = tl.where((n > 1) & gate_opens(k + n - 1, d), n - 1, n)
    return tl.minimum(n, limit).to(tl.int32)


@triton.jit
def row_block(order, B, F):
    """Return the rows of this program, [BLOCK_ROWS] int64, and which of them exist: a block has ROWS rows."""
    lane = tl.arange(0, F.BLOCK_ROWS)
    place = tl.program_id(0) * F.ROWS + lane
    ok = (lane < F.ROWS) & (place < B)
    return tl.load(order + place, mask=ok, other=0).to(tl.int64), ok


@triton.jit
def columns(start, H, ok, F):
    """Return the units of a tile from `start` on, [N], and the tile's mask for the rows `ok` [R]: [R, N]."""
    units = start + tl.arange(0, F.BLOCK_UNITS)
    return units, ok[:, None] & (units < H)[None, :]


@triton.jit
def tile_of(rows, units, F):
    """Return the offsets of a tile's elements in a tensor [., H]: [R, N]."""
    return rows[:, None] * F.H + units[None, :]


@triton.jit
def zeros(N: tl.constexpr, F):
    """Return a tuple of N tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(N):
        tiles = tiles + (tl.zeros([F.BLOCK_ROWS, F.BLOCK_UNITS], F.STATE),)
    return tiles


@triton.jit
def product(a, b, F):
    """Return a @ b for a [R, K], rounded to the weights' precision, and b [K, N]; sums have the state's precision."""
    a = a.to(F.OPERAND)
    if WIDEN:
        a, b = a.to(F.STATE), b.to(F.STATE)
    return tl.dot(a, b, input_precision=F.PRECISION, out_dtype=F.STATE)


@triton.jit
def weight_tile(matrix, outputs, inputs, H_OUT, K):
    """Load a tile [K, N] of the transpose of a matrix [H_OUT, K]; it is zero outside the matrix."""
    ok = (inputs[:, None] < K) & (outputs[None, :] < H_OUT)
    return tl.load(matrix + outputs[None, :].to(tl.int64) * K + inputs[:, None], mask=ok, other=0.0)


@triton.jit
def transposed_tile(matrix, inner, outer, K, H_OUT):
    """Load a tile [K, N] of a matrix [K, H_OUT]; it is zero outside the matrix."""
    ok = (inner[:, None] < K) & (outer[None, :] < H_OUT)
    return tl.load(matrix + inner[:, None].to(tl.int64) * H_OUT + outer[None, :], mask=ok, other=0.0)


@triton.jit
def source_tile(source, inner, ok, K):
    """Load a tile [R, K] of the rows at `source` [R], not from the L1 cache, because other programs write them."""
    mask = ok[:, None] & (inner < K)[None, :]
    return tl.load(source[:, None] + inner[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def add_products(tiles, source, ok, matrix, units, N: tl.constexpr, F):
    """Return tiles[g] + source @ matrix[g].T for N tiles; source points to rows of H numbers, matrix: [N, H, H]."""
    for start in range(0, F.H, F.BLOCK_K):
        inner = start + tl.arange(0, F.BLOCK_K)
        x = source_tile(source, inner, ok, F.H)
        sums = ()
        for g in tl.static_range(N):
            weight = weight_tile(matrix + g * F.H * F.H, units, inner, F.H, F.H)
            sums = sums + (tiles[g] + product(x, weight, F),)
        tiles = sums
    return tiles


@triton.jit
def add_transposed(tile, source, ok, matrix, units, K, F):
    """Return tile + source @ matrix; source points to rows of K numbers, matrix: [K, H]."""
    for start in range(0, K, F.BLOCK_K):
        inner = start + tl.arange(0, F.BLOCK_K)
        weight = transposed_tile(matrix, inner, units, K, F.H)
        tile += product(source_tile(source, inner, ok, K), weight, F)
    return tile


@triton.jit
def lowest_inputs(inputs, weights, flat, ok, units, FIRST, N: tl.constexpr, I, F):
    """Return W_ih x + b for N gates from FIRST on, in the lowest layer at the steps `flat` [R]: N tiles [R, N].

    If weights.input is None, W_ih x was computed before and is only loaded.
    """
    tiles = ()
    for g in tl.static_range(N):
        row, unit_ok = units + (FIRST + g) * F.H, units < F.H
        tile = tl.load(weights.bias + row, mask=unit_ok, other=0.0).to(F.STATE)[None, :]
        tile += tl.zeros([F.BLOCK_ROWS, F.BLOCK_UNITS], F.STATE)
        if weights.input is None:
            place = flat[:, None] * (F.GATES * F.H) + row[None, :]
            tile += tl.load(inputs + place, mask=ok[:, None] & unit_ok[None, :], other=0.0).to(F.STATE)
        else:
            for i in range(I):
                x = tl.load(inputs + flat * I + i, mask=ok, other=0.0).to(F.STATE)
                w = tl.load(weights.input + row.to(tl.int64) * I + i, mask=unit_ok, other=0.0).to(F.STATE)
                tile += x[:, None] * w[None, :]
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def reset_bias(weights, layer, units, F):
    """Load b_hn of a layer of "gru_reset_after": [1, N]."""
    return tl.load(weights.bias_n + layer * F.H + units, mask=units < F.H, other=0.0).to(F.STATE)[None, :]


@triton.jit
def lstm_step(a, c):
    """Return the next h and c from the pre-activations i f g o."""
    c = tl.sigmoid(a[1]) * c + tl.sigmoid(a[0]) * tanh(a[2])
    return tl.sigmoid(a[3]) * tanh(c), c


@triton.jit
def gru_step(a, h):
    """Return the next h from the pre-activations r z n; r was already applied."""
    z = tl.sigmoid(a[1])
    return (1 - z) * tanh(a[2]) + z * h


@triton.jit
def lstm_backward(gh, gc, a, c_new, c_old):
    """Return the cotangents of the pre-activations i f g o, from the activations `a`, and of the previous c."""
    i, f, g, o = a
    t = tanh(c_new)
    gc = gc + gh * o * (1 - t * t)
    return (gc * g * i * (1 - i), gc * c_old * f * (1 - f), gc * i * (1 - g * g), gh * t * o * (1 - o)), gc * f


@triton.jit
def gru_backward(g, z, n, h_old):
    """Return the cotangents of the pre-activations z and n, from the activations; h' = (1 - z) n + z h."""
    return g * (h_old - n) * z * (1 - z), g * (1 - z) * (1 - n * n)


@triton.jit
def meet(arrived, visits, F):
    """Wait until all programs of a row block have arrived `visits` times; then each sees what the others wrote.

    All programs run at the same time, because the launch is cooperative: the driver refuses a grid that does not fit.
    All make the same number of turns, because they sum the values that decide a turn in the same order. One thread
    counts for its program. It releases the count at device scope after the program's own barrier, so that the count
    covers the writes of all threads. It acquires the others' counts before the next barrier, so that these cover their
    reads. Counts may wrap around.
    """
    tl.debug_barrier()
    if F.SPLIT > 1:
        tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
        while tl.atomic_add(arrived, 0, sem="acq_rel", scope="gpu") - visits * F.SPLIT < 0:
            pass
        tl.debug_barrier()


@triton.jit
def sum_place(turn, index, N, F):
    """Return the offset of a row block's sum `index` of N. Two buffers alternate, as others may still read one."""
    return ((tl.program_id(0) * 2 + turn % 2) * N + index) * F.SPLIT * F.BLOCK_ROWS


@triton.jit
def share(mine, partial, place, F):
    """Store this program's part [R] of a sum over units; after `meet`, `gather` adds the parts."""
    if F.SPLIT > 1:
        tl.store(partial + place + tl.program_id(1) * F.BLOCK_ROWS + tl.arange(0, F.BLOCK_ROWS), mine)


@triton.jit
def gather(mine, partial, place, F):
    """Return the sum of all parts, added in the same order in every program: [R]."""
    if F.SPLIT > 1:
        mine = tl.zeros_like(mine)
        parts = partial + place + tl.arange(0, F.BLOCK_ROWS)
        for index in range(F.SPLIT):
            mine += tl.load(parts + index * F.BLOCK_ROWS, cache_modifier=".cg")
    return mine
