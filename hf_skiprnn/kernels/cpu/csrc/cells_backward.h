// The backward of the cells' steps (cells.h), on rows of padded units.
#pragma once

#include "cells.h"

namespace {

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
