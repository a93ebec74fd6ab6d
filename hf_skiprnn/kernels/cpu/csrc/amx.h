// Products with bfloat16 weights on the matrix unit of newer Intel processors (AMX).
//
// It multiplies 16 rows of 32 bfloat16 numbers with 32 rows of 16 and adds in float32. Weights are packed as pairs (product.h).
// Bfloat16 numbers are multiplied as they are. A float32 number is split into three bfloat16 numbers whose sum is exactly that
// number. Each part is a row of the tile, and the products of the parts are added. So products of finite weights are exact, and
// a row's sums do not depend on the rows that are computed together with it.
#pragma once

#include "product.h"

#if defined(SKIP_RNN_AMX)  // 0 for an assembler that does not know the unit
#elif defined(__x86_64__) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define SKIP_RNN_AMX 1
#else
#define SKIP_RNN_AMX 0
#endif
#if SKIP_RNN_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace {

struct Rounded {
  float value;  // a bfloat16 number
};
// How many bfloat16 numbers a number is split into.
template <class Number>
constexpr i64 kPartsOf = std::is_same_v<Number, float> ? 3 : 1;

// Rows of a tile: of bfloat16 numbers, or of numbers of `parts` parts.
constexpr i64 rows_of_tile(i64 parts) { return kTileRows / parts; }
#ifndef SKIP_RNN_OUTER_TILES  // the fuzz driver's
#define SKIP_RNN_OUTER_TILES 512  // tiles of 1 KB that an outer product transposes at once
#endif
// An outer product takes blocks of 16 columns: the tiles of a block, and how many blocks are transposed at once.
template <class Number>
constexpr i64 block_tiles(i64 events) { return tiles_of(events) * kPartsOf<Number>; }
template <class Number>
constexpr i64 outer_blocks(i64 events) { return std::max<i64>(2, SKIP_RNN_OUTER_TILES / block_tiles<Number>(events)); }
// How many bfloat16 numbers the working memory of an outer product has. It is enough for fewer events, too.
template <class Number>
constexpr i64 outer_numbers(i64 events, i64 columns) {
  const i64 block = block_tiles<Number>(events), all = (columns + kTileRows - 1) / kTileRows * block;
  return (2 * block_tiles<float>(events) + std::min(all, std::max<i64>(2 * block, SKIP_RNN_OUTER_TILES))) * kTileNumbers;
}
// How many the working memory of a product has.
template <class Number>
constexpr i64 tile_numbers(i64 rows, i64 depth) {
  constexpr i64 kRowsOfTile = rows_of_tile(kPartsOf<Number>);
  return (rows + kRowsOfTile - 1) / kRowsOfTile * tiles_of(depth) * kTileNumbers;
}

// Whether this machine and its operating system have the unit.
inline bool has_amx() {
#if SKIP_RNN_AMX
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kUnit = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kUnit)) != (kBf16 | kUnit)) return false;
  constexpr long kSupported = 0x1021, kTileData = 1 << 18;  // ARCH_GET_XCOMP_SUPP
  unsigned long supported = 0;
  return syscall(SYS_arch_prctl, kSupported, &supported) == 0 && supported & kTileData;
#else
  return false;
#endif
}

#if SKIP_RNN_AMX && defined(__AVX512F__)

// Asks Linux, once, to let this process use the unit. Signal stacks must then have room for the tiles, so no process asks that
// does not need it. Returns whether it may.
inline bool may_use_amx() {
  static const bool may = [] {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return has_amx() && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return may;
}

#define SKIP_RNN_AMX_CODE __attribute__((target("amx-tile,amx-bf16")))

// A thread's tiles, while this lives: 0-3 sums, 4 and 5 rows, 6 and 7 weights. All have 16 rows of 64 bytes.
class AmxSession {
 public:
  explicit AmxSession(bool used) : used_(used) {
    if (used) configure();
  }
  ~AmxSession() {
    if (used_) release();
  }
  AmxSession(const AmxSession&) = delete;

 private:
  SKIP_RNN_AMX_CODE static void configure() {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } all;
    __asm__ volatile("" ::"r"(&all) : "memory");  // gcc 12's intrinsics do not say how much memory they read
    _tile_loadconfig(&all);
  }
  SKIP_RNN_AMX_CODE static void release() { _tile_release(); }
  const bool used_;
};

