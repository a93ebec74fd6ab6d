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
  const T* recurrent;  // the recurrent product
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

// Where a step's input product comes from.
enum Source { kProduct, kOneInput, kFewInputs };

// The input product of one gate at one vector of units.
template <class T, Source From>
struct InputProduct {
  typename Simd<T>::V first;  // the input, if it is one
  const T *x, *rows, *bias, *product;
  i64 inputs, width, padded;

  SKIP_RNN_INLINE InputProduct(const LayerWeights<T>& w, const CellLayout& cell, const Lane<T>& lane, i64 padded)
      : first(splat(From == kOneInput ? *lane.x : T(0))), x(lane.x), rows(w.rows), bias(w.input_bias),
        product(lane.gates + cell.input_at * padded), inputs(w.inputs), width(cell.input.count * padded), padded(padded) {}

  SKIP_RNN_INLINE typename Simd<T>::V operator()(int gate, i64 at) const {
    const i64 unit = gate * padded + at;
    if constexpr (From == kProduct) return load(product + unit);
    if constexpr (From == kOneInput) return fma(first, load(rows + unit), load(bias + unit));
    auto v = load(bias + unit);
    for (i64 k = 0; k < inputs; ++k) v = fma(splat(x[k]), load(rows + k * width + unit), v);
    return v;
  }
};

// Padding stays 0, whatever the inputs hold.
template <class T>
SKIP_RNN_INLINE void clear_padding(T* row, i64 units, i64 padded) {
  for (i64 i = units; i < padded; ++i) row[i] = 0;
}

// In two loops: one would be a chain of operations longer than the processor looks ahead.
template <class T, Source From, bool Keep>
void lstm_step(const InputProduct<T, From> input, const Lane<T> lane, i64 units, i64 padded) {
  const auto two = splat(T(2));
  const T *p = lane.recurrent, *c_old = lane.c;
  T *gates = lane.gates, *h_new = lane.h_new, *c_new = lane.c_new, *extra = lane.extra;
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    const auto a = sigmoid_denominator<T>(input(0, at) + load(p + at));
    const auto b = sigmoid_denominator<T>(input(1, at) + load(p + padded + at));
    const auto e = tanh_numerator<T>(input(2, at) + load(p + 2 * padded + at));
    const auto d = sigmoid_denominator<T>(input(3, at) + load(p + 3 * padded + at));
    const auto ig = reciprocal(a * (e + two));  // sigmoid and tanh share a division
    const auto f = reciprocal(b);
    store(c_new + at, fma(f, load(c_old + at), e * ig));
    store(gates + 3 * padded + at, d);
    if constexpr (Keep) {
      store(gates + at, (e + two) * ig);
      store(gates + padded + at, f);
      store(gates + 2 * padded + at, e * a * ig);
    }
  }
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    const auto s = tanh_numerator<T>(load(c_new + at)), d = load(gates + 3 * padded + at);
    const auto oc = reciprocal(d * (s + two));
    store(h_new + at, s * oc);
    if constexpr (Keep) {
      store(gates + 3 * padded + at, (s + two) * oc);
      store(extra + at, s * d * oc);
    }
  }
  clear_padding(h_new, units, padded);
  clear_padding(c_new, units, padded);
}

// r and z, and r * h for n's product.
template <class T, Source From>
void gru_reset(const InputProduct<T, From> input, const Lane<T> lane, i64 padded) {
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    const auto r = sigmoid<T>(input(0, at) + load(lane.recurrent + at));
    const auto z = sigmoid<T>(input(1, at) + load(lane.recurrent + padded + at));
    store(lane.gates + at, r);
    store(lane.gates + padded + at, z);
    store(lane.extra + at, r * load(lane.h + at));
  }
}

// n, from its product `candidate` of r * h.
template <class T, Source From>
void gru_update(const InputProduct<T, From> input, const Lane<T> lane, const T* candidate, i64 units, i64 padded) {
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    const auto n = tanh<T>(input(2, at) + load(candidate + at));
    const auto h = load(lane.h + at);
    store(lane.gates + 2 * padded + at, n);
    store(lane.h_new + at, fma(load(lane.gates + padded + at), h - n, n));
  }
  clear_padding(lane.h_new, units, padded);
}

template <class T, Source From>
void gru_after_step(const InputProduct<T, From> input, const Lane<T> lane, i64 units, i64 padded) {
  const T* p = lane.recurrent;
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    const auto m = load(p + at);
    const auto r = sigmoid<T>(input(0, at) + load(p + padded + at));
    const auto z = sigmoid<T>(input(1, at) + load(p + 2 * padded + at));
    const auto n = tanh<T>(fma(r, m, input(2, at)));
    const auto h = load(lane.h + at);
    store(lane.gates + at, m);
    store(lane.gates + padded + at, r);
    store(lane.gates + 2 * padded + at, z);
    store(lane.gates + 3 * padded + at, n);
    store(lane.h_new + at, fma(z, h - n, n));
  }
  clear_padding(lane.h_new, units, padded);
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

template <class T>
void recurrent_products(const LayerWeights<T>& w, const Lane<T>* lanes, i64 n, T* const* out, bool backwards = false) {
  Pointers<T> p;
  for (i64 i = 0; i < n; ++i) p.a[i] = lanes[i].h, p.from[i] = w.recurrent_bias;
  multiply(w.recurrent, n, p.a, p.from, out, backwards);
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

template <class T, Source From, bool Keep>
void step_lanes(const Shape& s, const LayerWeights<T>& w, const Lane<T>* lanes, i64 n, T* scratch) {
  const i64 units = s.units, padded = s.padded;
  const auto input = [&](i64 i) { return InputProduct<T, From>(w, s.layout, lanes[i], padded); };
  if (s.cell == kLstm) {
    for (i64 i = 0; i < n; ++i) lstm_step<T, From, Keep>(input(i), lanes[i], units, padded);
  } else if (s.cell == kGruResetAfter) {
    for (i64 i = 0; i < n; ++i) gru_after_step<T, From>(input(i), lanes[i], units, padded);
  } else {
    Pointers<T> p;
    for (i64 i = 0; i < n; ++i) {
      gru_reset<T, From>(input(i), lanes[i], padded);
      p.a[i] = lanes[i].extra, p.from[i] = w.recurrent_bias, p.out[i] = scratch + i * padded;  // that bias is 0
    }
    multiply(w.candidate, n, p.a, p.from, p.out);
    for (i64 i = 0; i < n; ++i) gru_update<T, From>(input(i), lanes[i], p.out[i], units, padded);
  }
}

// The step proper, after both products. scratch: n * padded. Keep: leave what the backward pass needs.
template <class T>
void step(const Shape& s, const LayerWeights<T>& w, const Lane<T>* lanes, i64 n, bool keep, T* scratch) {
  const auto run = keep ? (!w.direct ? step_lanes<T, kProduct, true>
                           : w.inputs == 1 ? step_lanes<T, kOneInput, true> : step_lanes<T, kFewInputs, true>)
                        : (!w.direct ? step_lanes<T, kProduct, false>
                           : w.inputs == 1 ? step_lanes<T, kOneInput, false> : step_lanes<T, kFewInputs, false>);
  run(s, w, lanes, n, scratch);
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
