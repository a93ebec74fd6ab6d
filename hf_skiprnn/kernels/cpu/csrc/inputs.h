// The lowest layer's input products, for the rows that a thread computes together.
//
// A product with the inputs of a few rows spends most of its time reading the weights, where these are large. So the inputs of
// a row's next updates are multiplied together, ahead of time, if that takes less time by the measurements of this call.
// A learned gate's updates are not known ahead. The guess is that it keeps its rhythm, one update every `stride` steps: one a
// step in busy stretches. How many guesses were right so far decides whether they are worth their time. No choice changes a
// result: a row's product does not depend on the rows that are multiplied with it (product.h).
#pragma once

#include <chrono>
#include <limits>
#include <utility>

#include "model.h"

namespace {

constexpr i64 kAhead = 16;   // steps of a row that are planned ahead
constexpr i64 kMost = 128;   // rows of a product ahead of time: more inputs do not fit the second-level cache
constexpr i64 kRhythm = 16;  // the longest stride that is planned
constexpr i64 kTrial = 4;    // guesses that are watched before the first ones are multiplied
constexpr i64 kMemory = 32;  // guesses after which earlier ones count half
// The fuzz driver's: a smaller factor means ahead more often; and layers with fewer bytes of weights have no plans.
#ifndef SKIP_RNN_AHEAD_FACTOR
#define SKIP_RNN_AHEAD_FACTOR 1.15
#endif
#ifndef SKIP_RNN_AHEAD_ABOVE
#define SKIP_RNN_AHEAD_ABOVE (16 << 10)
#endif

// Writes the lowest layer's input products into the lanes' activations. tiles: working memory for AMX, of bfloat16 numbers.
template <class T>
void lowest_products(const Model<T>& m, const Lane<T>* lanes, i64 n, Bf16* tiles) {
  if (!m.amx) return input_products(m.shape, m.layers[0], lanes, n);
  const auto run = m.call.is_bf16 ? input_products<T, Bf16> : input_products<T, Rounded>;
  run(m.shape, m.layers[0], lanes, n, tiles);
}

// The steps at which one row is expected to update next.
template <class T>
class Plan {
 public:
  void start(i64 real_steps) {
    drop();
    left_ = real_steps, shortest_ = real_steps;
  }

  // Goes to the row's update at clock.now. An entry at that time is held until the next call.
  void reach(const Clock<T>& clock) {
    shortest_ = std::min(shortest_, left_ - clock.left), left_ = clock.left;
    release();
    for (; first_ < last_ && time(first_) < clock.now; ++first_) ++passed_;
    if (first_ < last_ && time(first_) != clock.now) drop();
    hold(first_ < last_);
    if (passed_ > kMemory) passed_ /= 2, hits_ /= 2;
  }

  bool empty() const { return first_ == last_; }
  bool holds_product() const { return held_ && first_ < ready_; }
  i64 first() const { return first_; }
  i64 first_unready() const { return std::max(first_, ready_); }
  i64 last() const { return last_; }
  i64 time(i64 entry) const { return times_[entry % kAhead]; }
  void set_ready() { ready_ = last_; }

  // Makes a new plan from clock.now on, with the shortest interval between updates since the last plan.
  void make(const Model<T>& m, const Clock<T>& clock) {
    const i64 stride = known(m) ? 1 : shortest_;
    if (stride != stride_) stride_ = stride, passed_ = hits_ = 0;
    shortest_ = clock.left + 1;
    if (stride > kRhythm) return;
    times_[last_++ % kAhead] = clock.now;
    hold(true);
    extend(m, clock.row);
  }

  // Fills the plan again, unless the gate's rhythm has become slower.
  void top_up(const Model<T>& m, const Clock<T>& clock) {
    if (!known(m) && shortest_ != stride_) return;
    shortest_ = clock.left + 1;
    extend(m, clock.row);
  }

  // The share of guesses that were right; 0 where too few are over, or where there is no plan.
  double right(const Model<T>& m) const {
    if (empty() || known(m)) return double(!empty());
    return passed_ < kTrial ? 0 : double(hits_) / double(passed_ + 1);
  }

