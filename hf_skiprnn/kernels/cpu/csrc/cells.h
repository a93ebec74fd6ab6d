// One layer's step of the three cells, on rows of padded units. cells_skip_rnn.py defines the mathematics.
//
// A buffer of activations has these, one after the other, each padded to whole vectors:
//   lstm             [i f g o]   the input and the recurrent product have all four
//   gru              [r z n]     the input product has all three; the recurrent product has r and z, and n's needs r * h
//   gru_reset_after  [m r z n]   the recurrent product has m = W_hn h + b_hn, r and z; the input product has r, z and n
#pragma once

#include "amx.h"

namespace {

enum Cell : int { kLstm = 0, kGru = 1, kGruResetAfter = 2 };

struct CellLayout {
  ActivationOrder input, recurrent, candidate;  // candidate: n's product with r * h
  int activations;                              // how many the buffer has
  int input_at;                                 // where in the buffer the input product's activations start
};

inline const CellLayout& layout_of(int cell) {
  static const CellLayout layouts[] = {
      {{4, {0, 1, 2, 3}}, {4, {0, 1, 2, 3}}, {0, {}}, 4, 0},
      {{3, {0, 1, 2}}, {2, {0, 1}}, {1, {2}}, 3, 0},
      {{3, {0, 1, 2}}, {3, {2, 0, 1}}, {0, {}}, 4, 1},
  };
  return layouts[cell];
}

constexpr i64 kDirectInputs = 4;  // up to so many inputs are multiplied in the activations' code, without a matrix product

template <class T>
struct LayerWeights {
  i64 inputs = 0;
  bool direct = false;  // at most kDirectInputs inputs
  Packed<T> input, recurrent, candidate;
  Packed<T> input_t, recurrent_t, candidate_t;  // for the backward pass
  T* rows = nullptr;                            // [inputs, activations * padded], where direct
  T* input_bias = nullptr;                      // [activations * padded]
  T* recurrent_bias = nullptr;                  // [recurrent activations * padded]
};

// The buffers of one row's step, as padded vectors. Before the step `activations` has the input product, unless the layer is
// direct. After it, if they are kept, it has the activations.
template <class T>
struct Lane {
  const T* x;          // the layer's input; in the lowest layer it points to bfloat16 numbers if AMX multiplies them
  const T* h;          // before the step
  const T* c;          // before the step
  T* recurrent;        // the recurrent product
  T* activations;
  T* extra;            // lstm: tanh(c); gru: r * h
  T* h_new;
  T* c_new;
};

constexpr i64 kLanes = 256;  // the most rows of one call

template <class T>
struct Pointers {
  const T* a[kLanes];
  const T* from[kLanes];
  T* out[kLanes];
};

// The input products of G activations, from activation `first` on, at one vector of units.
template <class T, int G>
struct InputProducts {
  typename Simd<T>::V of[G];

  SKIP_RNN_INLINE InputProducts(const LayerWeights<T>& w, const CellLayout& cell, const Lane<T>& lane, int first, i64 at,
                                i64 padded) {
    at += first * padded;
    const T* from = w.direct ? w.input_bias : lane.activations + cell.input_at * padded;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) of[g] = load(from + g * padded + at);
    if (!w.direct) return;
    const T* row = w.rows + at;
#pragma GCC unroll 4
    for (i64 k = 0; k < kDirectInputs; ++k, row += cell.input.count * padded) {
      if (k == w.inputs) return;
      const auto x = splat(lane.x[k]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) of[g] = fma(x, load(row + g * padded), of[g]);
    }
  }
};

// Sets a row's padding to 0. Infinite or NaN inputs make it NaN.
template <class T>
SKIP_RNN_INLINE void clear_padding(T* row, i64 units, i64 padded) {
  for (i64 i = units; i < padded; ++i) row[i] = 0;
}

// Sizes that all layers share.
struct Shape {
  i64 batch, steps, inputs, units, layers, padded;
  int cell;
  CellLayout layout;
  bool has_c() const { return cell == kLstm; }
  i64 activations() const { return layout.activations * padded; }
  i64 recurrent() const { return layout.recurrent.count * padded; }
};

