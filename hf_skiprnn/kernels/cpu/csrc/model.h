// The model as one call sees it: typed arguments, packed weights, working memory. And when a row's next update is.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "call.h"
#include "cells.h"

namespace {

// The working memory of one call. All of it is allocated before the threads start.
class Arena {
 public:
  template <class T>
  T* take(i64 count) {
    const std::size_t bytes = (std::size_t(std::max<i64>(count, 1)) * sizeof(T) + 63) / 64 * 64;
    void* block = std::aligned_alloc(64, bytes);
    if (!block) throw std::bad_alloc();
    blocks_.emplace_back(block, &std::free);
#ifdef SKIP_RNN_POISON
    std::memset(block, 0xff, bytes);  // NaN: a value that is read before it is written then shows in the results
#endif
    return static_cast<T*>(block);
  }
  template <class T>
  T* zeros(i64 count) {
    T* block = take<T>(count);
    std::fill(block, block + count, T(0));
    return block;
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
};

template <class T>
const T* typed(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* typed(void* p) {
  return static_cast<T*>(p);
}

inline bool is_cancelled(const SkipRnnCall& call) {
  return call.cancel && __atomic_load_n(call.cancel, __ATOMIC_RELAXED) != 0;
}

#ifndef SKIP_RNN_AMX_UNITS  // the fuzz driver's
#define SKIP_RNN_AMX_UNITS 128  // a row of a narrower layer takes less time without AMX
#endif

template <class T>
struct Model {
  const SkipRnnCall& call;
  Shape shape;
  std::vector<LayerWeights<T>> layers;
  T* gate_weight = nullptr;  // [padded], or null
  T gate_bias = 0;
  const T* zero = nullptr;   // [padded]
  bool amx;                  // weights are multiplied with AMX
  bool alone;                // rows are multiplied one at a time
  bool pairs;                // weights are packed as bfloat16 numbers

  // rows: how many a thread computes together.
  Model(const SkipRnnCall& call, Arena& arena, bool backward, i64 rows)
      : call(call), layers(call.layers), amx(uses_amx(call)), alone(rows == 1 && !call.products && !amx) {
    constexpr int W = Simd<T>::W;
    shape = {call.batch, call.steps, call.inputs, call.units, call.layers, (call.units + W - 1) / W * W, int(call.cell),
             layout_of(int(call.cell))};
    zero = arena.zeros<T>(shape.padded);
    const i64 depth = shape.inputs + (2 * shape.layers - 1) * shape.units;  // of all matrices together
    pairs = amx || (call.is_bf16 && rows <= kRows && shape.activations() * depth * i64(sizeof(T)) > kPairsAbove);
    for (i64 l = 0; l < shape.layers; ++l) pack_layer(l, arena, backward);
    if (!call.gate_weight) return;
    gate_weight = arena.zeros<T>(shape.padded);
    std::memcpy(gate_weight, call.gate_weight, shape.units * sizeof(T));
    gate_bias = *typed<T>(call.gate_bias);
  }

  bool learned() const { return gate_weight != nullptr; }
  bool is_real(i64 b, i64 t) const { return !call.mask || call.mask[b * shape.steps + t]; }
  i64 count_real(i64 b, i64 begin, i64 end) const {
    if (!call.mask) return end - begin;
    i64 count = 0;
    for (const std::uint8_t *m = call.mask + b * shape.steps, *p = m + begin; p < m + end; ++p) count += *p != 0;
    return count;
  }
  const T* x(i64 b, i64 t) const { return typed<T>(call.x) + x_at(b, t); }
  const Bf16* bf16_x(i64 b, i64 t) const { return typed<Bf16>(call.x) + x_at(b, t); }
  void copy_x(i64 b, i64 t, T* to) const { copy(call.x, x_at(b, t), shape.inputs, to); }
  // Copies the lowest layer's input product of row b at time t from the record into a lane's activations.
  void load_product(i64 b, i64 t, T* activations) const {
    for (int g = 0; g < shape.layout.input.count; ++g) {
      T* to = activations + (shape.layout.input_at + g) * shape.padded;
      std::memcpy(to, product_at(b, t, g), shape.units * sizeof(T));
      clear_padding(to, shape.units, shape.padded);
    }
  }
  T* product_at(i64 b, i64 t, int activation) const {
    return typed<T>(call.products) + ((b * shape.steps + t) * shape.layout.input.count + activation) * shape.units;
  }
  // The increment D of a new state (equation 4 of the paper); 0 without a learned gate.
  T increment_of(i64 b, const T* top) const {
    if (!learned()) return 0;
    return T(1) / (T(1) + std::exp(-gate_pre_activation(b, top)));
  }

  // The increments of several states in place of their pre-activations z. The array has room for whole vectors.
  void increments_of(T* z, i64 count) const {
    for (i64 i = 0; i < count; i += Simd<T>::W) store(z + i, sigmoid<T>(load(z + i)));
  }
  // W_p top + b_p + gate_shift[b].
  T gate_pre_activation(i64 b, const T* top) const {
    const T z = dot(gate_weight, top, shape.padded) + gate_bias;
    return call.gate_shift ? z + typed<T>(call.gate_shift)[b] : z;
  }

  // True once the caller wants the call to end early. Results are then incomplete.
  bool cancelled() const { return is_cancelled(call); }

 private:
  // By the shape alone, so that a row's results do not depend on the rows beside it.
  static bool uses_amx(const SkipRnnCall& call) {
    return call.amx && (call.is_bf16 || call.rounded) && !call.is_double && call.units >= SKIP_RNN_AMX_UNITS && may_use_amx();
  }

  i64 x_at(i64 b, i64 t) const {
    const i64 at = b * shape.steps + t;
    return (call.ids ? call.ids[at] : at) * shape.inputs;
  }

  // Copies n numbers of x or of a weight, from number `begin` on.
  void copy(const void* from, i64 begin, i64 n, T* to) const {
    if (!call.is_bf16) std::memcpy(to, typed<T>(from) + begin, n * sizeof(T));
    else for (i64 i = 0; i < n; ++i) to[i] = T(value_of(typed<Bf16>(from)[begin + i]));
  }

  T* padded_copy(Arena& arena, const void* bias, const ActivationOrder& order) {
    T* out = arena.zeros<T>(order.count * shape.padded);
    for (int g = 0; bias && g < order.count; ++g)
      copy(bias, order.source[g] * shape.units, shape.units, out + g * shape.padded);
    return out;
  }

  Packed<T> packed(Arena& arena, const void* weight, i64 depth, const ActivationOrder& order, i64 interleaved = 1) {
    Packed<T> m{nullptr, order.count * shape.padded / Simd<T>::W, depth, interleaved, shape.padded, pairs, amx};
    m.data = arena.take<T>(m.elements());
    if constexpr (sizeof(T) == sizeof(float)) {
      if (call.is_bf16) {
        pack(m, typed<Bf16>(weight), shape.units, shape.padded, order);
        return m;
      }
    }
    pack(m, typed<T>(weight), shape.units, shape.padded, order);
    return m;
  }

  Packed<T> packed_t(Arena& arena, const T* weight, i64 columns, const ActivationOrder& order) {
    constexpr int W = Simd<T>::W;
    Packed<T> m{nullptr, (columns + W - 1) / W, order.count * shape.padded, 1, shape.padded, amx, amx};
    m.data = arena.take<T>(m.elements());
    pack_transposed(m, weight, shape.units, shape.padded, columns, order);
    return m;
  }

  void pack_layer(i64 l, Arena& arena, bool backward) {
    const CellLayout& cell = shape.layout;
    const void* const* part = call.weights + 4 * l;
    LayerWeights<T>& w = layers[l];
    w.inputs = l ? shape.units : shape.inputs;
    w.direct = l == 0 && w.inputs <= kDirectInputs;
    w.input_bias = padded_copy(arena, part[2], cell.input);
    w.recurrent_bias = arena.zeros<T>(shape.recurrent());
    if (part[3]) copy(part[3], 0, shape.units, w.recurrent_bias);  // of m, the first one
    w.recurrent = packed(arena, part[1], shape.units, cell.recurrent, alone ? cell.recurrent.count : 1);
    if (w.direct) pack_rows(w, part[0], arena);
    else if (!(backward && l == 0 && call.products)) w.input = packed(arena, part[0], w.inputs, cell.input);
    if (cell.candidate.count) w.candidate = packed(arena, part[1], shape.units, cell.candidate);
    if (!backward) return;
    w.recurrent_t = packed_t(arena, typed<T>(part[1]), shape.units, cell.recurrent);
    if (cell.candidate.count) w.candidate_t = packed_t(arena, typed<T>(part[1]), shape.units, cell.candidate);
    if (l || call.grad_x) w.input_t = packed_t(arena, typed<T>(part[0]), w.inputs, cell.input);
  }

  void pack_rows(LayerWeights<T>& w, const void* weight, Arena& arena) {
    const ActivationOrder& order = shape.layout.input;
    w.rows = arena.zeros<T>(w.inputs * order.count * shape.padded);
    T row[kDirectInputs];
    for (int g = 0; g < order.count; ++g)
      for (i64 u = 0; u < shape.units; ++u) {
        copy(weight, (order.source[g] * shape.units + u) * w.inputs, w.inputs, row);
        for (i64 k = 0; k < w.inputs; ++k) w.rows[(k * order.count + g) * shape.padded + u] = row[k];
      }
  }
};

// The number of real steps to the next update: 1, 2, ..., or left + 1 where it is later than the `left` steps that remain.
// The comparison with 0.5 is made in float32 in every precision. A NaN updates at the next step.
template <class T>
i64 steps_to_update(T steps_since_update, T increment, i64 left) {
  const float d = float(increment);
  const auto opens = [&](i64 j) { return !(float(steps_since_update + T(j)) * d < 0.5f); };
  const float most = float(left + 1);
  float guess = std::ceil(0.5f / d) - float(steps_since_update);
  guess = guess >= 1 ? guess : 1;  // also where it is NaN
  i64 j = guess < most ? i64(guess) : left + 1;
  if (!(d > 0)) j = opens(1) ? 1 : left + 1;
  while (j > 1 && opens(j - 1)) --j;
  while (j <= left && !opens(j)) ++j;
  return j;
}

// The position of one row in its sequence.
template <class T>
struct Clock {
  i64 row = 0, now = -1;  // the time of the last update; after `advance`, of the next one
  i64 left = 0;           // real steps after `now`
  T increment = 0, steps_since_update = 0;

  void start(const Model<T>& m, i64 b) {
    row = b, now = -1, left = m.count_real(b, 0, m.shape.steps);
    increment = typed<T>(m.call.increment0)[b], steps_since_update = typed<T>(m.call.steps_since_update0)[b];
  }

  // Moves to the next update. Where there is none, returns false and changes nothing.
  bool advance(const Model<T>& m) {
    const std::uint8_t* forced = m.call.forced ? m.call.forced + row * m.shape.steps : nullptr;
    const i64 wanted = forced || !m.learned() ? 1 : steps_to_update(steps_since_update, increment, left);
    if (wanted > left) return false;
    if (!forced && !m.call.mask) {
      now += wanted, left -= wanted;
      return true;
    }
    i64 passed = 0;
    for (i64 t = now + 1; t < m.shape.steps; ++t) {
      if (!m.is_real(row, t)) continue;
      ++passed;
      if (forced ? !forced[t] : passed < wanted) continue;
      now = t, left -= passed;
      return true;
    }
    return false;
  }
};

}  // namespace
