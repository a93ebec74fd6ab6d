"""What the Triton kernels share: their arguments, the gate's clock, cells, tiled products, and a barrier of programs.

Tiles: R rows of the batch by N units, or K of a product's inner dimension. Names are those of `cells_skip_rnn`.
Imported only where Triton is; with TRITON_INTERPRET=1 in the environment the kernels run on the CPU.

Tensors travel in named tuples. A tensor that a scan does not have is None, which is known when a kernel is compiled:
`weights.gate is None` leaves the gate's code out.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# Interpreted bfloat16 products are wrong in Triton: there, operands are rounded first and multiplied in float32.
WIDEN = tl.constexpr(bool(knobs.runtime.interpret))


class Form(NamedTuple):
    """What a kernel is compiled for; on the device every field is a tl.constexpr."""

    H: Any  # units
    LAYERS: Any
    CELL: Any
    GATES: Any  # of the cell
    KEEP: Any  # whether the states after all updates are kept
    STATE: Any  # Triton's dtype of states and sums
    OPERAND: Any  # Triton's dtype of weights
    PRECISION: Any  # of products: "ieee" or "tf32"
    ROWS: Any  # of the batch, a program
    BLOCK_ROWS: Any  # of its tiles: at least ROWS
    BLOCK_UNITS: Any
    BLOCK_K: Any
    SPLIT: Any  # programs that share a row block's units


class Weights(NamedTuple):
    """Those of all layers."""

    input: Tensor | None  # [G * H, I] of the lowest layer; None where the inputs are products already
    recurrent: Tensor  # [L, G * H, H]
    upper: Tensor | None  # [L - 1, G * H, H], W_ih of the layers above the lowest
    bias: Tensor  # [L, G * H]
    bias_n: Tensor | None  # [L, H], for "gru_reset_after"
    gate: Tensor | None  # [1, H], W_p
    gate_bias: Tensor | None  # [1]


class States(NamedTuple):
    """h, and c of an LSTM."""

    h: Tensor
    c: Tensor | None


class Scratch(NamedTuple):
    """Memory of a streamed kernel for what its products need of all units."""

    units: Tensor | None  # [B, H]
    partial: Tensor | None  # [blocks, 2, sums, SPLIT, BLOCK_ROWS], parts of sums over units


@triton.jit
def tanh(x):
    """The hyperbolic tangent, to the rounding of 1; the hardware's is coarser, and libdevice's is not interpreted."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def gate_opens(steps_since_update, increment):
    """Whether that step (1, 2, ...) after an update is an update: `cells_skip_rnn.gate_opens`."""
    return (steps_since_update * increment < 0.5) == 0


@triton.jit
def steps_to_update(increment, steps_since_update, remaining):
    """The first n in 1 .. remaining at which the gate opens, else remaining + 1: `cells_skip_rnn.steps_to_update`."""
    d, k, limit = increment.to(tl.float32), steps_since_update.to(tl.float32), remaining.to(tl.float32) + 1
    n = tl.where(d > 0, tl.ceil(0.5 / d), float("inf")) - k
    n = tl.where(d != d, 1.0, n)
    n = tl.minimum(tl.maximum(n, 1.0), limit)
    n = tl.where(gate_opens(k + n, d), n, n + 1)
    n = tl.where((n > 1) & gate_opens(k + n - 1, d), n - 1, n)
    return tl.minimum(n, limit).to(tl.int32)


@triton.jit
def row_block(order, B, F):
    """Rows of this program, [BLOCK_ROWS] int64, and which of them there are: blocks hold ROWS."""
    lane = tl.arange(0, F.BLOCK_ROWS)
    place = tl.program_id(0) * F.ROWS + lane
    ok = (lane < F.ROWS) & (place < B)
    return tl.load(order + place, mask=ok, other=0).to(tl.int64), ok


@triton.jit
def columns(start, H, ok, F):
    """Units of a tile from `start` on, [N], and the tile's mask for the rows `ok` [R]: [R, N]."""
    units = start + tl.arange(0, F.BLOCK_UNITS)
    return units, ok[:, None] & (units < H)[None, :]


@triton.jit
def tile_of(rows, units, F):
    """Places of a tile in a tensor [., H]: [R, N]."""
    return rows[:, None] * F.H + units[None, :]


