// Vectors as wide as the instruction set's registers, and sigmoid and tanh on them.
//
// The compiler must not form multiply-adds itself (-ffp-contract=off): each one is written as a call of fma. So a row's
// arithmetic is the same in every function that computes it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SKIP_RNN_INLINE inline __attribute__((always_inline))
// After the parameters of a lambda.
#define SKIP_RNN_INLINE_LAMBDA __attribute__((always_inline))

namespace {

using i64 = std::int64_t;

// kBytes is the width of a vector. A tile of a product has kRows rows and kVectors vectors of outputs. Its sums, one row of
// weights and one broadcast must fit the registers.
#if defined(__AVX512F__)  // 32 registers
constexpr int kBytes = 64;
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX2__)  // 16 registers
constexpr int kBytes = 32;
constexpr int kRows = 4, kVectors = 3;
#elif defined(__aarch64__)  // 32 registers
constexpr int kBytes = 16;
constexpr int kRows = 4, kVectors = 4;
#else  // 16 registers; a product and its sum are two instructions
constexpr int kBytes = 16;
constexpr int kRows = 4, kVectors = 2;
#endif

// Independent sums of one row's product. Eight hide the latency of two multipliers; where four vectors take as long to be
// read from the second-level cache as to be multiplied, or more sums do not fit the registers, they are four.
#if defined(__aarch64__) || (defined(__AVX2__) && !defined(__AVX512F__))
constexpr int kSums = 8;
#else
constexpr int kSums = 4;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef std::int32_t I __attribute__((vector_size(kBytes)));
  static constexpr int W = kBytes / 4;
  static constexpr int kMantissa = 23;
  static constexpr std::int32_t kOne = 0x3f800000;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kSigmoidLimit = 62, kTanhLimit = 40;  // in powers of two: products of two stay finite
  // (2^f - 1) / f on [-1/2, 1/2], Chebyshev fit, error 6e-9
  static constexpr float kExp[] = {1.5453163e-4f, 1.3390864e-3f, 9.6180826e-3f, 5.5503571e-2f, 2.4022651e-1f, 6.9314719e-1f};
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef std::int64_t I __attribute__((vector_size(kBytes)));
  static constexpr int W = kBytes / 8;
  static constexpr int kMantissa = 52;
  static constexpr std::int64_t kOne = 0x3ff0000000000000;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kSigmoidLimit = 500, kTanhLimit = 120;
  // as above, error 3e-19
  static constexpr double kExp[] = {2.5729324177362304e-11, 4.4558179083360645e-10, 7.0548973041554993e-9,
                                    1.0178057087733941e-7,  1.3215486808705563e-6,  1.5252733841556773e-5,
                                    1.5403530393370733e-4,  1.3333558146406471e-3,  9.6181291076284795e-3,
                                    5.5504108664821627e-2,  2.4022650695910071e-1,  6.9314718055994531e-1};
};

