// The forward pass. Each row goes from update to update at its own times, and several rows are computed together.
#pragma once

#include "inputs.h"
#include "threads.h"

namespace {

// The rows that one thread computes together, each in a slot. When a row ends, the next row takes its slot.
template <class T>
class ForwardTeam {
 public:
  ForwardTeam(const Model<T>& model, Arena& arena, i64 slots, std::atomic<i64>& next_row)
      : m_(model), s_(model.shape), slots_(slots), next_row_(next_row), inputs_(model, arena, slots),
        clocks_(slots), counts_(slots), order_(slots), side_(slots) {
    h_ = arena.take<T>(2 * slots * s_.layers * s_.padded);
    c_ = s_.has_c() ? arena.take<T>(slots * s_.layers * s_.padded) : nullptr;
    recurrent_ = arena.take<T>(slots * s_.recurrent());
    activations_ = arena.take<T>(slots * s_.activations());
    extra_ = arena.take<T>(slots * s_.padded);
    scratch_ = arena.take<T>(slots * s_.padded);
    split_ = model.amx ? arena.take<Bf16>(tile_numbers<float>(slots, s_.units)) : nullptr;
  }

  void run() {
    const AmxSession session(m_.amx);
    i64 active = 0;
    for (i64 slot = 0; slot < slots_; ++slot)
      if (take_row(slot)) order_[active++] = slot;
    while (active && !m_.cancelled()) {
      update(active);
      i64 kept = 0;
      for (i64 i = 0; i < active; ++i) {
        const i64 slot = order_[i];
        if (after_update(slot) || take_row(slot)) order_[kept++] = slot;
      }
      active = kept;
    }
  }

 private:
  // A slot has two buffers for h: an update reads all of the old h while it writes the new one. other = 1: the new one.
  T* h(i64 slot, i64 l, int other = 0) {
    return h_ + ((slot * 2 + (side_[slot] ^ other)) * s_.layers + l) * s_.padded;
  }
  T* c(i64 slot, i64 l) { return c_ ? c_ + (slot * s_.layers + l) * s_.padded : nullptr; }

  // Takes the next row that has an update; false where no row is left. A row without updates is finished at once.
  bool take_row(i64 slot) {
    for (i64 b; !m_.cancelled() && (b = next_row_.fetch_add(1)) < s_.batch;) {
      for (i64 l = 0; l < s_.layers; ++l) {
        read_state(m_.call.h0, l, b, h(slot, l));
        if (c_) read_state(m_.call.c0, l, b, c(slot, l));
      }
      clocks_[slot].start(m_, b);
      inputs_.start(slot, clocks_[slot]);
      counts_[slot] = 0;
      if (clocks_[slot].advance(m_)) {
        emit(slot, 0, clocks_[slot].now);
        return true;
      }
      finish(slot, 0, clocks_[slot].steps_since_update);
    }
    return false;
  }

  void read_state(const void* from, i64 l, i64 b, T* to) const {
    std::memcpy(to, typed<T>(from) + (l * s_.batch + b) * s_.units, s_.units * sizeof(T));
    clear_padding(to, s_.units, s_.padded);
  }

  void update(i64 active) {
    Lane<T> lanes[kLanes];
    for (i64 l = 0; l < s_.layers; ++l) {
      for (i64 i = 0; i < active; ++i) {
        const i64 slot = order_[i];
        lanes[i] = {l ? h(slot, l - 1, 1) : nullptr, h(slot, l), c(slot, l), recurrent_ + i * s_.recurrent(),
                    activations_ + i * s_.activations(), extra_ + i * s_.padded, h(slot, l, 1), c(slot, l)};
      }
      if (l) input_products(s_, m_.layers[l], lanes, active, split_);
      else inputs_.read(clocks_, order_.data(), active, lanes);
      const Lanes<T> all{s_, m_.layers[l], lanes, active, scratch_, split_};
      if (m_.alone) {
        step_alone(all, round_ & 1);
        continue;
      }
      recurrent_products(all.w, lanes, active, split_);
      step<T, false>(all);
    }
    for (i64 i = 0; i < active; ++i) side_[order_[i]] ^= 1;
    ++round_;
  }

  // Records the update and finds the row's next one; false where there is none.
  bool after_update(i64 slot) {
    Clock<T>& clock = clocks_[slot];
    const i64 at = clock.now, b = clock.row;
    typed<T>(m_.call.update_gates)[b * s_.steps + at] = 1;
    if (m_.call.updates) record(slot, b, at);
    ++counts_[slot];
    const i64 top = s_.layers - 1;
    clock.increment = m_.increment_of(b, c_ ? c(slot, top) : h(slot, top));
    clock.steps_since_update = 0;
    if (clock.advance(m_)) {
      emit(slot, at, clock.now);
      return true;
    }
    finish(slot, at, T(0));
    return false;
  }

  void record(i64 slot, i64 b, i64 at) {
    m_.call.updates[b * s_.steps + counts_[slot]] = std::int32_t(at);
    const i64 done = counts_[slot] + 1, every = m_.call.every, states = s_.has_c() ? 2 : 1;
    if (done % every) return;
    T* to = typed<T>(m_.call.checkpoints) + (b * (s_.steps / every) + done / every - 1) * s_.layers * states * s_.units;
    for (i64 l = 0; l < s_.layers; ++l, to += states * s_.units) {
      std::memcpy(to, h(slot, l), s_.units * sizeof(T));
      if (c_) std::memcpy(to + s_.units, c(slot, l), s_.units * sizeof(T));
    }
  }