@triton.jit
def zeros(N: tl.constexpr, F):
    """A tuple of N tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(N):
        tiles = tiles + (tl.zeros([F.BLOCK_ROWS, F.BLOCK_UNITS], F.STATE),)
    return tiles


@triton.jit
def product(a, b, F):
    """a [R, K], rounded to the weights' precision, times b [K, N], summed in the state's."""
    a = a.to(F.OPERAND)
    if WIDEN:
        a, b = a.to(F.STATE), b.to(F.STATE)
    return tl.dot(a, b, input_precision=F.PRECISION, out_dtype=F.STATE)


@triton.jit
def weight_tile(matrix, outputs, inputs, H_OUT, K):
    """A tile [K, N] of the transpose of a matrix [H_OUT, K], zero beyond its edges."""
    ok = (inputs[:, None] < K) & (outputs[None, :] < H_OUT)
    return tl.load(matrix + outputs[None, :].to(tl.int64) * K + inputs[:, None], mask=ok, other=0.0)


@triton.jit
def transposed_tile(matrix, inner, outer, K, H_OUT):
    """A tile [K, N] of a matrix [K, H_OUT], zero beyond its edges."""
    ok = (inner[:, None] < K) & (outer[None, :] < H_OUT)
    return tl.load(matrix + inner[:, None].to(tl.int64) * H_OUT + outer[None, :], mask=ok, other=0.0)


@triton.jit
def source_tile(source, inner, ok, K):
    """A tile [R, K] of rows that `source` [R] points to; past the first-level cache, as other programs write them."""
    mask = ok[:, None] & (inner < K)[None, :]
    return tl.load(source[:, None] + inner[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def add_products(tiles, source, ok, matrix, units, N: tl.constexpr, F):
    """tiles[g] + source @ matrix[g].T for the N tiles [R, N]; source points to rows of H numbers, matrix [N, H, H]."""
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
    """tile + source @ matrix: source points to rows of K numbers, matrix [K, H]."""
    for start in range(0, K, F.BLOCK_K):
        inner = start + tl.arange(0, F.BLOCK_K)
        weight = transposed_tile(matrix, inner, units, K, F.H)
        tile += product(source_tile(source, inner, ok, K), weight, F)
    return tile


@triton.jit
def lowest_inputs(inputs, weights, flat, ok, units, FIRST, N: tl.constexpr, I, F):
    """W_ih x + b of N gates from FIRST on, in the lowest layer at the steps `flat` [R]: a tuple of N tiles [R, N].

    Computed here, or beforehand where weights.input is None.
    """
    tiles = ()
    for g in tl.static_range(N):
        row, unit_ok = units + (FIRST + g) * F.H, units < F.H
        if weights.input is None:
            place = flat[:, None] * (F.GATES * F.H) + row[None, :]
            tile = tl.load(inputs + place, mask=ok[:, None] & unit_ok[None, :], other=0.0).to(F.STATE)
        else:
            tile = tl.load(weights.bias + row, mask=unit_ok, other=0.0).to(F.STATE)[None, :]
            tile += tl.zeros([F.BLOCK_ROWS, F.BLOCK_UNITS], F.STATE)
            for i in range(I):
                x = tl.load(inputs + flat * I + i, mask=ok, other=0.0).to(F.STATE)
                w = tl.load(weights.input + row.to(tl.int64) * I + i, mask=unit_ok, other=0.0).to(F.STATE)
                tile += x[:, None] * w[None, :]
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def reset_bias(weights, layer, units, F):
    """b_hn of a layer of "gru_reset_after": [1, N]."""
    return tl.load(weights.bias_n + layer * F.H + units, mask=units < F.H, other=0.0).to(F.STATE)[None, :]


@triton.jit
def lstm_step(a, c):
    """The next h and c from the pre-activations i f g o."""
    c = tl.sigmoid(a[1]) * c + tl.sigmoid(a[0]) * tanh(a[2])
    return tl.sigmoid(a[3]) * tanh(c), c


@triton.jit
def gru_step(a, h):
    """The next h from the pre-activations r z n, of which r has been used."""
    z = tl.sigmoid(a[1])
    return (1 - z) * tanh(a[2]) + z * h


@triton.jit
def lstm_backward(gh, gc, a, c_new, c_old):
    """Cotangents of the pre-activations i f g o, from activations `a`; and of the previous c."""
    i, f, g, o = a
    t = tanh(c_new)
    gc = gc + gh * o * (1 - t * t)
    return (gc * g * i * (1 - i), gc * c_old * f * (1 - f), gc * i * (1 - g * g), gh * t * o * (1 - o)), gc * f


@triton.jit
def gru_backward(g, z, n, h_old):
    """Cotangents of the pre-activations z and n, from activations; h' = (1 - z) n + z h."""
    return g * (h_old - n) * z * (1 - z), g * (1 - z) * (1 - n * n)


@triton.jit
def meet(arrived, visits, F):
    """Wait until all programs of a row block have come here `visits` times; then they see what the others wrote.

    They run at the same time: the launch is cooperative, so the driver refuses a grid that does not fit. All take the
    same turns, as what decides a turn is added up in one order by all. One thread counts for its program: released at
    the device's scope after the program's own barrier, its count covers the writes of all threads; acquired before the
    next barrier, the others' counts cover their reads. Counts may wrap around.
    """
    tl.debug_barrier()
    if F.SPLIT > 1:
        tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
        while tl.atomic_add(arrived, 0, sem="acq_rel", scope="gpu") - visits * F.SPLIT < 0:
            pass
        tl.debug_barrier()


@triton.jit
def sum_place(turn, index, N, F):
    """Offset of a row block's sum `index` of N in this turn; two turns alternate, as others may still read."""
    return ((tl.program_id(0) * 2 + turn % 2) * N + index) * F.SPLIT * F.BLOCK_ROWS


@triton.jit
def share(mine, partial, place, F):
    """Leave this program's part [R] of a sum over units; after `meet`, `gather` adds the parts up."""
    if F.SPLIT > 1:
        tl.store(partial + place + tl.program_id(1) * F.BLOCK_ROWS + tl.arange(0, F.BLOCK_ROWS), mine)


@triton.jit
def gather(mine, partial, place, F):
    """The sum of all parts, in one order in every program: [R]."""
    if F.SPLIT > 1:
        mine = tl.zeros_like(mine)
        parts = partial + place + tl.arange(0, F.BLOCK_ROWS)
        for index in range(F.SPLIT):
            mine += tl.load(parts + index * F.BLOCK_ROWS, cache_modifier=".cg")
    return mine
