// Matrix products on packed weights.
//
// A packed matrix is divided into panels of a few vectors of output units. A panel stores its rows k one after the other, so
// that the inner loop reads memory in order. Each output is the sum over k in order. So a row's result does not depend on the
// rows that are computed together with it, nor on tiles and blocks.
#pragma once

#include <unistd.h>

#include <algorithm>

#include "simd.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

// The size of this machine's second-level cache in bytes. Where the system does not tell, that of a small one.
inline i64 second_level_cache() {
#if defined(__APPLE__)
  i64 bytes = 0;
  std::size_t size = sizeof bytes;
  if (sysctlbyname("hw.l2cachesize", &bytes, &size, nullptr, 0)) bytes = 0;
#elif defined(_SC_LEVEL2_CACHE_SIZE)
  const i64 bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  const i64 bytes = 0;
#endif
  return std::clamp<i64>(bytes > 0 ? bytes : 512 << 10, 256 << 10, 4 << 20);
}

// Blocking by that size. It changes no result: each output is added up in the same order.
const i64 kSecondLevelCache = second_level_cache();
const i64 kDepth = kSecondLevelCache / 5 / (kVectors * kBytes);  // rows k of a panel: all rows of a product use them in turn
const i64 kPrefetched = kSecondLevelCache / 2;                   // larger weights are prefetched panel by panel
// bfloat16 weights stay so in memory where in float32 they would not fit that cache beside the rest; otherwise reading them
// takes less time than widening them anew in every step.
#ifndef SKIP_RNN_PAIRS_ABOVE  // the fuzz driver's
#define SKIP_RNN_PAIRS_ABOVE (kSecondLevelCache / 2)
#endif
const i64 kPairsAbove = SKIP_RNN_PAIRS_ABOVE;  // bytes of a stack's weights in float32
template <class T>
constexpr i64 kLine = 64 / sizeof(T);  // numbers of a cache line

// n divided into the fewest parts of at most `most`; sizes differ by at most one.
struct Parts {
  i64 count, size, larger;
  Parts(i64 n, i64 most) : count((n + most - 1) / most), size(count ? n / count : 0), larger(count ? n % count : 0) {}
  i64 operator[](i64 i) const { return size + (i < larger); }
  i64 start(i64 i) const { return i * size + std::min(i, larger); }
  i64 part_of(i64 at) const {
    const i64 in_larger = larger * (size + 1);
    return at < in_larger ? at / (size + 1) : larger + (at - in_larger) / size;
  }
};

// AMX multiplies tiles of 16 rows of 32 bfloat16 numbers.
constexpr i64 kTileRows = 16, kTileDepth = 32, kTileNumbers = kTileRows * kTileDepth;
constexpr i64 tiles_of(i64 depth) { return (depth + kTileDepth - 1) / kTileDepth; }

// Units are packed in blocks of W, one vector an activation. Where activations are interleaved, all vectors of a block are in
// one panel: their products are then in registers at the same time.
template <class T>
struct Packed {
  T* data = nullptr;
  i64 vectors = 0, depth = 0;       // output vectors; rows k
  i64 interleaved = 1, padded = 0;  // activations in a panel; distance of one activation from the next in the product
  bool pairs = false;               // rows 2 k and 2 k + 1 are one row of pairs of bfloat16 numbers
  bool amx = false;                 // for amx.h: the pairs are whole tiles, filled with zeros

  i64 rows() const { return amx ? tiles_of(depth) * kTileDepth / 2 : pairs ? (depth + 1) / 2 : depth; }
  i64 elements() const { return vectors * rows() * Simd<T>::W; }
  // Panels, in blocks. With one activation they have up to kVectors vectors, with two or four they have 4, with three 6.
  Parts panels() const { return Parts(vectors / interleaved, interleaved == 1 ? kVectors : interleaved == 4 ? 1 : 2); }
  // The offset in the product of vector j of a panel that begins with `block`.
  i64 offset(i64 block, i64 j) const { return j % interleaved * padded + (block + j / interleaved) * Simd<T>::W; }
};