 private:
  // Whether updates are known ahead: they are given, or every step is one.
  static bool known(const Model<T>& m) { return m.call.forced || !m.learned(); }

  void hold(bool hit) { held_ = hit, hits_ += hit; }
  void release() { passed_ += held_, first_ += held_, held_ = false; }
  void drop() {
    release();
    passed_ += last_ - first_, first_ = last_;
  }

  void extend(const Model<T>& m, i64 row) {
    for (i64 t; last_ - first_ < kAhead && (t = after(m, row, time(last_ - 1))) < m.shape.steps; ++last_)
      times_[last_ % kAhead] = t;
  }

  // The next step to plan after time t; the number of steps if there is none.
  i64 after(const Model<T>& m, i64 row, i64 t) const {
    const std::uint8_t* forced = m.call.forced ? m.call.forced + row * m.shape.steps : nullptr;
    if (!forced && !m.call.mask) return t + stride_;
    for (i64 steps = 0; ++t < m.shape.steps;)
      if (m.is_real(row, t) && (!forced || forced[t]) && ++steps == stride_) break;
    return t;
  }

  i64 times_[kAhead];                         // entry i is at i % kAhead
  i64 first_ = 0, last_ = 0, ready_ = 0;      // the plan's entries; those before ready_ have their product
  i64 stride_ = 0, shortest_ = 0, left_ = 0;  // real steps: between guesses, between updates, after the last update
  i64 passed_ = 0, hits_ = 0;                 // entries of this stride that are over, and those that were updates
  bool held_ = false;                         // entry first_ is the present update
};

// The inputs of the lowest layer and their products.
template <class T>
class LowestInputs {
 public:
  LowestInputs(const Model<T>& model, Arena& arena, i64 slots)
      : m_(model), s_(model.shape), plans_(slots) {
    const i64 most = std::max(slots, kMost);
    x_ = widens() ? arena.take<T>(most * s_.inputs) : nullptr;
    tiles_ = model.amx ? arena.take<Bf16>(tile_numbers<Bf16>(most, s_.inputs)) : nullptr;
    const auto& w = model.layers[0];
    const bool plans = !w.direct && !model.call.products && s_.steps > 1 &&
                       w.input.elements() * i64(sizeof(T)) >= SKIP_RNN_AHEAD_ABOVE;
    products_ = plans ? arena.take<T>(slots * kAhead * s_.activations()) : nullptr;
    std::fill(std::begin(time_), std::end(time_), kUnknown);
  }

  // A row takes a slot; its clock has just started.
  void start(i64 slot, const Clock<T>& clock) { plans_[slot].start(clock.left); }

  // Brings the input products of the updates that the clocks show into the lanes; of a direct layer, the inputs.
  // slots: of each lane. `activations` of a lane may be replaced.
  void read(const std::vector<Clock<T>>& clocks, const i64* slots, i64 n, Lane<T>* lanes) {
    if (m_.layers[0].direct) {
      for (i64 i = 0; i < n; ++i) lanes[i].x = x(clocks[slots[i]].row, clocks[slots[i]].now, i);
      return;
    }
    if (m_.call.products) {
      for (i64 i = 0; i < n; ++i) m_.load_product(clocks[slots[i]].row, clocks[slots[i]].now, lanes[i].activations);
      return;
    }
    spent_ = 0;
    const bool ahead = products_ && look_ahead(clocks, slots, n);
    Lane<T> missing[kLanes];
    i64 count = 0;
    for (i64 i = 0; i < n; ++i) {
      const auto& plan = plans_[slots[i]];
      if (plan.holds_product()) {
        lanes[i].activations = product(slots[i], plan.first());
        continue;
      }
      lanes[i].x = x(clocks[slots[i]].row, clocks[slots[i]].now, count);
      missing[count++] = lanes[i];
    }
    multiply(missing, count);
    if (ahead || count < n) saved_ += double(n) * time_on_demand(n) - spent_;
  }

 private:
  static constexpr double kUnknown = std::numeric_limits<double>::infinity();

  // Whether bfloat16 inputs are widened before they are multiplied.
  bool widens() const { return m_.call.is_bf16 && (!m_.amx || m_.layers[0].direct); }

