// The backward pass. It takes a few rows at a time, and of them one segment of updates after the other, the last segment
// first. It recomputes a segment from its checkpoint, then goes back through the segment's steps.
//
// A skipped step needs one number for the straight-through gate (event_scan_skip_rnn.py has the formula). It contains the
// state that an update would have made there. These states are computed many at a time (candidates.h).
#pragma once

#include <numeric>

#include "candidates.h"
#include "cells_backward.h"

namespace {

// Where the weight gradients of a share of the rows are in memory, in packed layout. How rows are divided into shares depends
// on the call alone, and the shares are added in order. So the number of threads does not change the result.
template <class T>
struct Gradients {
  struct Layer {
    i64 input, recurrent, candidate, input_bias, recurrent_bias;  // offsets
  };
  std::vector<Layer> layers;
  i64 gate_weight = 0, gate_bias = 0, size = 0;

  explicit Gradients(const Model<T>& m) {
    const Shape& s = m.shape;
    const auto take = [this](i64 n) { return std::exchange(size, size + (n + 15) / 16 * 16); };
    for (const auto& w : m.layers) {
      const i64 width = s.layout.input.count * s.padded;
      Layer at;
      at.input = take(w.inputs * width);
      at.recurrent = take(s.units * s.recurrent());
      at.candidate = take(s.units * s.layout.candidate.count * s.padded);
      at.input_bias = take(width);
      at.recurrent_bias = take(s.padded);
      layers.push_back(at);
    }
    gate_weight = take(s.padded);
    gate_bias = take(1);
  }

  void write(const Model<T>& m, const T* shares, i64 count) const {
    const Shape& s = m.shape;
    const CellLayout& cell = s.layout;
    const auto put = [&](i64 at, void* to, i64 depth, const ActivationOrder& order) {
      if (to) unpack_sum(shares + at, count, size, typed<T>(to), s.units, s.padded, depth, order);
    };
    for (i64 l = 0; l < s.layers; ++l) {
      void* const* to = m.call.grad_weights + 4 * l;
      put(layers[l].input, to[0], m.layers[l].inputs, cell.input);
      put(layers[l].recurrent, to[1], s.units, cell.recurrent);
      put(layers[l].candidate, cell.candidate.count ? to[1] : nullptr, s.units, cell.candidate);
      put(layers[l].input_bias, to[2], 1, cell.input);
      put(layers[l].recurrent_bias, to[3], 1, {1, {0}});
    }
    if (!m.learned()) return;
    put(gate_weight, m.call.grad_gate_weight, 1, {1, {0}});
    T bias = 0;
    for (i64 i = 0; i < count; ++i) bias += shares[i * size + gate_bias];
    *typed<T>(m.call.grad_gate_bias) = bias;
  }
};

// The backward pass of one chunk of rows.
template <class T>
class BackwardTeam {
 public:
  BackwardTeam(const Model<T>& model, const Gradients<T>& where, Arena& arena)
      : m_(model), s_(model.shape), where_(where),
        split_(model.amx ? arena.take<Bf16>(split_numbers(model)) : nullptr), segment_(model, arena, split_),
        ahead_(model, arena, segment_, split_) {
    const i64 rows = model.call.rows, events = rows * model.call.every;
    grad_h_ = arena.take<T>(rows * s_.layers * s_.padded);
    grad_c_ = s_.has_c() ? arena.take<T>(rows * s_.layers * s_.padded) : nullptr;
    scratch_ = arena.take<T>(kLanes * std::max(s_.padded, (s_.inputs + Simd<T>::W - 1) / Simd<T>::W * Simd<T>::W));
    outer_ = arena.take<T>(events * (std::max(s_.inputs, s_.units) + kVectors * Simd<T>::W));
    grad_rows_.resize(events), operands_.resize(events), at_.resize(events);
    carry_.resize(rows);
  }

  // Computes the gradients of rows order[0 .. n-1] and adds those of the weights to `share`.
  void run(const i64* order, i64 n, T* share) {
    const AmxSession session(m_.amx);
    share_ = share;
    segment_.rows.clear();
    i64 segments = 0;
    for (i64 r = 0; r < n; ++r) {
      segment_.rows.push_back(segment_.timeline(order[r]));
      read_cotangents(r, order[r]);
      segments = std::max(segments, segment_.rows[r].updates / m_.call.every + 1);
    }
    for (i64 index = segments; index-- > 0;) {
      segment_.recompute(index);
      if (m_.learned()) ahead_.start();
      for (i64 e = m_.call.every; e-- > 0;) {
        if (m_.cancelled()) return;
        through_updates(e);
        for (i64 r = 0; r < n; ++r)
          if (segment_.holds(e, r)) through_held_steps(e, r);
      }
      add_weight_gradients();
    }
    for (i64 r = 0; r < n; ++r) write_state_gradients(r, order[r]);
  }