// Brings `count` rows into tiles: [tile of rows][tile of depth][row][number]. What is behind a row's depth is 0.
inline void fill_tiles(const Bf16* const* rows, i64 count, i64 depth, Bf16* to) {
  for (i64 r = 0; r < count; ++r) {
    Bf16* row = to + r / kTileRows * tiles_of(depth) * kTileNumbers + r % kTileRows * kTileDepth;
    for (i64 k = 0; k < depth; k += kTileDepth, row += kTileNumbers) {
      const i64 n = std::min(kTileDepth, depth - k);
      std::memcpy(row, rows[r] + k, n * sizeof(Bf16));
      if (n < kTileDepth) std::memset(row + n, 0, (kTileDepth - n) * sizeof(Bf16));
    }
  }
}

typedef std::uint32_t U __attribute__((vector_size(kBytes)));

// What is left of the lanes without their upper halves; 0 where x is infinite.
SKIP_RNN_INLINE F lower_part(F x) {
  const F upper = (F)((U)x & 0xffff0000u);
  return x == upper ? splat(0.0f) : x - upper;
}

// Stores the upper halves of the lanes and returns the lower part.
SKIP_RNN_INLINE F split(F x, Bf16* upper) {
  typedef std::uint16_t Half __attribute__((vector_size(kBytes / 2)));
  const Half half = __builtin_convertvector((U)x >> 16, Half);
  std::memcpy(upper, &half, sizeof half);
  return lower_part(x);
}

// As above. A row of float32 numbers is three rows of the tile.
template <class Number>
void fill_tiles(const Number* const* rows, i64 count, i64 depth, Bf16* to) {
  constexpr i64 kParts = kPartsOf<Number>, kRowsOfTile = rows_of_tile(kParts), W = Simd<float>::W;
  for (i64 r = 0; r < count; ++r) {
    Bf16* row = to + r / kRowsOfTile * tiles_of(depth) * kTileNumbers + r % kRowsOfTile * kParts * kTileDepth;
    for (i64 k = 0; k < tiles_of(depth) * kTileDepth; k += W) {
      Bf16* part = row + k / kTileDepth * kTileNumbers + k % kTileDepth;
      F x = splat(0.0f);
      if (k < depth) std::memcpy(&x, rows[r] + k, std::min(W, depth - k) * sizeof(float));
      for (i64 p = 0; p < kParts; ++p) x = split(x, part + p * kTileDepth);
    }
  }
}

