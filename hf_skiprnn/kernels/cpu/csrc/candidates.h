// What the backward pass reads: the recomputed updates of a segment, and the candidate states of its skipped steps.
#pragma once

#include <tuple>
#include <utility>

#include "forward.h"

namespace {

// A segment: `every` updates of each of a few rows, recomputed from a checkpoint. Round e (0 .. every - 1) is update e of each
// row. State e is the state before update e: the row holds it from the update that made it until update e. A row holds its
// last state until the end of the sequence.
template <class T>
class Segment {
 public:
  struct Row {
    i64 row, updates;
    const std::int32_t* times;
  };
  std::vector<Row> rows;

  // split: working memory for AMX, of kLanes rows.
  Segment(const Model<T>& model, Arena& arena, Bf16* split)
      : m_(model), s_(model.shape), most_(model.call.rows), split_(split) {
    const i64 states = s_.layers * (m_.call.every + 1) * most_, events = s_.layers * m_.call.every * most_;
    h_ = arena.take<T>(states * s_.padded);
    c_ = s_.has_c() ? arena.take<T>(states * s_.padded) : nullptr;
    activations_ = arena.take<T>(events * s_.activations());
    extra_ = s_.cell == kGruResetAfter ? nullptr : arena.take<T>(events * s_.padded);
    recurrent_ = arena.take<T>(events * s_.recurrent());
    increment_ = arena.take<T>((m_.call.every + 1) * most_);
    scratch_ = arena.take<T>(kLanes * s_.padded);
  }

  Row timeline(i64 b) const { return {b, m_.call.counts[b], m_.call.updates + b * s_.steps}; }
  bool updates(i64 e, i64 r) const { return base_ + e < rows[r].updates; }
  bool holds(i64 e, i64 r) const { return base_ + e <= rows[r].updates; }
  i64 time(i64 e, i64 r) const {
    const i64 index = base_ + e;
    return index < 0 ? -1 : index < rows[r].updates ? rows[r].times[index] : s_.steps;
  }
  // The steps between the update that made state e and the next update: the first, and one past the last.
  std::pair<i64, i64> held(i64 e, i64 r) const { return {time(e - 1, r) + 1, time(e, r)}; }
  // k before the first step that holds state e.
  T steps_since_update(i64 e, i64 r) const { return base_ + e ? T(0) : typed<T>(m_.call.steps_since_update0)[rows[r].row]; }
  T steps_since_update_at(i64 e, i64 r) const {
    return steps_since_update(e, r) + T(m_.count_real(rows[r].row, time(e - 1, r) + 1, time(e, r) + 1));
  }
  T increment(i64 e, i64 r) const { return increment_[e * most_ + r]; }
  T* recurrent(i64 l, i64 e, i64 r) const { return recurrent_ + event(l, e, r) * s_.recurrent(); }
  T* h(i64 l, i64 e, i64 r) const { return h_ + state(l, e, r) * s_.padded; }
  T* c(i64 l, i64 e, i64 r) const { return c_ ? c_ + state(l, e, r) * s_.padded : nullptr; }

  Lane<T> lane(i64 l, i64 e, i64 r) const {
    return {l ? h(l - 1, e + 1, r) : m_.x(rows[r].row, time(e, r)),
            h(l, e, r),
            c(l, e, r),
            recurrent(l, e, r),
            activations_ + event(l, e, r) * s_.activations(),
            extra_ ? extra_ + event(l, e, r) * s_.padded : nullptr,
            h(l, e + 1, r),
            c(l, e + 1, r)};
  }

  void recompute(i64 index) {
    base_ = index * m_.call.every;
    for (i64 r = 0; r < i64(rows.size()); ++r)
      if (holds(0, r)) read_first_state(index, r);
    read_input_products();
    for (i64 e = 0; e < m_.call.every && !m_.cancelled(); ++e) recompute_round(e);
  }

 private:
  i64 state(i64 l, i64 e, i64 r) const { return (l * (m_.call.every + 1) + e) * most_ + r; }
  i64 event(i64 l, i64 e, i64 r) const { return (l * m_.call.every + e) * most_ + r; }