 private:
  struct Carry {
    T increment, accumulator, num_updates;  // cotangents of D, of q (update_prob = q + D) and of the row's updates
    T gate_shift;                           // the gradient of the row's gate_shift, summed over its updates so far
  };
  T* grad_h(i64 r, i64 l) { return grad_h_ + (r * s_.layers + l) * s_.padded; }
  T* grad_c(i64 r, i64 l) { return grad_c_ + (r * s_.layers + l) * s_.padded; }
  T* grad_top(i64 r) { return grad_c_ ? grad_c(r, s_.layers - 1) : grad_h(r, s_.layers - 1); }
  static constexpr i64 kSplitRows = 60;  // rows of a product for the inputs' gradients
  static i64 split_numbers(const Model<T>& m) {
    const Shape& s = m.shape;
    const i64 events = m.call.rows * m.call.every;
    return std::max({tile_numbers<Rounded>(kLanes, s.inputs), tile_numbers<float>(kLanes, s.units),
                     tile_numbers<float>(std::max(kSplitRows, m.call.rows), s.activations()), outer_numbers<Rounded>(events, s.inputs),
                     outer_numbers<float>(events, s.units)});
  }
  i64 state_at(i64 l, i64 b) const { return (l * s_.batch + b) * s_.units; }

  void read_cotangents(i64 r, i64 b) {
    const auto read = [&](const void* from, i64 l, T* to) {
      std::fill(to, to + s_.padded, T(0));
      if (from) std::memcpy(to, typed<T>(from) + state_at(l, b), s_.units * sizeof(T));
    };
    for (i64 l = 0; l < s_.layers; ++l) {
      read(m_.call.grad_h, l, grad_h(r, l));
      if (grad_c_) read(m_.call.grad_c, l, grad_c(r, l));
    }
    const auto number = [b](const void* from) { return from ? typed<T>(from)[b] : T(0); };
    carry_[r] = {number(m_.call.grad_increment), T(0), number(m_.call.grad_num_updates), T(0)};
    // The state stores q as the number of steps k, with q = k D.
    const T last = typed<T>(m_.call.increment)[b];
    if (m_.learned() && last != 0) carry_[r].accumulator = number(m_.call.grad_steps_since_update) / last;
  }

  void write_state_gradients(i64 r, i64 b) {
    for (i64 l = 0; l < s_.layers; ++l) {
      std::memcpy(typed<T>(m_.call.grad_h0) + state_at(l, b), grad_h(r, l), s_.units * sizeof(T));
      if (grad_c_) std::memcpy(typed<T>(m_.call.grad_c0) + state_at(l, b), grad_c(r, l), s_.units * sizeof(T));
    }
    typed<T>(m_.call.grad_increment0)[b] = carry_[r].increment;
    typed<T>(m_.call.grad_steps_since_update0)[b] = m_.learned() ? carry_[r].accumulator * typed<T>(m_.call.increment0)[b] : T(0);
    if (m_.call.grad_gate_shift) typed<T>(m_.call.grad_gate_shift)[b] = carry_[r].gate_shift;
  }

  void add_output_cotangent(i64 r, i64 t) {
    const T* from = typed<T>(m_.call.grad_sequence) + (segment_.rows[r].row * s_.steps + t) * s_.units;
    T* to = grad_h(r, s_.layers - 1);
    for (i64 u = 0; u < s_.units; ++u) to[u] += from[u];
  }

  // du / d(update_prob), which replaces the derivative of the rounding.
  T gate_slope(T increment) const { return m_.call.capped && m_.call.capped * increment < 1 ? m_.call.capped * increment : T(1); }

  // The cotangent of the gate u at time t.
  T of_gate(i64 r, i64 t) const {
    const T* of_gates = typed<T>(m_.call.grad_update_gates);
    return carry_[r].num_updates + (of_gates ? of_gates[segment_.rows[r].row * s_.steps + t] : T(0));
  }

  // Goes back through the steps that hold state e, from the last one to the one after the update that made the state.
  void through_held_steps(i64 e, i64 r) {
    if (m_.call.grad_sequence) {
      const auto [begin, end] = segment_.held(e, r);
      for (i64 t = end; t-- > begin;) {
        add_output_cotangent(r, t);
        if (m_.learned() && m_.is_real(segment_.rows[r].row, t)) through_skipped_step(*ahead_.next(e, r), e, r);
      }
    } else if (m_.learned()) {
      while (const auto* skipped = ahead_.next(e, r)) through_skipped_step(*skipped, e, r);
    }
  }