template <class T>
SKIP_RNN_INLINE typename Simd<T>::V load(const T* p) {
  typename Simd<T>::V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T, class V>
SKIP_RNN_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// All lanes are x. A list of equal lanes compiles to one broadcast; a loop over lanes builds the vector on the stack.
template <class T, std::size_t... L>
SKIP_RNN_INLINE typename Simd<T>::V splat_lanes(T x, std::index_sequence<L...>) {
  return typename Simd<T>::V{(void(L), x)...};
}
template <class T>
SKIP_RNN_INLINE typename Simd<T>::V splat(T x) {
  return splat_lanes(x, std::make_index_sequence<Simd<T>::W>());
}

// A number in bfloat16: the upper half of a float's bits.
struct Bf16 {
  std::uint16_t bits;
};

inline float value_of(Bf16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SKIP_RNN_INLINE Simd<float>::V load(const Bf16* p) {
  typedef std::uint16_t Half __attribute__((vector_size(kBytes / 2)));
  Half bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Simd<float>::V)(__builtin_convertvector(bits, Simd<float>::I) << 16);
}

// Two vectors of bfloat16 numbers in one: the first has the lower halves of the lanes, the second the upper ones.
SKIP_RNN_INLINE Simd<float>::V pair_of(Simd<float>::V first, Simd<float>::V second) {
  return (Simd<float>::V)(((Simd<float>::I)first >> 16 & 0xffff) | ((Simd<float>::I)second & std::int32_t(0xffff0000)));
}
enum Part : int { kWhole, kFirst, kSecond };
template <int P, class V>
SKIP_RNN_INLINE V part_of(V x) {
  if constexpr (P == kFirst) return (V)((Simd<float>::I)x << 16);
  else if constexpr (P == kSecond) return (V)((Simd<float>::I)x & std::int32_t(0xffff0000));
  else return x;
}

// One step of a transposition of two vectors. The first result has the even groups of Half lanes of a and b, the second the odd.
template <class T, int Half, bool Second, class V, std::size_t... L>
SKIP_RNN_INLINE V interleave_lanes(V a, V b, std::index_sequence<L...>) {
  constexpr int W = sizeof...(L);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (Second ? (L & Half ? W + L : L + Half) : (L & Half ? W + L - Half : L))...);
#else
  const typename Simd<T>::I lanes = {(Second ? (L & Half ? W + L : L + Half) : (L & Half ? W + L - Half : L))...};
  return __builtin_shuffle(a, b, lanes);
#endif
}
template <class T, int Half, bool Second>
SKIP_RNN_INLINE typename Simd<T>::V interleave(typename Simd<T>::V a, typename Simd<T>::V b) {
  return interleave_lanes<T, Half, Second>(a, b, std::make_index_sequence<Simd<T>::W>());
}

using F = Simd<float>::V;
using D = Simd<double>::V;

