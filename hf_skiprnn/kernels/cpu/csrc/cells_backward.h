// The backward pass through one layer's step (cells.h), on rows of padded units.
#pragma once

#include "cells.h"

namespace {

// The next functions go back through one row's step. grad_h and grad_c are the new state's gradients on entry. On return they
// are the old state's, without the part that passes through the products. The lane's activations become the pre-activations'
// gradients.
template <class T>
void lstm_backward(const Lane<T> lane, T* grad_h, T* grad_c, i64 padded) {
  const auto one = splat(T(1));
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    T* activation = lane.activations + at;
    const auto i = load(activation), f = load(activation + padded);
    const auto g = load(activation + 2 * padded), o = load(activation + 3 * padded);
    const auto tc = load(lane.extra + at), gh = load(grad_h + at);
    const auto gc = fma(gh * o, one - tc * tc, load(grad_c + at));
    store(activation, gc * g * i * (one - i));
    store(activation + padded, gc * load(lane.c + at) * f * (one - f));
    store(activation + 2 * padded, gc * i * (one - g * g));
    store(activation + 3 * padded, gh * tc * o * (one - o));
    store(grad_c + at, gc * f);
  }
}

template <class T>
void gru_update_backward(const Lane<T> lane, T* grad_h, i64 padded) {
  const auto one = splat(T(1));
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    T* activation = lane.activations + at;
    const auto z = load(activation + padded), n = load(activation + 2 * padded), gh = load(grad_h + at);
    store(activation + padded, gh * (load(lane.h + at) - n) * z * (one - z));
    store(activation + 2 * padded, gh * (one - z) * (one - n * n));
    store(grad_h + at, gh * z);
  }
}

// grad_rh: the gradient of r * h.
template <class T>
void gru_reset_backward(const Lane<T> lane, const T* grad_rh, T* grad_h, i64 padded) {
  const auto one = splat(T(1));
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    const auto r = load(lane.activations + at), g = load(grad_rh + at);
    store(lane.activations + at, g * load(lane.h + at) * r * (one - r));
    store(grad_h + at, fma(g, r, load(grad_h + at)));
  }
}

template <class T>
void gru_after_backward(const Lane<T> lane, T* grad_h, i64 padded) {
  const auto one = splat(T(1));
  for (i64 at = 0; at < padded; at += Simd<T>::W) {
    T* activation = lane.activations + at;
    const auto m = load(activation), r = load(activation + padded);
    const auto z = load(activation + 2 * padded), n = load(activation + 3 * padded);
    const auto gh = load(grad_h + at), gn = gh * (one - z) * (one - n * n);
    store(activation, gn * r);
    store(activation + padded, gn * m * r * (one - r));
    store(activation + 2 * padded, gh * (load(lane.h + at) - n) * z * (one - z));
    store(activation + 3 * padded, gn);
    store(grad_h + at, gh * z);
  }
}

// Goes back through the step of n rows. zero: `padded` zeros. scratch: room for n * padded. split: working memory for AMX.
template <class T>
void step_backward(const Shape& s, const LayerWeights<T>& w, const Lane<T>* lanes, i64 n, T* const* grad_h,
                   T* const* grad_c, const T* zero, T* scratch, Bf16* split) {
  Pointers<T> p;
  const i64 padded = s.padded;
  for (i64 i = 0; i < n; ++i) {
    p.a[i] = lanes[i].activations, p.from[i] = s.has_c() ? zero : grad_h[i], p.out[i] = grad_h[i];
  }
  if (s.cell == kLstm) {
    for (i64 i = 0; i < n; ++i) lstm_backward(lanes[i], grad_h[i], grad_c[i], padded);
  } else if (s.cell == kGruResetAfter) {
    for (i64 i = 0; i < n; ++i) gru_after_backward(lanes[i], grad_h[i], padded);
  } else {
    Pointers<T> q;
    for (i64 i = 0; i < n; ++i) {
      gru_update_backward(lanes[i], grad_h[i], padded);
      q.a[i] = lanes[i].activations + 2 * padded, q.from[i] = zero, q.out[i] = scratch + i * padded;
    }
    multiply_lanes<T>(w.candidate_t, q, n, split);
    for (i64 i = 0; i < n; ++i) gru_reset_backward(lanes[i], q.out[i], grad_h[i], padded);
  }
  multiply_lanes<T>(w.recurrent_t, p, n, split);
}

}  // namespace
