// The three cells: one layer's step and its backward on rows of padded units. The mathematics is cells_skip_rnn.py's.
//
// Gates lie one after the other, each padded to whole vectors:
//   lstm             [i f g o]   input and recurrent product alike
//   gru              [r z n]     the recurrent product has r and z; n's follows from r * h
//   gru_reset_after  [m r z n]   the recurrent product has m = W_hn h + b_hn, r, z; the input product r, z, n
#pragma once

#include "product.h"

namespace {

enum Cell : int { kLstm = 0, kGru = 1, kGruResetAfter = 2 };

struct CellLayout {
  GateOrder input, recurrent, candidate;  // candidate: n's product of r * h
  int gates;                              // of the buffer
  int input_at;                           // where in the buffer the input product's gates start
};

inline const CellLayout& layout_of(int cell) {
  static const CellLayout layouts[] = {
      {{4, {0, 1, 2, 3}}, {4, {0, 1, 2, 3}}, {0, {}}, 4, 0},
      {{3, {0, 1, 2}}, {2, {0, 1}}, {1, {2}}, 3, 0},
      {{3, {0, 1, 2}}, {3, {2, 0, 1}}, {0, {}}, 4, 1},
  };
  return layouts[cell];
}

template <class T>
struct LayerWeights {
  i64 inputs = 0;
  bool direct = false;  // few inputs: multiplied where the gates are computed, not as a product of its own
  Packed<T> input, recurrent, candidate;
  Packed<T> input_t, recurrent_t, candidate_t;  // for the backward pass
  T* rows = nullptr;                            // [inputs, gates * padded], where direct
  T* input_bias = nullptr;                      // [gates * padded]
  T* recurrent_bias = nullptr;                  // [recurrent gates * padded]
};

// One row's step. Pointers to padded vectors; `gates` holds the input product when the step begins, unless it is direct.
template <class T>
struct Lane {
  const T* x;          // the layer's input
  const T* h;          // before the step
  const T* c;
  T* recurrent;        // the recurrent product
  T* gates;            // after the step: the gates after their nonlinearities (if kept)
  T* extra;            // lstm: tanh(c); gru: r * h
  T* h_new;
  T* c_new;
};

constexpr i64 kLanes = 256;  // lanes of one batch, at most

template <class T>
struct Pointers {
  const T* a[kLanes];
  const T* from[kLanes];
  T* out[kLanes];
};

// The input products of gates first .. first + G - 1 at one vector of units.
template <class T, int G>
struct InputProducts {
  typename Simd<T>::V of[G];

  SKIP_RNN_INLINE InputProducts(const LayerWeights<T>& w, const CellLayout& cell, const Lane<T>& lane, int first, i64 at,
                                i64 padded) {
    at += first * padded;
    const T* from = w.direct ? w.input_bias : lane.gates + cell.input_at * padded;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) of[g] = load(from + g * padded + at);
    if (!w.direct) return;
    const T* row = w.rows + at;
    for (i64 k = 0; k < w.inputs; ++k, row += cell.input.count * padded) {
      const auto x = splat(lane.x[k]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) of[g] = fma(x, load(row + g * padded), of[g]);
    }
  }
};

// Padding stays 0, whatever the inputs hold.
template <class T>
SKIP_RNN_INLINE void clear_padding(T* row, i64 units, i64 padded) {
  for (i64 i = units; i < padded; ++i) row[i] = 0;
}

// What all layers share.
struct Shape {
  i64 batch, steps, inputs, units, layers, padded;
  int cell;
  CellLayout layout;
  bool has_c() const { return cell == kLstm; }
  i64 gates() const { return layout.gates * padded; }
  i64 recurrent() const { return layout.recurrent.count * padded; }
};

// A layer's lanes and what their steps need besides.
template <class T>
struct Lanes {
  const Shape& s;
  const LayerWeights<T>& w;
  const Lane<T>* lane;
  i64 n;
  T* scratch;  // n * padded

  template <int G>
  SKIP_RNN_INLINE InputProducts<T, G> inputs(i64 i, i64 at, int first = 0) const {
    return {w, s.layout, lane[i], first, at, s.padded};
  }
};

// One vector of units' steps, from the recurrent products p of their gates. Keep: leave what the backward pass needs.

template <class T>
struct LstmHalf {
  typename Simd<T>::V c, o;  // o: its sigmoid's denominator
};

