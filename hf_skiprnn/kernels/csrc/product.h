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

// Split n into the fewest parts of at most `most`, sizes differing by at most one.
struct Parts {
  i64 count, size, larger;
  Parts(i64 n, i64 most) : count((n + most - 1) / most), size(count ? n / count : 0), larger(count ? n % count : 0) {}
  i64 operator[](i64 i) const { return size + (i < larger); }
};

template <class T>
struct Packed {
  T* data = nullptr;
  i64 vectors = 0, depth = 0;  // output vectors, K

  i64 elements() const { return vectors * depth * Simd<T>::W; }
};

template <class T, int R, int N>
SKIP_RNN_INLINE void multiply_tile(const T* w, i64 depth, const T* const* a, const T* const* from, T* const* out, i64 at) {
  using S = Simd<T>;
  typename S::V acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[r][j] = load(from[r] + at + j * S::W);
  for (i64 k = 0; k < depth; ++k, w += N * S::W) {
    typename S::V row[N];
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
void multiply_rows(int n, const T* w, i64 depth, const T* const* a, const T* const* from, T* const* out, i64 at) {
  const T* x[R];
  const T* f[R];
  T* o[R];
  for (int r = 0; r < R; ++r) x[r] = a[r], f[r] = from[r], o[r] = out[r];
  switch (n) {
    case 1: return multiply_tile<T, R, 1>(w, depth, x, f, o, at);
    case 2: return multiply_tile<T, R, 2>(w, depth, x, f, o, at);
    case 3: return multiply_tile<T, R, 3>(w, depth, x, f, o, at);
    default: return multiply_tile<T, R, 4>(w, depth, x, f, o, at);
  }
}

// out[r] = from[r] + a[r] W for `rows` rows; from and out may be the same.
template <class T>
void multiply(const Packed<T>& m, i64 rows, const T* const* a, const T* const* from, T* const* out) {
  const Parts panels(m.vectors, kVectors), tiles(rows, kRows), depths(m.depth, kDepth);
  const T* deep[kRows];
  i64 k = 0;
  for (i64 d = 0; d < depths.count; k += depths[d++]) {
    i64 vector = 0;
    for (i64 p = 0; p < panels.count; vector += panels[p++]) {
      const int n = int(panels[p]);
      const T* w = m.data + (vector * m.depth + k * n) * Simd<T>::W;
      i64 row = 0;
      for (i64 t = 0; t < tiles.count; row += tiles[t++]) {
        const int r = int(tiles[t]);
        for (int i = 0; i < r; ++i) deep[i] = a[row + i] + k;
        const T* const* init = d ? out + row : from + row;
        const i64 at = vector * Simd<T>::W;
        switch (r) {
          case 1: multiply_rows<T, 1>(n, w, depths[d], deep, init, out + row, at); break;
          case 2: multiply_rows<T, 2>(n, w, depths[d], deep, init, out + row, at); break;
          case 3: multiply_rows<T, 3>(n, w, depths[d], deep, init, out + row, at); break;
#if defined(__AVX512F__)
          case 4: multiply_rows<T, 4>(n, w, depths[d], deep, init, out + row, at); break;
          case 5: multiply_rows<T, 5>(n, w, depths[d], deep, init, out + row, at); break;
          default: multiply_rows<T, 6>(n, w, depths[d], deep, init, out + row, at); break;
#endif
        }
      }
    }
  }
}

template <class T, int C, int N>
SKIP_RNN_INLINE void outer_tile(i64 events, const T* const* g, i64 at, const T* const* a, i64 column, T* out, i64 ld) {
  using S = Simd<T>;
  typename S::V acc[C][N];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[c][j] = load(out + c * ld + j * S::W);
  for (i64 e = 0; e < events; ++e) {
    const T *row = g[e] + at, *x = a[e] + column;
    typename S::V v[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) v[j] = load(row + j * S::W);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const auto s = splat(x[c]);
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
void outer_columns(int n, i64 events, const T* const* g, i64 at, const T* const* a, i64 column, T* out, i64 ld) {
  switch (n) {
    case 1: return outer_tile<T, C, 1>(events, g, at, a, column, out, ld);
    case 2: return outer_tile<T, C, 2>(events, g, at, a, column, out, ld);
    case 3: return outer_tile<T, C, 3>(events, g, at, a, column, out, ld);
    default: return outer_tile<T, C, 4>(events, g, at, a, column, out, ld);
  }
}

// out[c][.] += sum over events of a[e][c] g[e][.]: out is [columns, vectors * W].
template <class T>
void add_outer(i64 events, const T* const* g, i64 vectors, const T* const* a, i64 columns, T* out) {
  const Parts panels(vectors, kVectors), tiles(columns, kRows);
  const i64 ld = vectors * Simd<T>::W;
  if (!events) return;
  i64 vector = 0;
  for (i64 p = 0; p < panels.count; vector += panels[p++]) {
    const int n = int(panels[p]);
    const i64 at = vector * Simd<T>::W;
    i64 c = 0;
    for (i64 t = 0; t < tiles.count; c += tiles[t++]) {
      T* to = out + c * ld + at;
      switch (tiles[t]) {
        case 1: outer_columns<T, 1>(n, events, g, at, a, c, to, ld); break;
        case 2: outer_columns<T, 2>(n, events, g, at, a, c, to, ld); break;
        case 3: outer_columns<T, 3>(n, events, g, at, a, c, to, ld); break;
#if defined(__AVX512F__)
        case 4: outer_columns<T, 4>(n, events, g, at, a, c, to, ld); break;
        case 5: outer_columns<T, 5>(n, events, g, at, a, c, to, ld); break;
        default: outer_columns<T, 6>(n, events, g, at, a, c, to, ld); break;
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
  for (int g = 0; g < order.count; ++g)
    for (i64 u0 = 0; u0 < units; u0 += 16)
      for (i64 k = 0; k < depth; ++k)
        for (i64 u = u0; u < std::min(units, u0 + 16); ++u) {
          const T* from = partial + (k * order.count + g) * padded + u;
          T s = 0;
          for (i64 i = 0; i < partials; ++i) s += from[i * stride];
          weight[(order.gate[g] * units + u) * depth + k] = s;
        }
}

}  // namespace