// The weights and the place of one tile of a product, and the cache lines of the next panel to be prefetched meanwhile.
template <class T>
struct Tile {
  const T* w;
  i64 depth, row, at;  // at: the first unit
  const T* ahead;
  i64 ahead_lines;
};

constexpr int kPairRows = std::max(3, kRows - 2);  // rows of a tile of pairs, which takes more registers
template <bool Pairs>
constexpr i64 kTogether = Pairs ? 2 : 1;  // rows k in a packed row

// Calls add with the rows k of a packed row, and with the part of its numbers that each one is.
template <bool Pairs, class Add>
SKIP_RNN_INLINE void add_rows(i64 k, const Add& add) {
  add(k, std::integral_constant<int, Pairs ? kFirst : kWhole>());
  if constexpr (Pairs) {
    asm volatile("" ::: "memory");  // both rows at once would take more registers than there are
    add(k + 1, std::integral_constant<int, kSecond>());
  }
}

// A function of its own: where gcc inlines it, it keeps some sums on the stack.
template <class T, bool Pairs, int R, int N>
__attribute__((noinline)) void multiply_tile(const Tile<T>& tile, const T* const* a, const T* const* from, T* const* out) {
  using S = Simd<T>;
  const T *w = tile.w, *x[R];
  typename S::V acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    x[r] = a[r];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[r][j] = load(from[tile.row + r] + tile.at + j * S::W);
  }
  const auto add = [&](i64 k, auto part) SKIP_RNN_INLINE_LAMBDA {
    typename S::V row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = part_of<part()>(load(w + j * S::W));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto value = splat(x[r][k]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[r][j] = fma(value, row[j], acc[r][j]);
    }
  };
  constexpr i64 kStep = kTogether<Pairs>;
  const i64 whole = tile.depth / kStep, fetching = std::min(whole, tile.ahead_lines);
  i64 i = 0;
  for (; i < fetching; ++i, w += N * S::W) {
    __builtin_prefetch(tile.ahead + i * kLine<T>, 0, 2);
    add_rows<Pairs>(i * kStep, add);
  }
  for (; i < whole; ++i, w += N * S::W) add_rows<Pairs>(i * kStep, add);
  if (i * kStep < tile.depth) add(i * kStep, std::integral_constant<int, kFirst>());
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(out[tile.row + r] + tile.at + j * S::W, acc[r][j]);
}

// Calls run with n, which is 1 .. Most, as a compile-time constant.
template <int Most, class Run>
SKIP_RNN_INLINE void with_constant(i64 n, const Run& run) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, run);
  }
  run(std::integral_constant<int, Most>());
}

// Stores a finished product of one row.
template <class T>
struct Stored {
  static constexpr int kActivations = 1;
  T* out;

  template <int N>
  SKIP_RNN_INLINE void operator()(i64 block, const typename Simd<T>::V (&product)[N]) const {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(out + block * Simd<T>::W + j * Simd<T>::W, product[j]);
  }
};

constexpr i64 kFirstLines = 32;  // cache lines of the next panel to prefetch before a panel's product is completed

// One row's product with P panels of N vectors. A single panel often has too few independent sums to keep the multipliers busy.
// A function of its own: where gcc inlines it, the loop has too few registers for addresses.
template <class T, bool Pairs, int P, int N, class Finish>
__attribute__((noinline)) void multiply_panels(const Packed<T>& m, const T* w, i64 block, const T* next, const T* a, const T* from, const Finish& finish) {
  using S = Simd<T>;
  const i64 depth = m.depth, panel = m.rows() * N * S::W, blocks = N / m.interleaved;
  typename S::V acc[P][N];
  const T* weight[P];  // a row of each panel
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    weight[p] = w + p * panel;
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[p][j] = load(from + m.offset(block + p * blocks, j));
  }
  const auto add = [&](i64 k, auto part) SKIP_RNN_INLINE_LAMBDA {
    const auto value = splat(a[k]);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[p][j] = fma(value, part_of<part()>(load(weight[p] + j * S::W)), acc[p][j]);
  };
  i64 k = 0;
  for (; k + kTogether<Pairs> <= depth; k += kTogether<Pairs>) {
    add_rows<Pairs>(k, add);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) weight[p] += N * S::W;
  }
  if (k < depth) add(k, std::integral_constant<int, kFirst>());