template <class T, bool Keep>
SKIP_RNN_INLINE LstmHalf<T> lstm_cell(const Lanes<T>& lanes, i64 i, i64 at, const typename Simd<T>::V* p) {
  const Lane<T>& lane = lanes.lane[i];
  const auto input = lanes.template inputs<4>(i, at);
  const auto two = splat(T(2));
  const auto a = sigmoid_denominator<T>(input.of[0] + p[0]), b = sigmoid_denominator<T>(input.of[1] + p[1]);
  const auto e = tanh_numerator<T>(input.of[2] + p[2]), d = sigmoid_denominator<T>(input.of[3] + p[3]);
  const auto ig = reciprocal(a * (e + two));  // sigmoid and tanh share a division
  const auto f = reciprocal(b), c = fma(f, load(lane.c + at), e * ig);
  store(lane.c_new + at, c);
  if constexpr (Keep) {
    T* gates = lane.gates + at;
    store(gates, (e + two) * ig);
    store(gates + lanes.s.padded, f);
    store(gates + 2 * lanes.s.padded, e * a * ig);
  }
  return {c, d};
}

template <class T, bool Keep>
SKIP_RNN_INLINE void lstm_output(const Lanes<T>& lanes, i64 i, i64 at, const LstmHalf<T>& half) {
  const Lane<T>& lane = lanes.lane[i];
  const auto two = splat(T(2)), s = tanh_numerator<T>(half.c), oc = reciprocal(half.o * (s + two));
  store(lane.h_new + at, s * oc);
  if constexpr (Keep) {
    store(lane.gates + 3 * lanes.s.padded + at, (s + two) * oc);
    store(lane.extra + at, s * half.o * oc);
  }
}

// r and z, and r * h for n's product.
template <class T>
SKIP_RNN_INLINE void gru_reset(const Lanes<T>& lanes, i64 i, i64 at, const typename Simd<T>::V* p) {
  const Lane<T>& lane = lanes.lane[i];
  const auto input = lanes.template inputs<2>(i, at);
  const auto r = sigmoid<T>(input.of[0] + p[0]);
  store(lane.gates + at, r);
  store(lane.gates + lanes.s.padded + at, sigmoid<T>(input.of[1] + p[1]));
  store(lane.extra + at, r * load(lane.h + at));
}

// n, from its product p of r * h.
template <class T>
SKIP_RNN_INLINE void gru_update(const Lanes<T>& lanes, i64 i, i64 at, typename Simd<T>::V p) {
  const Lane<T>& lane = lanes.lane[i];
  const auto n = tanh<T>(lanes.template inputs<1>(i, at, 2).of[0] + p), h = load(lane.h + at);
  store(lane.gates + 2 * lanes.s.padded + at, n);
  store(lane.h_new + at, fma(load(lane.gates + lanes.s.padded + at), h - n, n));
}

template <class T, bool Keep>
SKIP_RNN_INLINE void gru_after(const Lanes<T>& lanes, i64 i, i64 at, const typename Simd<T>::V* p) {
  const Lane<T>& lane = lanes.lane[i];
  const auto input = lanes.template inputs<3>(i, at);
  const auto r = sigmoid<T>(input.of[0] + p[1]), z = sigmoid<T>(input.of[1] + p[2]);
  const auto n = tanh<T>(fma(r, p[0], input.of[2])), h = load(lane.h + at);
  store(lane.h_new + at, fma(z, h - n, n));
  if constexpr (Keep) {
    T* gates = lane.gates + at;
    store(gates, p[0]);
    store(gates + lanes.s.padded, r);
    store(gates + 2 * lanes.s.padded, z);
    store(gates + 3 * lanes.s.padded, n);
  }
}

// What happens to a recurrent product: the step's arithmetic, while it is in registers. The product itself is stored where
// the backward pass looks at it again.
template <class T, int Cell, bool Keep>
struct Stepped {
  static constexpr int kGates = Cell == kLstm ? 4 : Cell == kGru ? 2 : 3;
  const Lanes<T>& lanes;

  template <int N>
  SKIP_RNN_INLINE void operator()(i64 row, i64 block, const typename Simd<T>::V (&product)[N]) const {
#pragma GCC unroll 2
    for (int first = 0; first < N; first += kGates) {
      const auto* p = product + first;
      const i64 at = (block + first / kGates) * Simd<T>::W;
      if constexpr (Keep)
#pragma GCC unroll 4
        for (int g = 0; g < kGates; ++g) store(lanes.lane[row].recurrent + g * lanes.s.padded + at, p[g]);
      if constexpr (Cell == kLstm) lstm_output<T, Keep>(lanes, row, at, lstm_cell<T, Keep>(lanes, row, at, p));
      else if constexpr (Cell == kGru) gru_reset<T>(lanes, row, at, p);
      else gru_after<T, Keep>(lanes, row, at, p);
    }
  }
};