  void read_first_state(i64 index, i64 r) {
    const i64 b = rows[r].row, parts = s_.has_c() ? 2 : 1, top = s_.layers - 1;
    const T* saved = typed<T>(m_.call.checkpoints) +
                     (b * (s_.steps / m_.call.every) + index - 1) * s_.layers * parts * s_.units;
    const auto read = [&](const T* from, T* to) {
      std::memcpy(to, from, s_.units * sizeof(T));
      clear_padding(to, s_.units, s_.padded);
    };
    for (i64 l = 0; l < s_.layers; ++l) {
      const i64 initial = (l * s_.batch + b) * s_.units;
      read(index ? saved + l * parts * s_.units : typed<T>(m_.call.h0) + initial, h(l, 0, r));
      if (c_) read(index ? saved + (l * parts + 1) * s_.units : typed<T>(m_.call.c0) + initial, c(l, 0, r));
    }
    increment_[r] = index ? m_.increment_of(b, c_ ? c(top, 0, r) : h(top, 0, r)) : typed<T>(m_.call.increment0)[b];
  }

  // Computes the lowest layer's input products of the whole segment, or reads them from the record.
  void read_input_products() {
    if (m_.layers[0].direct) return;
    Lane<T> lanes[kLanes];
    i64 n = 0;
    for (i64 e = 0; e < m_.call.every; ++e)
      for (i64 r = 0; r < i64(rows.size()); ++r) {
        if (!updates(e, r)) continue;
        lanes[n] = lane(0, e, r);
        if (m_.call.products) {
          m_.load_product(rows[r].row, time(e, r), lanes[n].activations);
          continue;
        }
        ++n;
        if (n < kLanes) continue;
        if (m_.cancelled()) return;
        lowest_products(m_, lanes, std::exchange(n, 0), split_);
      }
    if (n) lowest_products(m_, lanes, n, split_);
  }

  void recompute_round(i64 e) {
    Lane<T> lanes[kLanes];
    i64 row[kLanes], updating = 0;
    for (i64 r = 0; r < i64(rows.size()); ++r)
      if (updates(e, r)) row[updating++] = r;
    i64 holding = updating;  // with a learned gate a last state needs its recurrent product too: candidates follow from it
    for (i64 r = 0; m_.learned() && r < i64(rows.size()); ++r)
      if (holds(e, r) && !updates(e, r)) row[holding++] = r;
    for (i64 l = 0; l < s_.layers; ++l) {
      for (i64 i = 0; i < updating; ++i) lanes[i] = lane(l, e, row[i]);
      for (i64 i = updating; i < holding; ++i) lanes[i].h = h(l, e, row[i]), lanes[i].recurrent = recurrent(l, e, row[i]);
      if (l) input_products(s_, m_.layers[l], lanes, updating, split_);
      recurrent_products(m_.layers[l], lanes, holding, split_);
      step<T, true>({s_, m_.layers[l], lanes, updating, scratch_, split_});
    }
    const i64 top = s_.layers - 1;
    for (i64 i = 0; i < updating; ++i)
      increment_[(e + 1) * most_ + row[i]] =
          m_.increment_of(rows[row[i]].row, c_ ? c(top, e + 1, row[i]) : h(top, e + 1, row[i]));
  }

  const Model<T>& m_;
  const Shape& s_;
  const i64 most_;
  Bf16* split_;
  i64 base_ = 0;
  T *h_, *c_, *activations_, *extra_, *recurrent_, *increment_, *scratch_;
};

template <class T>
struct SkippedStep {
  i64 e, r, time, slot;
  T steps_since_update;  // k
  T increment;           // D~, of the candidate state
};

// The skipped steps of a segment in the order of the backward pass, each with its candidate: the state that an update at that
// step would have made.
template <class T>
class Candidates {
 public:
  Candidates(const Model<T>& model, Arena& arena, const Segment<T>& segment, Bf16* split)
      : m_(model), s_(model.shape), segment_(segment), split_(split),
        most_(model.layers[0].direct || model.call.products ? 48 : kLanes), steps_(most_) {
    h_ = arena.take<T>(s_.layers * most_ * s_.padded);
    c_ = s_.has_c() ? arena.take<T>(s_.layers * most_ * s_.padded) : nullptr;
    activations_ = arena.take<T>(most_ * s_.activations());
    extra_ = arena.take<T>(most_ * s_.padded);
    scratch_ = arena.take<T>(most_ * s_.padded);
  }