#pragma GCC unroll 4
  for (i64 i = 0; i < kFirstLines; ++i) __builtin_prefetch(next + i * kLine<T>, 0, 3);
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) finish.template operator()<N>(block + p * blocks, acc[p]);
}

// The number of panels of n vectors that one row is multiplied with at once.
constexpr int panels_at_once(int n, bool pairs) { return n == 1 ? 1 : std::max(1, (pairs ? 8 : kSums) / n); }

// from + a W for one row. `finish` is called with the product of each panel while it is in registers. A caller may alternate
// the direction: a call then starts with the panels that the call before left in the first-level cache.
template <class T, bool Pairs, class Finish>
void multiply_one_as(const Packed<T>& m, const T* a, const T* from, const Finish& finish, bool backwards) {
  constexpr int G = Finish::kActivations;
  const Parts panels = m.panels();
  const auto panel = [&](i64 p) { return m.data + panels.start(p) * m.rows() * m.interleaved * Simd<T>::W; };
  for (i64 done = 0, together; done < panels.count; done += together) {
    const i64 edge = backwards ? panels.count - 1 - done : done;
    const i64 n = panels[edge] * m.interleaved, most = std::min<i64>(panels_at_once(int(n), Pairs), panels.count - done);
    const i64 other = backwards ? edge - most + 1 : edge + most - 1;
    together = most == panels_at_once(int(n), Pairs) && panels[other] == panels[edge] ? most : 1;
    const i64 p = backwards ? edge - together + 1 : edge, after = backwards ? p - 1 : p + together;
    const T* next = panel(0 <= after && after < panels.count ? after : p);
    const auto run = [&](auto n) {
      constexpr int N = n(), P = panels_at_once(N, Pairs);
      if constexpr (N % G == 0) {
        if (together == P) multiply_panels<T, Pairs, P, N>(m, panel(p), panels.start(p), next, a, from, finish);
        else multiply_panels<T, Pairs, 1, N>(m, panel(p), panels.start(p), next, a, from, finish);
      }
    };
    switch (n) {
      case 1: run(std::integral_constant<int, 1>()); break;
      case 2: run(std::integral_constant<int, 2>()); break;
      case 3: run(std::integral_constant<int, 3>()); break;
      case 4: run(std::integral_constant<int, 4>()); break;
      default: run(std::integral_constant<int, 6>()); break;
    }
  }
}

template <class T, class Finish>
void multiply_one(const Packed<T>& m, const T* a, const T* from, const Finish& finish, bool backwards = false) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (m.pairs) return multiply_one_as<T, true>(m, a, from, finish, backwards);
  }
  multiply_one_as<T, false>(m, a, from, finish, backwards);
}