// The same for n's product in a GRU that resets before it.
template <class T>
struct Updated {
  static constexpr int kGates = 1;
  const Lanes<T>& lanes;

  template <int N>
  SKIP_RNN_INLINE void operator()(i64 row, i64 block, const typename Simd<T>::V (&product)[N]) const {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) gru_update<T>(lanes, row, (block + j) * Simd<T>::W, product[j]);
  }
};

template <class T>
void recurrent_products(const LayerWeights<T>& w, const Lane<T>* lanes, i64 n) {
  Pointers<T> p;
  for (i64 i = 0; i < n; ++i) p.a[i] = lanes[i].h, p.from[i] = w.recurrent_bias, p.out[i] = lanes[i].recurrent;
  multiply(w.recurrent, n, p.a, p.from, p.out);
}

// Into the lanes' gates; nothing to do where the inputs are few.
template <class T>
void input_products(const Shape& s, const LayerWeights<T>& w, const Lane<T>* lanes, i64 n) {
  if (w.direct) return;
  Pointers<T> p;
  for (i64 i = 0; i < n; ++i) {
    p.a[i] = lanes[i].x, p.from[i] = w.input_bias;
    p.out[i] = lanes[i].gates + s.layout.input_at * s.padded;
  }
  multiply(w.input, n, p.a, p.from, p.out);
}

// A GRU's n and its new state, where r * h is there.
template <class T>
void update_lanes(const Lanes<T>& lanes) {
  Pointers<T> p;
  for (i64 i = 0; i < lanes.n; ++i) {
    p.a[i] = lanes.lane[i].extra, p.from[i] = lanes.w.recurrent_bias;  // 0 in this cell
    p.out[i] = lanes.scratch + i * lanes.s.padded;
  }
  multiply(lanes.w.candidate, lanes.n, p.a, p.from, p.out, Updated<T>{lanes});
}

template <class T>
void clear_paddings(const Lanes<T>& lanes) {
  for (i64 i = 0; i < lanes.n; ++i) {
    clear_padding(lanes.lane[i].h_new, lanes.s.units, lanes.s.padded);
    if (lanes.s.has_c()) clear_padding(lanes.lane[i].c_new, lanes.s.units, lanes.s.padded);
  }
}

// One step of all lanes, after their input products. h_new is not h. Keep: leave what the backward pass needs, the recurrent
// products among it.
template <class T, bool Keep>
void advance(const Lanes<T>& lanes, bool backwards = false) {
  Pointers<T> p;
  for (i64 i = 0; i < lanes.n; ++i)
    p.a[i] = lanes.lane[i].h, p.from[i] = lanes.w.recurrent_bias, p.out[i] = lanes.lane[i].recurrent;
  const auto run = [&](const auto& finish) { multiply(lanes.w.recurrent, lanes.n, p.a, p.from, p.out, finish, backwards); };
  if (lanes.s.cell == kLstm) run(Stepped<T, kLstm, Keep>{lanes});
  else if (lanes.s.cell == kGruResetAfter) run(Stepped<T, kGruResetAfter, Keep>{lanes});
  else run(Stepped<T, kGru, Keep>{lanes}), update_lanes(lanes);
  clear_paddings(lanes);
}

// The same from recurrent products that are there, and nothing kept. h_new may be h.
template <class T>
void step(const Lanes<T>& lanes) {
  const i64 padded = lanes.s.padded;
  constexpr int W = Simd<T>::W;
  typename Simd<T>::V p[4];
  const auto read = [&](const Lane<T>& lane, i64 at, int gates) {
#pragma GCC unroll 4
    for (int g = 0; g < gates; ++g) p[g] = load(lane.recurrent + g * padded + at);
  };
  for (i64 i = 0; i < lanes.n; ++i) {
    const Lane<T>& lane = lanes.lane[i];
    if (lanes.s.cell == kLstm) {  // in two loops: one would be a chain of operations longer than the processor looks ahead
      T* o = lane.gates + 3 * padded;
      for (i64 at = 0; at < padded; at += W) read(lane, at, 4), store(o + at, lstm_cell<T, false>(lanes, i, at, p).o);
      for (i64 at = 0; at < padded; at += W) lstm_output<T, false>(lanes, i, at, {load(lane.c_new + at), load(o + at)});
    } else if (lanes.s.cell == kGruResetAfter) {
      for (i64 at = 0; at < padded; at += W) read(lane, at, 3), gru_after<T, false>(lanes, i, at, p);
    } else {
      for (i64 at = 0; at < padded; at += W) read(lane, at, 2), gru_reset<T>(lanes, i, at, p);
    }
  }
  if (lanes.s.cell == kGru) update_lanes(lanes);
  clear_paddings(lanes);
}