// The products of Blocks tiles of rows with Vectors vectors of a panel: sums[block][vector][row][unit].
template <int Blocks, int Vectors>
SKIP_RNN_AMX_CODE __attribute__((noinline)) void multiply_tiles(const Bf16* rows, const float* weights, i64 depth_tiles,
                                                                 i64 panel_vectors, float (*sums)[2][kTileRows][16]) {
  const i64 block = depth_tiles * kTileNumbers, stride = panel_vectors * 64;
  __asm__ volatile("" ::: "memory");  // nor do they say it of tile loads
  _tile_zero(0);
  if (Vectors > 1) _tile_zero(1);
  if (Blocks > 1) _tile_zero(2);
  if (Blocks > 1 && Vectors > 1) _tile_zero(3);
  for (i64 k = 0; k < depth_tiles; ++k, rows += kTileNumbers, weights += 16 * panel_vectors * 16) {
    _tile_loadd(6, weights, stride);
    _tile_loadd(4, rows, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (Vectors > 1) {
      _tile_loadd(7, weights + 16, stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (Blocks > 1) {
      _tile_loadd(5, rows + block, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (Vectors > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0][0], 64);
  if (Vectors > 1) _tile_stored(1, sums[0][1], 64);
  if (Blocks > 1) _tile_stored(2, sums[1][0], 64);
  if (Blocks > 1 && Vectors > 1) _tile_stored(3, sums[1][1], 64);
}

// out[r] = from[r] + a[r] W. scratch: tile_numbers<Number>(rows, depth).
template <class Number>
void multiply_amx(const Packed<float>& m, i64 rows, const Number* const* a, const float* const* from, float* const* out,
                  Bf16* scratch) {
  constexpr i64 kParts = kPartsOf<Number>, kRowsOfTile = rows_of_tile(kParts);
  const i64 depth = tiles_of(m.depth), blocks = (rows + kRowsOfTile - 1) / kRowsOfTile;
  fill_tiles(a, rows, m.depth, scratch);
  const Parts panels = m.panels();
  alignas(64) float sums[2][2][kTileRows][16];
  for (i64 p = 0; p < panels.count; ++p) {
    const float* panel = m.data + panels.start(p) * m.rows() * 16;
    for (i64 v = 0; v < panels[p]; v += 2) {
      const bool two = v + 1 < panels[p];
      for (i64 b = 0; b < blocks; b += 2) {
        const Bf16* left = scratch + b * depth * kTileNumbers;
        const bool both = b + 1 < blocks;
        const auto run = both ? (two ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                              : (two ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
        run(left, panel + v * 16, depth, panels[p], sums);
        const i64 first = b * kRowsOfTile, last = std::min(rows, first + (1 + both) * kRowsOfTile);
        for (i64 r = first; r < last; ++r) {
          const i64 row = (r - first) % kRowsOfTile * kParts;
          for (i64 j = 0; j < 1 + two; ++j) {
            const auto& sum = sums[(r - first) / kRowsOfTile][j];
            F product = load(sum[row]);
            if constexpr (kParts > 1) product += load(sum[row + 1]) + load(sum[row + 2]);
            const i64 at = (panels.start(p) + v + j) * 16;
            store(out[r] + at, load(from[r] + at) + product);
          }
        }
      }
    }
  }
}

// Brings 16 columns of the events' rows into tiles, transposed: [tile of events][part][column][event].
template <class Number>
void transpose_tiles(i64 events, const Number* const* rows, i64 first, i64 columns, Bf16* to) {
  constexpr i64 kParts = kPartsOf<Number>, W = Simd<float>::W;
  for (i64 e = 0; e < tiles_of(events) * kTileDepth; e += W) {
    F square[W];
    for (i64 i = 0; i < W; ++i) {
      square[i] = splat(0.0f);
      if (e + i < events) std::memcpy(&square[i], rows[e + i] + first, std::min(W, columns - first) * sizeof(float));
    }
    transpose<float>(square);
    Bf16* tile = to + e / kTileDepth * kParts * kTileNumbers + e % kTileDepth;
    for (i64 i = 0; i < W; ++i)
      for (i64 p = 0; p < kParts; ++p) square[i] = split(square[i], tile + p * kTileNumbers + i * kTileDepth);
  }
}

// Brings 16 units of the events' rows into tiles, events in pairs: [tile of events][part][pair][unit].
inline void pair_tiles(i64 events, const float* const* rows, i64 first, Bf16* to) {
  for (i64 e = 0; e < tiles_of(events) * kTileDepth; e += 2) {
    F a = e < events ? load(rows[e] + first) : splat(0.0f), b = e + 1 < events ? load(rows[e + 1] + first) : splat(0.0f);
    Bf16* pair = to + e / kTileDepth * kPartsOf<float> * kTileNumbers + e % kTileDepth / 2 * kTileDepth;
    for (i64 p = 0; p < kPartsOf<float>; ++p, pair += kTileNumbers) {
      const F both = pair_of(a, b);
      std::memcpy(pair, &both, sizeof both);
      a = lower_part(a), b = lower_part(b);
    }
  }
}

// Adds the outer products of Blocks times 16 columns and Vectors times 16 units. Products of lower parts are left out: they are
// at most a few last bits of a float32 number.
template <class Number, int Blocks, int Vectors>
SKIP_RNN_AMX_CODE __attribute__((noinline)) void outer_tiles(i64 event_tiles, const Bf16* columns, const Bf16* units, float* out,
                                                              i64 ld) {
  constexpr i64 kParts = kPartsOf<Number>, kUnitParts = kPartsOf<float>;
  const i64 block = event_tiles * kParts * kTileNumbers, vector = event_tiles * kUnitParts * kTileNumbers, stride = ld * 4;
  __asm__ volatile("" ::: "memory");
  _tile_loadd(0, out, stride);
  if (Vectors > 1) _tile_loadd(1, out + 16, stride);
  if (Blocks > 1) _tile_loadd(2, out + 16 * ld, stride);
  if (Blocks > 1 && Vectors > 1) _tile_loadd(3, out + 16 * ld + 16, stride);
  for (i64 t = 0; t < event_tiles; ++t, units += kUnitParts * kTileNumbers)
    for (i64 p = 0; p < kParts; ++p, columns += kTileNumbers) {
      _tile_loadd(4, columns, 64);
      if (Blocks > 1) _tile_loadd(5, columns + block, 64);
      for (i64 q = 0; q < kUnitParts - p; ++q) {
        _tile_loadd(6, units + q * kTileNumbers, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (Blocks > 1) _tile_dpbf16ps(2, 5, 6);
        if (Vectors > 1) {
          _tile_loadd(7, units + vector + q * kTileNumbers, 64);
          _tile_dpbf16ps(1, 4, 7);
          if (Blocks > 1) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  _tile_stored(0, out, stride);
  if (Vectors > 1) _tile_stored(1, out + 16, stride);
  if (Blocks > 1) _tile_stored(2, out + 16 * ld, stride);
  if (Blocks > 1 && Vectors > 1) _tile_stored(3, out + 16 * ld + 16, stride);
}

// As add_outer (product.h). scratch: outer_numbers<Number>(events, columns).
template <class Number>
void add_outer_amx(i64 events, const float* const* g, i64 vectors, const Number* const* a, i64 columns, float* out,
                   Bf16* scratch) {
  if (!events) return;
  const i64 tiles = tiles_of(events), ld = vectors * 16, most = outer_blocks<Number>(events);
  const i64 block = tiles * kPartsOf<Number> * kTileNumbers, vector = tiles * kPartsOf<float> * kTileNumbers;
  Bf16 *units = scratch, *transposed = scratch + 2 * vector;
  for (i64 start = 0; start < columns; start += most * kTileRows) {
    const i64 end = std::min(columns, start + most * kTileRows);
    for (i64 c = start; c < end; c += kTileRows)
      transpose_tiles(events, a, c, columns, transposed + (c - start) / kTileRows * block);
    for (i64 v = 0; v < vectors; v += 2) {
      const bool two = v + 1 < vectors;
      for (i64 j = 0; j < 1 + two; ++j) pair_tiles(events, g, (v + j) * 16, units + j * vector);
      for (i64 c = start; c < end;) {
        const Bf16* rows = transposed + (c - start) / kTileRows * block;
        float* to = out + c * ld + v * 16;
        const i64 count = end - c;
        if (count >= 2 * kTileRows) {
          (two ? outer_tiles<Number, 2, 2> : outer_tiles<Number, 2, 1>)(tiles, rows, units, to, ld);
          c += 2 * kTileRows;
          continue;
        }
        const auto run = two ? outer_tiles<Number, 1, 2> : outer_tiles<Number, 1, 1>;
        c += kTileRows;
        if (count >= kTileRows) {
          run(tiles, rows, units, to, ld);
          continue;
        }
        alignas(64) float part[kTileRows][32] = {};
        const i64 bytes = (1 + two) * 64;
        for (i64 i = 0; i < count; ++i) std::memcpy(part[i], to + i * ld, bytes);
        run(tiles, rows, units, part[0], 32);
        for (i64 i = 0; i < count; ++i) std::memcpy(to + i * ld, part[i], bytes);
      }
    }
  }
}

#else

inline bool may_use_amx() { return false; }
struct AmxSession {
  explicit AmxSession(bool) {}
};
template <class Number>
void multiply_amx(const Packed<float>&, i64, const Number* const*, const float* const*, float* const*, Bf16*) {
  __builtin_unreachable();
}
template <class Number>
void add_outer_amx(i64, const float* const*, i64, const Number* const*, i64, float*, Bf16*) {
  __builtin_unreachable();
}

#endif

}  // namespace