  void through_skipped_step(const SkippedStep<T>& skipped, i64 e, i64 r) {
    Carry& g = carry_[r];
    const T held = segment_.increment(e, r), probability = skipped.steps_since_update * held;
    T of_u = of_gate(r, skipped.time) + g.increment * (skipped.increment - held) - g.accumulator * probability;
    auto product = splat(T(0));
    for (i64 l = 0; l < s_.layers; ++l) {
      product = add_difference(product, grad_h(r, l), ahead_.h(skipped, l), segment_.h(l, e, r), s_.padded);
      if (grad_c_) product = add_difference(product, grad_c(r, l), ahead_.c(skipped, l), segment_.c(l, e, r), s_.padded);
    }
    of_u += sum<T>(product);
    g.accumulator += gate_slope(held) * of_u;
    g.increment += g.accumulator;
  }

  void through_updates(i64 e) {
    Lane<T> lanes[kLanes];
    T *of_h[kLanes], *of_c[kLanes];
    i64 rows[kLanes], n = 0;
    for (i64 r = 0; r < i64(segment_.rows.size()); ++r)
      if (segment_.updates(e, r)) through_gate(e, r), rows[n++] = r;
    for (i64 l = s_.layers; n && l-- > 0;) {
      Pointers<T> p;
      for (i64 i = 0; i < n; ++i) {
        lanes[i] = segment_.lane(l, e, rows[i]);
        of_h[i] = grad_h(rows[i], l);
        of_c[i] = grad_c_ ? grad_c(rows[i], l) : nullptr;
        p.a[i] = lanes[i].activations + s_.layout.input_at * s_.padded;
        if (l) p.from[i] = p.out[i] = grad_h(rows[i], l - 1);
      }
      step_backward(s_, m_.layers[l], lanes, n, of_h, of_c, m_.zero, scratch_, split_);
      if (l) multiply_lanes<T>(m_.layers[l].input_t, p, n, split_);
    }
  }

  // The gradients of update e of row r through its gate and through the increment that it emitted.
  void through_gate(i64 e, i64 r) {
    const i64 t = segment_.time(e, r), top = s_.layers - 1;
    Carry& g = carry_[r];
    if (m_.call.grad_sequence) add_output_cotangent(r, t);
    if (!m_.learned()) {
      g.increment = 0;
      return;
    }
    const T emitted = segment_.increment(e + 1, r), held = segment_.increment(e, r);
    const T probability = segment_.steps_since_update_at(e, r) * held;
    T of_u = of_gate(r, t) + g.increment * (emitted - held) - g.accumulator * probability;
    auto product = splat(T(0));
    for (i64 l = 0; l < s_.layers; ++l) {
      product = add_difference(product, grad_h(r, l), segment_.h(l, e + 1, r), segment_.h(l, e, r), s_.padded);
      if (grad_c_) product = add_difference(product, grad_c(r, l), segment_.c(l, e + 1, r), segment_.c(l, e, r), s_.padded);
    }
    of_u += sum<T>(product);
    const T of_z = g.increment * emitted * (1 - emitted);
    const T* state = grad_c_ ? segment_.c(top, e + 1, r) : segment_.h(top, e + 1, r);
    add_scaled(share_ + where_.gate_weight, of_z, state, s_.padded);
    share_[where_.gate_bias] += of_z;
    g.gate_shift += of_z;
    add_scaled(grad_top(r), of_z, m_.gate_weight, s_.padded);
    g.increment = g.accumulator = gate_slope(held) * of_u;
  }

  // Adds the weight gradients of all updates of the segment, as one outer product a weight.
  void add_weight_gradients() {
    const CellLayout& cell = s_.layout;
    constexpr int W = Simd<T>::W;
    for (i64 l = 0; l < s_.layers; ++l) {
      const auto& at = where_.layers[l];
      if (m_.cancelled()) return;
      const i64 blocks = s_.padded / W, inputs = m_.layers[l].inputs;
      i64 n = gather(l, cell.input_at, [](const Lane<T>& lane) { return lane.x; });
      if (l) add_outer_products(n, cell.input.count * blocks, inputs, at.input);
      else add_outer_products<Rounded>(n, cell.input.count * blocks, inputs, at.input);
      add_sum(n, cell.input.count * s_.padded, share_ + at.input_bias);
      if (!l && m_.call.grad_x) write_input_gradients(n);
      gather(l, 0, [](const Lane<T>& lane) { return lane.h; });
      add_outer_products(n, cell.recurrent.count * blocks, s_.units, at.recurrent);
      if (s_.cell == kGruResetAfter) add_sum(n, s_.padded, share_ + at.recurrent_bias);
      if (!cell.candidate.count) continue;
      gather(l, 2, [](const Lane<T>& lane) { return lane.extra; });
      add_outer_products(n, blocks, s_.units, at.candidate);
    }
  }

