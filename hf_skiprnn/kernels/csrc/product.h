// Matrix products on packed weights.
//
// A packed matrix holds its output units as vectors, four (or three) vectors to a panel, and a panel's rows k one after the
// other: the inner loop streams it. Each output is one chain over k in order, whatever rows are computed beside it.
#pragma once

#include <algorithm>

#include "simd.h"

namespace {

constexpr int kVectors = 4;    // vectors of a panel, at most
constexpr i64 kDepth = 768;    // rows k of a panel that stay in the second-level cache while all rows use them
constexpr i64 kPrefetched = 512 << 10;  // bytes of weights from which on they are fetched ahead

// Split n into the fewest parts of at most `most`, sizes differing by at most one.
struct Parts {
  i64 count, size, larger;
  Parts(i64 n, i64 most) : count((n + most - 1) / most), size(count ? n / count : 0), larger(count ? n % count : 0) {}
  i64 operator[](i64 i) const { return size + (i < larger); }
  i64 start(i64 i) const { return i * size + std::min(i, larger); }
};

template <class T>
struct Packed {
  T* data = nullptr;
  i64 vectors = 0, depth = 0;  // output vectors, K

  i64 elements() const { return vectors * depth * Simd<T>::W; }
};

template <class T, int R, int N>
SKIP_RNN_INLINE void multiply_tile(const T* w, i64 depth, const T* const* a, const T* const* from, T* const* out, i64 at,
                                   const T* ahead, i64 ahead_end) {
  using S = Simd<T>;
  typename S::V acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[r][j] = load(from[r] + at + j * S::W);
  for (i64 k = 0; k < depth; ++k, w += N * S::W) {
    typename S::V row[N];
    if (k < ahead_end) __builtin_prefetch(ahead + k * (64 / sizeof(T)), 0, 2);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load(w + j * S::W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto x = splat(a[r][k]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[r][j] = fma(x, row[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(out[r] + at + j * S::W, acc[r][j]);
}

template <class T, int R>
void multiply_rows(int n, const T* w, i64 depth, const T* const* a, const T* const* from, T* const* out, i64 at,
                   const T* ahead, i64 ahead_end) {
  const T* x[R];
  const T* f[R];
  T* o[R];
  for (int r = 0; r < R; ++r) x[r] = a[r], f[r] = from[r], o[r] = out[r];
  switch (n) {
    case 1: return multiply_tile<T, R, 1>(w, depth, x, f, o, at, ahead, ahead_end);
    case 2: return multiply_tile<T, R, 2>(w, depth, x, f, o, at, ahead, ahead_end);
    case 3: return multiply_tile<T, R, 3>(w, depth, x, f, o, at, ahead, ahead_end);
    default: return multiply_tile<T, R, 4>(w, depth, x, f, o, at, ahead, ahead_end);
  }
}

// out[r] = from[r] + a[r] W for `rows` rows; from and out may be the same. Walking the panels backwards every other call
// begins with what the call before left in the first-level cache.
template <class T>
void multiply(const Packed<T>& m, i64 rows, const T* const* a, const T* const* from, T* const* out, bool backwards = false) {
  const Parts panels(m.vectors, kVectors), tiles(rows, kRows), depths(m.depth, kDepth);
  const T* deep[kRows];
  constexpr i64 kLine = 64 / sizeof(T);
  const bool large = m.elements() * i64(sizeof(T)) > kPrefetched;
  i64 k = 0;
  for (i64 d = 0; d < depths.count; k += depths[d++]) {
    for (i64 i = 0; i < panels.count; ++i) {
      const i64 p = backwards ? panels.count - 1 - i : i, vector = panels.start(p);
      const int n = int(panels[p]);
      const T* w = m.data + (vector * m.depth + k * n) * Simd<T>::W;
      i64 row = 0;
      for (i64 t = 0; t < tiles.count; row += tiles[t++]) {
        const int r = int(tiles[t]);
        for (int i = 0; i < r; ++i) deep[i] = a[row + i] + k;
        // This tile's share of the cache lines of the block after this one.
        const i64 lines = large ? (n * Simd<T>::W * depths[d] + tiles.count * kLine - 1) / (tiles.count * kLine) : 0;
        const T* ahead = w + n * Simd<T>::W * depths[d] + t * lines * kLine;
        const T* const* init = d ? out + row : from + row;
        const i64 at = vector * Simd<T>::W;
        switch (r) {
          case 1: multiply_rows<T, 1>(n, w, depths[d], deep, init, out + row, at, ahead, lines); break;
          case 2: multiply_rows<T, 2>(n, w, depths[d], deep, init, out + row, at, ahead, lines); break;
          case 3: multiply_rows<T, 3>(n, w, depths[d], deep, init, out + row, at, ahead, lines); break;
#if defined(__AVX512F__)
          case 4: multiply_rows<T, 4>(n, w, depths[d], deep, init, out + row, at, ahead, lines); break;
          case 5: multiply_rows<T, 5>(n, w, depths[d], deep, init, out + row, at, ahead, lines); break;
          default: multiply_rows<T, 6>(n, w, depths[d], deep, init, out + row, at, ahead, lines); break;
#endif
        }
      }
    }
  }
}

template <class T, int C, int N>
SKIP_RNN_INLINE void outer_tile(i64 events, const T* g, const T* a, T* out, i64 ld) {
  using S = Simd<T>;
  typename S::V acc[C][N];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[c][j] = load(out + c * ld + j * S::W);
  for (i64 e = 0; e < events; ++e, g += N * S::W, a += C) {
    typename S::V v[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) v[j] = load(g + j * S::W);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const auto s = splat(a[c]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[c][j] = fma(s, v[j], acc[c][j]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(out + c * ld + j * S::W, acc[c][j]);
}

template <class T, int C>
void outer_columns(int n, i64 events, const T* g, const T* a, T* out, i64 ld) {
  switch (n) {
    case 1: return outer_tile<T, C, 1>(events, g, a, out, ld);
    case 2: return outer_tile<T, C, 2>(events, g, a, out, ld);
    case 3: return outer_tile<T, C, 3>(events, g, a, out, ld);
    default: return outer_tile<T, C, 4>(events, g, a, out, ld);
  }
}

// Rows a[e] -> [tile of columns][e][column of the tile]: a tile's walk over the events is then one stream.
template <class T>
void pack_columns(i64 events, const T* const* a, i64 columns, T* out) {
  const Parts tiles(columns, kRows);
  constexpr i64 kTogether = 8;  // tiles of one walk over the rows: whole cache lines of each
  i64 column = 0;
  for (i64 first = 0; first < tiles.count; first += kTogether) {
    const i64 last = std::min(tiles.count, first + kTogether);
    i64 next = column;
    for (i64 e = 0; e < events; ++e) {
      next = column;
      for (i64 t = first; t < last; next += tiles[t++]) {
        T* to = out + next * events + e * tiles[t];
        for (i64 i = 0; i < tiles[t]; ++i) to[i] = a[e][next + i];
      }
    }
    column = next;
  }
}

// out[c][.] += sum over events of a[e][c] g[e][.]: out is [columns, vectors * W]. scratch: events * (columns + kVectors * W).
template <class T>
void add_outer(i64 events, const T* const* g, i64 vectors, const T* const* a, i64 columns, T* out, T* scratch) {
  if (!events) return;
  const Parts panels(vectors, kVectors), tiles(columns, kRows);
  const i64 ld = vectors * Simd<T>::W;
  T *panel = scratch, *packed = scratch + events * kVectors * Simd<T>::W;
  pack_columns(events, a, columns, packed);
  i64 vector = 0;
  for (i64 p = 0; p < panels.count; vector += panels[p++]) {
    const int n = int(panels[p]);
    const i64 at = vector * Simd<T>::W, width = n * Simd<T>::W;
    for (i64 e = 0; e < events; ++e) std::memcpy(panel + e * width, g[e] + at, width * sizeof(T));
    i64 c = 0;
    for (i64 t = 0; t < tiles.count; c += tiles[t++]) {
      T* to = out + c * ld + at;
      const T* from = packed + c * events;
      switch (tiles[t]) {
        case 1: outer_columns<T, 1>(n, events, panel, from, to, ld); break;
        case 2: outer_columns<T, 2>(n, events, panel, from, to, ld); break;
        case 3: outer_columns<T, 3>(n, events, panel, from, to, ld); break;
#if defined(__AVX512F__)
        case 4: outer_columns<T, 4>(n, events, panel, from, to, ld); break;
        case 5: outer_columns<T, 5>(n, events, panel, from, to, ld); break;
        default: outer_columns<T, 6>(n, events, panel, from, to, ld); break;
#endif
      }
    }
  }
}

// A weight's gates in the order in which the packed units hold them; each gate is padded to whole vectors.
struct GateOrder {
  int count;
  int gate[4];
};

// W [gates * H, depth] -> packed, out = a W^T: unit (g, u) is row order.gate[g] * H + u.
template <class T>
void pack(Packed<T>& m, const T* weight, i64 units, i64 padded, const GateOrder& order) {
  constexpr int W = Simd<T>::W;
  const Parts panels(m.vectors, kVectors);
  const i64 blocks = padded / W;
  i64 vector = 0;
  for (i64 p = 0; p < panels.count; vector += panels[p++]) {
    const i64 n = panels[p];
    T* panel = m.data + vector * m.depth * W;
    const T* rows[kVectors * W];
    for (i64 i = 0; i < n * W; ++i) {
      const i64 v = vector + i / W, unit = v % blocks * W + i % W;
      rows[i] = unit < units ? weight + (order.gate[v / blocks] * units + unit) * m.depth : nullptr;
    }
    for (i64 k0 = 0; k0 < m.depth; k0 += 16) {  // a block of k: reads and writes both stay within cache lines
      const i64 k1 = std::min(m.depth, k0 + 16);
      for (i64 i = 0; i < n * W; ++i)
        for (i64 k = k0; k < k1; ++k) panel[k * n * W + i] = rows[i] ? rows[i][k] : T(0);
    }
  }
}

// W [gates * H, columns] -> packed, out = g W for g [count * padded] laid out as the packed units of `pack`.
template <class T>
void pack_transposed(Packed<T>& m, const T* weight, i64 units, i64 padded, i64 columns, const GateOrder& order) {
  constexpr int W = Simd<T>::W;
  const Parts panels(m.vectors, kVectors);
  i64 vector = 0;
  for (i64 p = 0; p < panels.count; vector += panels[p++]) {
    const i64 n = panels[p] * W, first = vector * W;
    const i64 filled = std::max<i64>(0, std::min(n, columns - first));
    T* to = m.data + vector * m.depth * W;
    for (int g = 0; g < order.count; ++g)
      for (i64 u = 0; u < padded; ++u, to += n) {
        const i64 count = u < units ? filled : 0;
        if (count) std::memcpy(to, weight + (order.gate[g] * units + u) * columns + first, count * sizeof(T));
        std::fill(to + count, to + n, T(0));
      }
  }
}

// sum over partial results [depth, count * padded], each `stride` apart -> W [gates * H, depth]
template <class T>
void unpack_sum(const T* partial, i64 partials, i64 stride, T* weight, i64 units, i64 padded, i64 depth,
                const GateOrder& order) {
  constexpr i64 kBlock = 16;  // squares, so that reads and writes both use whole cache lines
  T square[kBlock][kBlock];
  for (int g = 0; g < order.count; ++g)
    for (i64 u0 = 0; u0 < units; u0 += kBlock)
      for (i64 k0 = 0; k0 < depth; k0 += kBlock) {
        const i64 us = std::min(kBlock, units - u0), ks = std::min(kBlock, depth - k0);
        for (i64 k = 0; k < ks; ++k) {
          const T* from = partial + ((k0 + k) * order.count + g) * padded + u0;
          for (i64 u = 0; u < us; ++u) square[k][u] = from[u];
          for (i64 i = 1; i < partials; ++i)
            for (i64 u = 0; u < us; ++u) square[k][u] += from[i * stride + u];
        }
        for (i64 u = 0; u < us; ++u)
          for (i64 k = 0; k < ks; ++k) weight[(order.gate[g] * units + u0 + u) * depth + k0 + k] = square[k][u];
      }
}

}  // namespace