  void start() {
    e_ = m_.call.every, r_ = 0, time_ = begin_ = 0;
    used_ = filled_ = 0;
  }

  // The next skipped step if row r skipped it while it held state e, else null.
  const SkippedStep<T>* next(i64 e, i64 r) {
    if (used_ == filled_) fill();
    if (used_ == filled_ || steps_[used_].e != e || steps_[used_].r != r) return nullptr;
    return &steps_[used_++];
  }

  const T* h(const SkippedStep<T>& s, i64 l) const { return h_ + (l * most_ + s.slot) * s_.padded; }
  const T* c(const SkippedStep<T>& s, i64 l) const { return c_ ? c_ + (l * most_ + s.slot) * s_.padded : nullptr; }

 private:
  void fill() {
    used_ = filled_ = 0;
    while (filled_ < most_ && find()) {
      steps_[filled_] = {e_, r_, time_, filled_, steps_since_update_, T(0)};
      ++filled_;
    }
    if (filled_) compute();
  }

  // Finds the next skipped step: from the last round to the first, in a round from the first row to the last, in a row from the
  // last step to the first.
  bool find() {
    for (;;) {
      while (time_ > begin_) {
        --time_;
        if (!m_.is_real(segment_.rows[r_].row, time_)) continue;
        steps_since_update_ = ahead_--;
        return true;
      }
      if (!next_hold()) return false;
    }
  }

  bool next_hold() {
    const i64 rows = i64(segment_.rows.size());
    do {
      if (e_ == m_.call.every || ++r_ == rows) {
        if (e_ == 0) {
          r_ = rows - 1;
          return false;
        }
        --e_, r_ = 0;
      }
    } while (!segment_.holds(e_, r_));
    std::tie(begin_, time_) = segment_.held(e_, r_);
    ahead_ = segment_.steps_since_update(e_, r_) + T(m_.count_real(segment_.rows[r_].row, begin_, time_));
    return true;
  }

  void compute() {
    Lane<T> lanes[kLanes];
    for (i64 l = 0; l < s_.layers; ++l) {
      for (i64 i = 0; i < filled_; ++i) {
        const auto& at = steps_[i];
        const T* x = l ? h(at, l - 1) : m_.x(segment_.rows[at.r].row, at.time);
        lanes[i] = {x, segment_.h(l, at.e, at.r), segment_.c(l, at.e, at.r), segment_.recurrent(l, at.e, at.r),
                    activations_ + i * s_.activations(), extra_ + i * s_.padded, const_cast<T*>(h(at, l)),
                    const_cast<T*>(c(at, l))};
      }
      if (l) input_products(s_, m_.layers[l], lanes, filled_, split_);
      else if (!m_.call.products) lowest_products(m_, lanes, filled_, split_);
      else for (i64 i = 0; i < filled_; ++i)
        m_.load_product(segment_.rows[steps_[i].r].row, steps_[i].time, lanes[i].activations);
      step<T, false>({s_, m_.layers[l], lanes, filled_, scratch_, split_});
    }
    const i64 top = s_.layers - 1;
    T increments[kLanes];
    std::fill(increments, increments + kLanes, T(0));
    for (i64 i = 0; i < filled_; ++i)
      increments[i] =
          m_.gate_pre_activation(segment_.rows[steps_[i].r].row, c_ ? c(steps_[i], top) : h(steps_[i], top));
    m_.increments_of(increments, filled_);
    for (i64 i = 0; i < filled_; ++i) steps_[i].increment = increments[i];
  }

  const Model<T>& m_;
  const Shape& s_;
  const Segment<T>& segment_;
  Bf16* split_;
  const i64 most_;
  std::vector<SkippedStep<T>> steps_;
  i64 e_ = 0, r_ = 0, time_ = 0, begin_ = 0, used_ = 0, filled_ = 0;
  T steps_since_update_ = 0, ahead_ = 0;
  T *h_, *c_, *activations_, *extra_, *scratch_;
};

}  // namespace