  // Writes the held output at times begin .. end - 1.
  void emit(i64 slot, i64 begin, i64 end) {
    if (!m_.call.sequence) return;
    T* to = typed<T>(m_.call.sequence) + clocks_[slot].row * s_.steps * s_.units;
    for (i64 t = begin; t < end; ++t) std::memcpy(to + t * s_.units, h(slot, s_.layers - 1), s_.units * sizeof(T));
  }

  void finish(i64 slot, i64 begin, T steps_since_update) {
    const Clock<T>& clock = clocks_[slot];
    const i64 b = clock.row;
    emit(slot, begin, s_.steps);
    for (i64 l = 0; l < s_.layers; ++l) {
      std::memcpy(typed<T>(m_.call.h) + (l * s_.batch + b) * s_.units, h(slot, l), s_.units * sizeof(T));
      if (c_) std::memcpy(typed<T>(m_.call.c) + (l * s_.batch + b) * s_.units, c(slot, l), s_.units * sizeof(T));
    }
    typed<T>(m_.call.increment)[b] = clock.increment;
    typed<T>(m_.call.steps_since_update)[b] = steps_since_update + T(clock.left);
    typed<T>(m_.call.num_updates)[b] = T(counts_[slot]);
    if (m_.call.counts) m_.call.counts[b] = std::int32_t(counts_[slot]);
  }

  const Model<T>& m_;
  const Shape& s_;
  i64 slots_, round_ = 0;
  std::atomic<i64>& next_row_;
  LowestInputs<T> inputs_;
  std::vector<Clock<T>> clocks_;
  std::vector<i64> counts_, order_;
  std::vector<int> side_;
  T *h_, *c_, *recurrent_, *activations_, *extra_, *scratch_;
  Bf16* split_;
};

// Computes the lowest layer's input products of all steps that the forward or the backward pass needs, many steps at a time.
// With a learned gate these are all real steps, without one the updates.
template <class T>
class InputTeam {
 public:
  InputTeam(const Model<T>& model, Arena& arena, std::atomic<i64>& next_row)
      : m_(model), s_(model.shape), next_row_(next_row), activations_(arena.take<T>(kLanes * s_.activations())),
        tiles_(model.amx ? arena.take<Bf16>(tile_numbers<Bf16>(kLanes, s_.inputs)) : nullptr) {}

  void run() {
    const AmxSession session(m_.amx);
    for (i64 b; !m_.cancelled() && (b = next_row_.fetch_add(1)) < s_.batch;)
      for (i64 t = 0; t < s_.steps; ++t) {
        const bool update = !m_.call.forced || m_.call.forced[b * s_.steps + t];
        if (!m_.is_real(b, t) || !(m_.learned() || update)) continue;
        rows_[count_] = b, times_[count_] = t;
        if (++count_ < kLanes) continue;
        flush();
        if (m_.cancelled()) return;
      }
    flush();
  }

 private:
  void flush() {
    Lane<T> lanes[kLanes];
    for (i64 i = 0; i < count_; ++i) {
      lanes[i].x = m_.x(rows_[i], times_[i]);
      lanes[i].activations = activations_ + i * s_.activations();
    }
    if (count_) lowest_products(m_, lanes, count_, tiles_);
    for (i64 i = 0; i < count_; ++i)
      for (int g = 0; g < s_.layout.input.count; ++g)
        std::memcpy(m_.product_at(rows_[i], times_[i], g), lanes[i].activations + (s_.layout.input_at + g) * s_.padded,
                    s_.units * sizeof(T));
    count_ = 0;
  }

  const Model<T>& m_;
  const Shape& s_;
  std::atomic<i64>& next_row_;
  T* activations_;
  Bf16* tiles_;
  i64 count_ = 0, rows_[kLanes], times_[kLanes];
};

template <class T>
void multiply_all_inputs(const Model<T>& model, Arena& arena, i64 threads) {
  std::atomic<i64> next_row{0};
  std::vector<std::unique_ptr<InputTeam<T>>> teams;
  for (i64 i = 0; i < threads; ++i) teams.push_back(std::make_unique<InputTeam<T>>(model, arena, next_row));
  run_threads(int(threads), [&](int i) { teams[i]->run(); });
}

constexpr i64 kSlots = 24;  // rows that a thread computes together: each panel of weights is read once for all of them

template <class T>
void forward(const SkipRnnCall& call) {
  Arena arena;
  const i64 threads = std::max<i64>(1, std::min(call.threads, call.batch));
  const i64 slots = std::min((call.batch + threads - 1) / threads, kSlots);
  const Model<T> model(call, arena, false, slots);
  if (call.products) multiply_all_inputs(model, arena, threads);
  if (model.cancelled()) return;
  std::atomic<i64> next_row{0};
  std::vector<std::unique_ptr<ForwardTeam<T>>> teams;
  for (i64 i = 0; i < threads; ++i) teams.push_back(std::make_unique<ForwardTeam<T>>(model, arena, slots, next_row));
  run_threads(int(threads), [&](int i) { teams[i]->run(); });
}

}  // namespace