// The lanes of one layer, and what their steps need.
template <class T>
struct Lanes {
  const Shape& s;
  const LayerWeights<T>& w;
  const Lane<T>* lane;
  i64 n;
  T* scratch;  // n * padded
  Bf16* split = nullptr;  // working memory for AMX

  template <int G>
  SKIP_RNN_INLINE InputProducts<T, G> inputs(i64 i, i64 at, int first = 0) const {
    return {w, s.layout, lane[i], first, at, s.padded};
  }
};

// The following functions compute one vector of units, from the recurrent products p of its activations. With Keep they store
// the activations for the backward pass. It computes derivatives from activations: a saturated one must be exactly 0, 1 or -1.

template <class T, bool Keep>
SKIP_RNN_INLINE typename Simd<T>::V cell_sigmoid(typename Simd<T>::V x) {
  if constexpr (Keep) return saturated_sigmoid<T>(x);
  else return sigmoid<T>(x);
}
template <class T, bool Keep>
SKIP_RNN_INLINE typename Simd<T>::V cell_tanh(typename Simd<T>::V x) {
  if constexpr (Keep) return saturated_tanh<T>(x);
  else return tanh<T>(x);
}

template <class T>
struct LstmHalf {
  typename Simd<T>::V c, o;  // o: without Keep the denominator of its sigmoid
};

template <class T, bool Keep>
SKIP_RNN_INLINE LstmHalf<T> lstm_cell(const Lanes<T>& lanes, i64 i, i64 at, const typename Simd<T>::V* p) {
  const Lane<T>& lane = lanes.lane[i];
  const auto input = lanes.template inputs<4>(i, at);
  if constexpr (Keep) {
    const auto ig = saturated_sigmoid<T>(input.of[0] + p[0]), f = saturated_sigmoid<T>(input.of[1] + p[1]);
    const auto g = saturated_tanh<T>(input.of[2] + p[2]), o = saturated_sigmoid<T>(input.of[3] + p[3]);
    const auto c = fma(f, load(lane.c + at), ig * g);
    T* activations = lane.activations + at;
    store(activations, ig);
    store(activations + lanes.s.padded, f);
    store(activations + 2 * lanes.s.padded, g);
    store(lane.c_new + at, c);
    return {c, o};
  } else {
    const auto two = splat(T(2));
    const auto a = sigmoid_denominator<T>(input.of[0] + p[0]), b = sigmoid_denominator<T>(input.of[1] + p[1]);
    const auto e = tanh_numerator<T>(input.of[2] + p[2]), d = sigmoid_denominator<T>(input.of[3] + p[3]);
    const auto ig = reciprocal(a * (e + two));  // one division for sigmoid and tanh: i * g = e * ig
    const auto c = fma(reciprocal(b), load(lane.c + at), e * ig);
    store(lane.c_new + at, c);
    return {c, d};
  }
}

template <class T, bool Keep>
SKIP_RNN_INLINE void lstm_output(const Lanes<T>& lanes, i64 i, i64 at, const LstmHalf<T>& half) {
  const Lane<T>& lane = lanes.lane[i];
  if constexpr (Keep) {
    const auto s = saturated_tanh<T>(half.c);
    store(lane.h_new + at, s * half.o);
    store(lane.extra + at, s);
  } else {
    const auto s = tanh_numerator<T>(half.c);
    store(lane.h_new + at, s * reciprocal(half.o * (s + splat(T(2)))));
  }
}

// Computes r and z, and r * h for n's product.
template <class T, bool Keep>
SKIP_RNN_INLINE void gru_reset(const Lanes<T>& lanes, i64 i, i64 at, const typename Simd<T>::V* p) {
  const Lane<T>& lane = lanes.lane[i];
  const auto input = lanes.template inputs<2>(i, at);
  const auto r = cell_sigmoid<T, Keep>(input.of[0] + p[0]);
  store(lane.activations + at, r);
  store(lane.activations + lanes.s.padded + at, cell_sigmoid<T, Keep>(input.of[1] + p[1]));
  store(lane.extra + at, r * load(lane.h + at));
}