  T* product(i64 slot, i64 entry) { return products_ + (slot * kAhead + entry % kAhead) * s_.activations(); }

  // An input. bfloat16 is widened, in place i of the working memory; or for AMX, it is read where it lies.
  const T* x(i64 row, i64 t, i64 i) {
    if (!x_) return m_.call.is_bf16 ? reinterpret_cast<const T*>(m_.bf16_x(row, t)) : m_.x(row, t);
    m_.copy_x(row, t, x_ + i * s_.inputs);
    return x_ + i * s_.inputs;
  }

  // Multiplies ahead of time for all rows or for none: with some rows left, the weights would be read as before. Returns
  // whether it did.
  bool look_ahead(const std::vector<Clock<T>>& clocks, const i64* slots, i64 n) {
    bool complete = true;
    for (i64 i = 0; i < n; ++i) {
      plans_[slots[i]].reach(clocks[slots[i]]);
      complete &= plans_[slots[i]].holds_product();
    }
    if (complete) return false;
    i64 unready = 0;
    double right = 0;
    for (i64 i = 0; i < n; ++i) {
      auto& plan = plans_[slots[i]];
      if (plan.empty()) plan.make(m_, clocks[slots[i]]);
      unready += plan.last() - plan.first_unready();
      right += plan.right(m_);
    }
    if (!unready || !pays(n, unready, right / double(n))) return false;
    Lane<T> lanes[kMost];
    i64 count = 0;
    for (i64 i = 0; i < n && !m_.cancelled(); ++i) {
      auto& plan = plans_[slots[i]];
      if (plan.empty()) continue;
      plan.top_up(m_, clocks[slots[i]]);
      for (i64 entry = plan.first_unready(); entry < plan.last(); ++entry) {
        lanes[count].x = x(clocks[slots[i]].row, plan.time(entry), count);
        lanes[count++].activations = product(slots[i], entry);
        if (count == kMost) multiply(lanes, std::exchange(count, 0));
      }
      plan.set_ready();
    }
    multiply(lanes, count);
    return true;
  }

  // Whether products ahead of time take less time, if the share `right` of them is used. What they have lost so far must be
  // less than the time of one plan of each row.
  bool pays(i64 n, i64 unready, double right) {
    const double on_demand = time_on_demand(n), ahead = time_ahead(std::min(unready, kMost), on_demand);
    return right * on_demand > SKIP_RNN_AHEAD_FACTOR * ahead &&
           -saved_ * SKIP_RNN_AHEAD_FACTOR <= double(n * kAhead) * ahead;
  }

  // The time of a row's product with n rows at once, or with more where n were not measured; 0: neither was.
  double time_on_demand(i64 n) {
    const double* time = std::find_if(&time_of(n), std::end(time_), [](double t) { return t < kUnknown; });
    return time == std::end(time_) ? 0 : *time;
  }
  // Before it is measured, the guess is half of the time on demand.
  double time_ahead(i64 n, double on_demand) { return time_of(n) < kUnknown ? time_of(n) : on_demand / 2; }
  double& time_of(i64 n) { return time_[63 - __builtin_clzll(std::uint64_t(n))]; }

  void multiply(const Lane<T>* lanes, i64 n) {
    if (!n) return;
    if (!products_) return lowest_products(m_, lanes, n, tiles_);
    using Now = std::chrono::steady_clock;
    const auto start = Now::now();
    lowest_products(m_, lanes, n, tiles_);
    const double time = std::chrono::duration<double, std::nano>(Now::now() - start).count();
    time_of(n) = std::min(time_of(n), time / double(n));
    spent_ += std::min(time, 2 * double(n) * time_of(n));  // what is longer was interrupted
  }

  const Model<T>& m_;
  const Shape& s_;
  std::vector<Plan<T>> plans_;
  T *x_, *products_;
  Bf16* tiles_;
  // In nanoseconds. The least time of a row's product among n rows, at the logarithm of n; the time of this round's products;
  // what products ahead of time have saved so far.
  double time_[9], spent_ = 0, saved_ = 0;
};

}  // namespace