// The backward of one row's step. grad_h and grad_c: of the new state; then of the state before, as far as they bypass the
// products. gates: then of the pre-activations.
template <class T>
void lstm_backward(const Lane<T> lane, T* grad_h, T* grad_c, i64 padded) {
  const auto one = splat(T(1));
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    T* gate = lane.gates + at;
    const auto i = load(gate), f = load(gate + padded), g = load(gate + 2 * padded), o = load(gate + 3 * padded);
    const auto tc = load(lane.extra + at), gh = load(grad_h + at);
    const auto gc = fma(gh * o, one - tc * tc, load(grad_c + at));
    store(gate, gc * g * i * (one - i));
    store(gate + padded, gc * load(lane.c + at) * f * (one - f));
    store(gate + 2 * padded, gc * i * (one - g * g));
    store(gate + 3 * padded, gh * tc * o * (one - o));
    store(grad_c + at, gc * f);
  }
}

template <class T>
void gru_update_backward(const Lane<T> lane, T* grad_h, i64 padded) {
  const auto one = splat(T(1));
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    T* gate = lane.gates + at;
    const auto z = load(gate + padded), n = load(gate + 2 * padded), gh = load(grad_h + at);
    store(gate + padded, gh * (load(lane.h + at) - n) * z * (one - z));
    store(gate + 2 * padded, gh * (one - z) * (one - n * n));
    store(grad_h + at, gh * z);
  }
}

// grad_rh: of r * h.
template <class T>
void gru_reset_backward(const Lane<T> lane, const T* grad_rh, T* grad_h, i64 padded) {
  const auto one = splat(T(1));
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    const auto r = load(lane.gates + at), g = load(grad_rh + at);
    store(lane.gates + at, g * load(lane.h + at) * r * (one - r));
    store(grad_h + at, fma(g, r, load(grad_h + at)));
  }
}

template <class T>
void gru_after_backward(const Lane<T> lane, T* grad_h, i64 padded) {
  const auto one = splat(T(1));
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    T* gate = lane.gates + at;
    const auto m = load(gate), r = load(gate + padded), z = load(gate + 2 * padded), n = load(gate + 3 * padded);
    const auto gh = load(grad_h + at), gn = gh * (one - z) * (one - n * n);
    store(gate, gn * r);
    store(gate + padded, gn * m * r * (one - r));
    store(gate + 2 * padded, gh * (load(lane.h + at) - n) * z * (one - z));
    store(gate + 3 * padded, gn);
    store(grad_h + at, gh * z);
  }
}

// All of one layer's rows. zero: at least padded zeros. scratch: n * padded.
template <class T>
void step_backward(const Shape& s, const LayerWeights<T>& w, const Lane<T>* lanes, i64 n, T* const* grad_h,
                   T* const* grad_c, const T* zero, T* scratch) {
  Pointers<T> p;
  const i64 padded = s.padded;
  for (i64 i = 0; i < n; ++i) p.a[i] = lanes[i].gates, p.from[i] = s.has_c() ? zero : grad_h[i];
  if (s.cell == kLstm) {
    for (i64 i = 0; i < n; ++i) lstm_backward(lanes[i], grad_h[i], grad_c[i], padded);
  } else if (s.cell == kGruResetAfter) {
    for (i64 i = 0; i < n; ++i) gru_after_backward(lanes[i], grad_h[i], padded);
  } else {
    Pointers<T> q;
    for (i64 i = 0; i < n; ++i) {
      gru_update_backward(lanes[i], grad_h[i], padded);
      q.a[i] = lanes[i].gates + 2 * padded, q.from[i] = zero, q.out[i] = scratch + i * padded;
    }
    multiply(w.candidate_t, n, q.a, q.from, q.out);
    for (i64 i = 0; i < n; ++i) gru_reset_backward(lanes[i], q.out[i], grad_h[i], padded);
  }
  multiply(w.recurrent_t, n, p.a, p.from, grad_h);
}

}  // namespace