// Computes n from p, its product with r * h, and the new state.
template <class T, bool Keep>
SKIP_RNN_INLINE void gru_update(const Lanes<T>& lanes, i64 i, i64 at, typename Simd<T>::V p) {
  const Lane<T>& lane = lanes.lane[i];
  const auto n = cell_tanh<T, Keep>(lanes.template inputs<1>(i, at, 2).of[0] + p), h = load(lane.h + at);
  if constexpr (Keep) store(lane.activations + 2 * lanes.s.padded + at, n);
  store(lane.h_new + at, fma(load(lane.activations + lanes.s.padded + at), h - n, n));
}

template <class T, bool Keep>
SKIP_RNN_INLINE void gru_after(const Lanes<T>& lanes, i64 i, i64 at, const typename Simd<T>::V* p) {
  const Lane<T>& lane = lanes.lane[i];
  const auto input = lanes.template inputs<3>(i, at);
  const auto r = cell_sigmoid<T, Keep>(input.of[0] + p[1]), z = cell_sigmoid<T, Keep>(input.of[1] + p[2]);
  const auto n = cell_tanh<T, Keep>(fma(r, p[0], input.of[2])), h = load(lane.h + at);
  store(lane.h_new + at, fma(z, h - n, n));
  if constexpr (Keep) {
    T* activations = lane.activations + at;
    store(activations, p[0]);
    store(activations + lanes.s.padded, r);
    store(activations + 2 * lanes.s.padded, z);
    store(activations + 3 * lanes.s.padded, n);
  }
}

// Completes one row's step from its recurrent product while this is in registers (multiply_one).
template <class T, int Cell>
struct Stepped {
  static constexpr int kActivations = Cell == kLstm ? 4 : Cell == kGru ? 2 : 3;
  const Lanes<T>& lanes;

  template <int N>
  SKIP_RNN_INLINE void operator()(i64 block, const typename Simd<T>::V (&product)[N]) const {
#pragma GCC unroll 4
    for (int first = 0; first < N; first += kActivations) {
      const auto* p = product + first;
      const i64 at = (block + first / kActivations) * Simd<T>::W;
      if constexpr (Cell == kLstm) lstm_output<T, false>(lanes, 0, at, lstm_cell<T, false>(lanes, 0, at, p));
      else if constexpr (Cell == kGru) gru_reset<T, false>(lanes, 0, at, p);
      else gru_after<T, false>(lanes, 0, at, p);
    }
  }
};

// Completes the step of a GRU that resets before the product, from n's product.
template <class T>
struct Updated {
  static constexpr int kActivations = 1;
  const Lanes<T>& lanes;

  template <int N>
  SKIP_RNN_INLINE void operator()(i64 block, const typename Simd<T>::V (&product)[N]) const {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) gru_update<T, false>(lanes, 0, (block + j) * Simd<T>::W, product[j]);
  }
};

// Number: the type that the rows p.a really have. split: working memory for AMX.
template <class Number, class T>
void multiply_lanes(const Packed<T>& m, const Pointers<T>& p, i64 n, Bf16* split) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (m.amx) return multiply_amx(m, n, reinterpret_cast<const Number* const*>(p.a), p.from, p.out, split);
  }
  multiply(m, n, p.a, p.from, p.out);
}

template <class T>
void recurrent_products(const LayerWeights<T>& w, const Lane<T>* lanes, i64 n, Bf16* split = nullptr) {
  Pointers<T> p;
  for (i64 i = 0; i < n; ++i) p.a[i] = lanes[i].h, p.from[i] = w.recurrent_bias, p.out[i] = lanes[i].recurrent;
  multiply_lanes<T>(w.recurrent, p, n, split);
}