template <class T, bool Pairs>
void multiply_rows(const Packed<T>& m, i64 rows, const T* const* a, const T* const* from, T* const* out) {
  constexpr int kMost = Pairs ? kPairRows : kRows;
  const Parts panels = m.panels(), tiles(rows, kMost), depths(m.rows(), kDepth);
  const bool fetches = m.elements() * i64(sizeof(T)) > kPrefetched;
  const T* deep[kRows];
  i64 k = 0;
  for (i64 d = 0; d < depths.count; k += depths[d++]) {
    const T* const* start = d ? out : from;
    for (i64 p = 0; p < panels.count; ++p) {
      const auto panel = [&](i64 at) { return m.data + (panels.start(at) * m.rows() + k * panels[at]) * Simd<T>::W; };
      const i64 lines = fetches && p + 1 < panels.count ? panels[p] * depths[d] * Simd<T>::W / kLine<T> : 0;
      const i64 share = (lines + tiles.count - 1) / tiles.count;  // of the next panel's lines, a tile
      for (i64 t = 0; t < tiles.count; ++t) {
        const i64 row = tiles.start(t);
        const int r = int(tiles[t]), n = int(panels[p]);
        const i64 first = k * kTogether<Pairs>, depth = std::min(depths[d] * kTogether<Pairs>, m.depth - first);
        for (int j = 0; j < r; ++j) deep[j] = a[row + j] + first;
        const Tile<T> tile{panel(p), depth, row, panels.start(p) * Simd<T>::W,
                           share ? panel(p + 1) + t * share * kLine<T> : nullptr, share};
        with_constant<kMost>(r, [&](auto rows) {  // at least 2: even parts of two or more rows
          if constexpr (rows() > 1)
            with_constant<kVectors>(n, [&](auto vectors) {
              multiply_tile<T, Pairs, rows(), vectors()>(tile, deep, start, out);
            });
        });
      }
    }
  }
}

// out[r] = from[r] + a[r] W for `rows` rows; from and out may be the same.
template <class T>
void multiply(const Packed<T>& m, i64 rows, const T* const* a, const T* const* from, T* const* out) {
  if (rows == 1) return multiply_one(m, a[0], from[0], Stored<T>{out[0]});
  if (!rows) return;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (m.pairs) return multiply_rows<T, true>(m, rows, a, from, out);
  }
  multiply_rows<T, false>(m, rows, a, from, out);
}

// A function of its own: where gcc inlines it, it keeps some sums on the stack.
template <class T, int Columns, int N>
__attribute__((noinline)) void outer_tile(i64 events, const T* g, const T* a, T* out, i64 ld) {
  using S = Simd<T>;
  typename S::V acc[Columns][N];
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[c][j] = load(out + c * ld + j * S::W);
  for (i64 e = 0; e < events; ++e, g += N * S::W, a += Columns) {
    typename S::V v[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) v[j] = load(g + j * S::W);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      const auto s = splat(a[c]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[c][j] = fma(s, v[j], acc[c][j]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(out + c * ld + j * S::W, acc[c][j]);
}

// Copies rows a[e] into the layout [tile of columns][e][column of the tile]: a tile then reads memory in order.
template <class T>
void pack_columns(i64 events, const T* const* a, i64 columns, T* out) {
  const Parts tiles(columns, kRows);
  constexpr i64 kTogether = 8;  // tiles copied in one pass over the rows: together they use whole cache lines
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
      with_constant<kRows>(tiles[t], [&](auto columns) {
        with_constant<kVectors>(n, [&](auto vectors) { outer_tile<T, columns(), vectors()>(events, panel, from, to, ld); });
      });
    }
  }
}

// Which activations of a weight are packed, and in which order. Each one is padded to whole vectors.
struct ActivationOrder {
  int count;
  int source[4];
};

// Transposes a square: exchanges halves, then halves of the halves.
template <class T, i64 Half = Simd<T>::W / 2>
SKIP_RNN_INLINE void transpose(typename Simd<T>::V* square) {
  constexpr int W = Simd<T>::W;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & Half) continue;
    const auto a = square[i], b = square[i + Half];
    square[i] = interleave<T, Half, false>(a, b);
    square[i + Half] = interleave<T, Half, true>(a, b);
  }
  if constexpr (Half > 1) transpose<T, Half / 2>(square);
}