  // Number: the type that the operands really have where AMX is used.
  template <class Number = T>
  void add_outer_products(i64 events, i64 vectors, i64 columns, i64 at) {
    if constexpr (sizeof(T) == sizeof(float)) {
      const auto* operands = reinterpret_cast<const Number* const*>(operands_.data());
      if (m_.amx && columns >= kTileRows)
        return add_outer_amx(events, grad_rows_.data(), vectors, operands, columns, share_ + at, split_);
    }
    add_outer(events, grad_rows_.data(), vectors, operands_.data(), columns, share_ + at, outer_);
  }

  // Collects, of every update of the segment, the pre-activations' cotangents (from activation `first` on) and the operand that
  // the weights multiplied.
  template <class Operand>
  i64 gather(i64 l, int first, Operand operand) {
    i64 n = 0;
    for (i64 e = 0; e < m_.call.every; ++e)
      for (i64 r = 0; r < i64(segment_.rows.size()); ++r) {
        if (!segment_.updates(e, r)) continue;
        const Lane<T> lane = segment_.lane(l, e, r);
        grad_rows_[n] = lane.activations + first * s_.padded;
        operands_[n] = operand(lane);
        at_[n++] = segment_.rows[r].row * s_.steps + segment_.time(e, r);
      }
    return n;
  }

  void add_sum(i64 n, i64 width, T* out) const {
    for (i64 i = 0; i < n; ++i) add_scaled(out, T(1), grad_rows_[i], width);
  }

  void write_input_gradients(i64 n) {
    const auto& w = m_.layers[0].input_t;
    const i64 width = w.vectors * Simd<T>::W;
    T* out = typed<T>(m_.call.grad_x);
    const i64 most = m_.amx ? kSplitRows : kLanes;
    for (i64 first = 0; first < n; first += most) {
      const i64 count = std::min(n - first, most);
      Pointers<T> p;
      for (i64 i = 0; i < count; ++i) {
        p.a[i] = grad_rows_[first + i], p.from[i] = zero_inputs();
        p.out[i] = width == s_.inputs ? out + at_[first + i] * s_.inputs : scratch_ + i * width;
      }
      multiply_lanes<T>(w, p, count, split_);
      if (width == s_.inputs) continue;
      for (i64 i = 0; i < count; ++i) std::memcpy(out + at_[first + i] * s_.inputs, p.out[i], s_.inputs * sizeof(T));
    }
  }

  const T* zero_inputs() {
    if (zero_inputs_.empty()) zero_inputs_.assign(m_.layers[0].input_t.vectors * Simd<T>::W, T(0));
    return zero_inputs_.data();
  }

  const Model<T>& m_;
  const Shape& s_;
  const Gradients<T>& where_;
  Bf16* split_;
  Segment<T> segment_;
  Candidates<T> ahead_;
  T *grad_h_, *grad_c_, *scratch_, *outer_, *share_ = nullptr;
  std::vector<Carry> carry_;
  std::vector<const T*> grad_rows_, operands_;
  std::vector<i64> at_;
  std::vector<T> zero_inputs_;
};

constexpr i64 kShares = 16;
constexpr i64 kShareBytes = i64(64) << 20;  // the memory that all shares together may take; two shares are always allowed

template <class T>
void backward(const SkipRnnCall& call) {
  Arena arena;
  const Model<T> model(call, arena, true, kLanes);
  const Gradients<T> where(model);
  std::vector<i64> order(call.batch);  // sorted by the number of updates: the rows of a chunk then end at about the same time
  std::iota(order.begin(), order.end(), i64(0));
  std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return call.counts[a] > call.counts[b]; });

  const Parts chunks(call.batch, call.rows);
  const i64 fitting = std::max<i64>(2, kShareBytes / (where.size * i64(sizeof(T))));
  const i64 shares = std::max<i64>(1, std::min({chunks.count, kShares, fitting}));
  T* sums = arena.zeros<T>(shares * where.size);
  const i64 threads = std::max<i64>(1, std::min(call.threads, shares));
  std::vector<std::unique_ptr<BackwardTeam<T>>> teams;
  for (i64 i = 0; i < threads; ++i) teams.push_back(std::make_unique<BackwardTeam<T>>(model, where, arena));
  std::atomic<i64> next{0};
  run_threads(int(threads), [&](int i) {
    for (i64 share; (share = next.fetch_add(1)) < shares;) {
      i64 first = 0;
      for (i64 c = 0; c < chunks.count; first += chunks[c++])
        if (c % shares == share) teams[i]->run(order.data() + first, chunks[c], sums + share * where.size);
    }
  });
  where.write(model, sums, shares);
}

}  // namespace