// Writes the input products into the lanes' activations. A direct layer has none.
template <class T, class Number = T>
void input_products(const Shape& s, const LayerWeights<T>& w, const Lane<T>* lanes, i64 n, Bf16* split = nullptr) {
  if (w.direct) return;
  Pointers<T> p;
  for (i64 i = 0; i < n; ++i) {
    p.a[i] = lanes[i].x, p.from[i] = w.input_bias;
    p.out[i] = lanes[i].activations + s.layout.input_at * s.padded;
  }
  multiply_lanes<Number>(w.input, p, n, split);
}

template <class T>
void clear_paddings(const Lanes<T>& lanes) {
  for (i64 i = 0; i < lanes.n; ++i) {
    clear_padding(lanes.lane[i].h_new, lanes.s.units, lanes.s.padded);
    if (lanes.s.has_c()) clear_padding(lanes.lane[i].c_new, lanes.s.units, lanes.s.padded);
  }
}

// Computes a GRU's n and its new state, from r * h in the lanes' `extra`.
template <class T, bool Keep>
void update_lanes(const Lanes<T>& lanes) {
  Pointers<T> p;
  for (i64 i = 0; i < lanes.n; ++i) {
    p.a[i] = lanes.lane[i].extra, p.from[i] = lanes.w.recurrent_bias;  // zeros in this cell
    p.out[i] = lanes.scratch + i * lanes.s.padded;
  }
  multiply_lanes<T>(lanes.w.candidate, p, lanes.n, lanes.split);
  for (i64 i = 0; i < lanes.n; ++i)
    for (i64 at = 0; at < lanes.s.padded; at += Simd<T>::W) gru_update<T, Keep>(lanes, i, at, load(p.out[i] + at));
}

// One step of all lanes, from their products. h_new may be h. Keep: store the activations for the backward pass.
template <class T, bool Keep>
void step(const Lanes<T>& lanes) {
  const i64 padded = lanes.s.padded;
  constexpr int W = Simd<T>::W;
  typename Simd<T>::V p[4];
  const auto read = [&](const Lane<T>& lane, i64 at, int activations) {
#pragma GCC unroll 4
    for (int g = 0; g < activations; ++g) p[g] = load(lane.recurrent + g * padded + at);
  };
  for (i64 i = 0; i < lanes.n; ++i) {
    const Lane<T>& lane = lanes.lane[i];
    if (lanes.s.cell == kLstm) {  // two loops: a single one is a chain of operations too long to overlap with the next
      T* o = lane.activations + 3 * padded;
      for (i64 at = 0; at < padded; at += W) read(lane, at, 4), store(o + at, lstm_cell<T, Keep>(lanes, i, at, p).o);
      for (i64 at = 0; at < padded; at += W) lstm_output<T, Keep>(lanes, i, at, {load(lane.c_new + at), load(o + at)});
    } else if (lanes.s.cell == kGruResetAfter) {
      for (i64 at = 0; at < padded; at += W) read(lane, at, 3), gru_after<T, Keep>(lanes, i, at, p);
    } else {
      for (i64 at = 0; at < padded; at += W) read(lane, at, 2), gru_reset<T, Keep>(lanes, i, at, p);
    }
  }
  if (lanes.s.cell == kGru) update_lanes<T, Keep>(lanes);
  clear_paddings(lanes);
}

// The recurrent product and the step of one row, without keeping activations. h_new is not h.
template <class T>
void step_alone(const Lanes<T>& lanes, bool backwards) {
  const Lane<T>& lane = lanes.lane[0];
  const auto run = [&](const auto& finish) {
    multiply_one(lanes.w.recurrent, lane.h, lanes.w.recurrent_bias, finish, backwards);
  };
  if (lanes.s.cell == kLstm) run(Stepped<T, kLstm>{lanes});
  else if (lanes.s.cell == kGruResetAfter) run(Stepped<T, kGruResetAfter>{lanes});
  else {
    run(Stepped<T, kGru>{lanes});
    multiply_one(lanes.w.candidate, lane.extra, lanes.w.recurrent_bias, Updated<T>{lanes}, !backwards);
  }
  clear_paddings(lanes);
}

}  // namespace