#if defined(__AVX512F__)
SKIP_RNN_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
SKIP_RNN_INLINE D fma(D a, D b, D c) { return (D)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
// The limit is the first operand: these instructions return the second one where x is NaN.
SKIP_RNN_INLINE F clamp(F x, float l) {
  return (F)_mm512_max_ps((__m512)splat(-l), _mm512_min_ps((__m512)splat(l), (__m512)x));
}
SKIP_RNN_INLINE D clamp(D x, double l) {
  return (D)_mm512_max_pd((__m512d)splat(-l), _mm512_min_pd((__m512d)splat(l), (__m512d)x));
}
#elif defined(__AVX2__)
SKIP_RNN_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
SKIP_RNN_INLINE D fma(D a, D b, D c) { return (D)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
SKIP_RNN_INLINE F clamp(F x, float l) {
  return (F)_mm256_max_ps((__m256)splat(-l), _mm256_min_ps((__m256)splat(l), (__m256)x));
}
SKIP_RNN_INLINE D clamp(D x, double l) {
  return (D)_mm256_max_pd((__m256d)splat(-l), _mm256_min_pd((__m256d)splat(l), (__m256d)x));
}
#else
#if defined(__aarch64__)
SKIP_RNN_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
SKIP_RNN_INLINE D fma(D a, D b, D c) { return (D)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
template <class V>
SKIP_RNN_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif
template <class V, class T>
SKIP_RNN_INLINE V clamp(V x, T l) {
  const V high = splat(l), low = splat(-l);
  x = high < x ? high : x;  // false where x is NaN
  return low > x ? low : x;
}
#endif

template <class V>
SKIP_RNN_INLINE V reciprocal(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == 4) {
    const V r = (V)_mm512_rcp14_ps((__m512)x);
    return fma(r, fma(-x, r, splat(1.0f)), r);
  }
#endif
  return splat(decltype(+x[0])(1)) / x;
}

// 2^t = scale * (q + 1) with scale = 2^round(t). The factors stay apart, so that 2^t - 1 is accurate near t = 0.
template <class T>
struct Power {
  using V = typename Simd<T>::V;
  V scale, q;

  SKIP_RNN_INLINE explicit Power(V t) {
    using S = Simd<T>;
#if defined(__AVX512F__)
    V n;
    if constexpr (sizeof(T) == 4) {
      n = (V)_mm512_roundscale_ps((__m512)t, 8);
      scale = (V)_mm512_scalef_ps((__m512)splat(T(1)), (__m512)n);
    } else {
      n = (V)_mm512_roundscale_pd((__m512d)t, 8);
      scale = (V)_mm512_scalef_pd((__m512d)splat(T(1)), (__m512d)n);
    }
#else
    const V rounded = t + splat(S::kRound);
    const V n = rounded - splat(S::kRound);
    typename S::I bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits = (bits << S::kMantissa) + S::kOne;
    std::memcpy(&scale, &bits, sizeof scale);
#endif
    const V f = t - n;
    V p = splat(S::kExp[0]);
#pragma GCC unroll 16
    for (unsigned i = 1; i < sizeof S::kExp / sizeof(T); ++i) p = fma(p, f, splat(S::kExp[i]));
    q = p * f;
  }
  SKIP_RNN_INLINE V power() const { return fma(scale, q, scale); }
  SKIP_RNN_INLINE V minus_one() const { return fma(scale, q, scale - splat(T(1))); }
};

constexpr double kLog2E = 1.4426950408889634;

// sigmoid(x) = 1 / denominator
template <class T>
SKIP_RNN_INLINE typename Simd<T>::V sigmoid_denominator(typename Simd<T>::V x) {
  return splat(T(1)) + Power<T>(clamp(x * splat(T(-kLog2E)), Simd<T>::kSigmoidLimit)).power();
}

// tanh(x) = numerator / (numerator + 2)
template <class T>
SKIP_RNN_INLINE typename Simd<T>::V tanh_numerator(typename Simd<T>::V x) {
  return Power<T>(clamp(x * splat(T(2 * kLog2E)), Simd<T>::kTanhLimit)).minus_one();
}

template <class T>
SKIP_RNN_INLINE typename Simd<T>::V sigmoid(typename Simd<T>::V x) {
  return reciprocal(sigmoid_denominator<T>(x));
}

template <class T>
SKIP_RNN_INLINE typename Simd<T>::V tanh(typename Simd<T>::V x) {
  const auto e = tanh_numerator<T>(x);
  return e * reciprocal(e + splat(T(2)));
}

// Sigmoid and tanh that are exactly 0, 1 or -1 where they round to it. The derivatives s (1 - s) and 1 - t^2 are then 0.
template <class T>
SKIP_RNN_INLINE typename Simd<T>::V saturated_sigmoid(typename Simd<T>::V x) {
  constexpr T limit = sizeof(T) == 4 ? 126 : 1022;
  const auto t = clamp(x * splat(T(-kLog2E)), limit);
  const auto s = reciprocal(splat(T(1)) + Power<T>(t).power());
  return t >= splat(limit) ? splat(T(0)) : s;  // false where it is NaN
}

template <class T>
SKIP_RNN_INLINE typename Simd<T>::V saturated_tanh(typename Simd<T>::V x) {
  const auto zero = splat(T(0));
  const auto e = tanh_numerator<T>(x < zero ? x : -x);  // -1 at the limit
  const auto t = e * reciprocal(e + splat(T(2)));
  return x < zero ? t : -t;
}

// Adds the upper half of the lanes to the lower half until one lane is left.
template <class T, int Half = Simd<T>::W / 2>
SKIP_RNN_INLINE T sum(typename Simd<T>::V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
  else return _mm512_reduce_add_pd((__m512d)v);
#else
  v += interleave<T, Half, true>(v, v);
  if constexpr (Half > 1) return sum<T, Half / 2>(v);
  else return v[0];
#endif
}

// <a, b> over n, a multiple of the width.
template <class T>
inline T dot(const T* a, const T* b, i64 n) {
  auto s = splat(T(0));
  for (i64 i = 0; i < n; i += Simd<T>::W) s = fma(load(a + i), load(b + i), s);
  return sum<T>(s);
}

// s + g (a - b), lane by lane. From s = 0 the sum of the lanes is <g, a - b>.
template <class T>
SKIP_RNN_INLINE typename Simd<T>::V add_difference(typename Simd<T>::V s, const T* g, const T* a, const T* b, i64 n) {
  for (i64 i = 0; i < n; i += Simd<T>::W) s = fma(load(g + i), load(a + i) - load(b + i), s);
  return s;
}

// y += a x
template <class T>
inline void add_scaled(T* y, T a, const T* x, i64 n) {
  for (i64 i = 0; i < n; i += Simd<T>::W) store(y + i, fma(splat(a), load(x + i), load(y + i)));
}

}  // namespace