// Packs W [G H, depth] for out = a W^T. Unit u of packed activation g is row order.source[g] * H + u of W.
template <class T, class Source>
void pack(Packed<T>& m, const Source* weight, i64 units, i64 padded, const ActivationOrder& order) {
  constexpr int W = Simd<T>::W;
  const Parts panels = m.panels();
  const i64 blocks = padded / W;
  for (i64 v = 0; v < m.vectors; ++v) {
    const i64 activation = m.interleaved > 1 ? v % m.interleaved : v / blocks;
    const i64 first = (m.interleaved > 1 ? v / m.interleaved : v % blocks) * W;
    const i64 filled = std::max<i64>(0, std::min<i64>(W, units - first)), panel = panels.part_of(v / m.interleaved);
    const i64 begin = panels.start(panel) * m.interleaved, stride = panels[panel] * m.interleaved * W;
    const Source* from = weight + (order.source[activation] * units + first) * m.depth;
    T* to = m.data + begin * m.rows() * W + (v - begin) * W;
    for (i64 k = 0; k < m.depth; k += W) {
      const i64 count = std::min<i64>(W, m.depth - k);
      typename Simd<T>::V square[W];
      for (i64 i = 0; i < W; ++i) {
        if (i >= filled) square[i] = splat(T(0));
        else if (count == W) square[i] = load(from + i * m.depth + k);
        else {
          Source part[W] = {};
          std::memcpy(part, from + i * m.depth + k, count * sizeof(Source));
          square[i] = load(part);
        }
      }
      transpose<T>(square);
      if constexpr (sizeof(T) == sizeof(float)) {
        if (m.pairs) {
          for (i64 i = 0; i < count; i += 2) store(to + (k + i) / 2 * stride, pair_of(square[i], square[i + 1]));
          continue;
        }
      }
      for (i64 i = 0; i < count; ++i) store(to + (k + i) * stride, square[i]);
    }
    for (i64 k = (m.depth + 1) / 2; m.amx && k < m.rows(); ++k) store(to + k * stride, splat(T(0)));
  }
}

// Packs W [G H, columns] for out = g W, where g [count * padded] has the order of the units that `pack` makes.
template <class T>
void pack_transposed(Packed<T>& m, const T* weight, i64 units, i64 padded, i64 columns, const ActivationOrder& order) {
  constexpr int W = Simd<T>::W;
  const Parts panels = m.panels();
  i64 vector = 0;
  for (i64 p = 0; p < panels.count; vector += panels[p++]) {
    const i64 n = panels[p] * W, first = vector * W;
    const i64 filled = std::max<i64>(0, std::min(n, columns - first));
    T *to = m.data + vector * m.rows() * W, second[kVectors * W];
    T* const end = to + m.rows() * n;
    const auto copy = [&](int g, i64 u, T* row) {
      const i64 count = u < units ? filled : 0;
      if (count) std::memcpy(row, weight + (order.source[g] * units + u) * columns + first, count * sizeof(T));
      std::fill(row + count, row + n, T(0));
    };
    for (int g = 0; g < order.count; ++g)
      for (i64 u = 0; u < padded; u += m.pairs ? 2 : 1, to += n) {
        copy(g, u, to);
        if constexpr (sizeof(T) == sizeof(float)) {
          if (!m.pairs) continue;
          copy(g, u + 1, second);
          for (i64 i = 0; i < n; i += W) store(to + i, pair_of(load(to + i), load(second + i)));
        }
      }
    std::fill(to, end, T(0));
  }
}

// Adds partial results [depth, count * padded], which are `stride` apart, and writes the sum to W [G H, depth].
template <class T>
void unpack_sum(const T* partial, i64 partials, i64 stride, T* weight, i64 units, i64 padded, i64 depth,
                const ActivationOrder& order) {
  constexpr i64 kBlock = 16;  // squares: reads and writes then both use whole cache lines
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
          for (i64 k = 0; k < ks; ++k) weight[(order.source[g] * units + u0 + u) * depth + k0 + k] = square[k][u];
      }
}

}  // namespace
