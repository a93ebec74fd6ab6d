// Random calls of the C ABI, under sanitizers. Working memory and outputs start as NaN, so that a value read before it was
// written shows, too. Under libFuzzer: -DFUZZER -fsanitize=fuzzer.
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

#define SKIP_RNN_PAIRS_ABOVE 4096  // bytes: some weights stay bfloat16, some are widened
#define SKIP_RNN_AMX_UNITS 1
#define SKIP_RNN_OUTER_TILES 24
// Inputs are multiplied ahead of time always (0), where it pays (1.15) or never (infinity).
static double ahead_factor = 0;
#define SKIP_RNN_AHEAD_FACTOR ahead_factor
#define SKIP_RNN_AHEAD_ABOVE 0
#include "../../hf_skiprnn/kernels/cpu/csrc/skip_rnn.cpp"

#ifndef INTERRUPT_SECONDS
#define INTERRUPT_SECONDS 0.1  // more under sanitizers and emulation
#endif

namespace {

using Random = std::mt19937_64;

i64 between(Random& random, i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(random); }

// Each array is an allocation of its own, of exactly its size: the sanitizer sees one element too many.
template <class T>
class Problem {
 public:
  Problem(std::uint64_t seed, int threads) : random_(seed) {
    call_.size = sizeof call_;
    call_.is_double = sizeof(T) == 8;
    call_.cell = between(random_, 0, 2);
    call_.batch = between(random_, 0, rarely() ? 40 : 7);
    call_.steps = between(random_, 0, rarely() ? 150 : 20);
    call_.inputs = between(random_, 1, rarely() ? 90 : 6);
    call_.units = between(random_, 1, rarely() ? 70 : 20);
    call_.layers = between(random_, 1, 3);
    call_.threads = threads;
    call_.every = between(random_, 1, 20);
    call_.rows = between(random_, 1, 12);
    call_.capped = between(random_, 0, 4);
    const i64 b = call_.batch, t = call_.steps, units = call_.units, activations = call_.cell == 0 ? 4 : 3;
    if (rarely()) {
      auto* ids = make<std::int64_t>(b * t);
      for (i64 i = 0; i < b * t; ++i) ids[i] = between(random_, 0, 4);
      call_.ids = ids;
    }
    call_.x = weight(call_.ids ? 5 * call_.inputs : b * t * call_.inputs);
    low_x_ = low_.back();
    call_.mask = flags(b * t);
    call_.forced = flags(b * t);
    for (i64 l = 0; l < call_.layers; ++l) {
      const i64 sizes[] = {activations * units * (l ? units : call_.inputs), activations * units * units, activations * units, units};
      for (int i = 0; i < 4; ++i) {
        const bool absent = (i == 2 && rarely()) || (i == 3 && (call_.cell != 2 || rarely()));
        // Small enough that gradients over many steps stay finite.
        weights_.push_back(absent ? nullptr : weight(sizes[i], 0.7 / std::sqrt(double(i ? units : call_.inputs))));
        low_weights_.push_back(absent ? nullptr : low_.back());
        grad_weights_.push_back(absent ? nullptr : output(sizes[i]));
      }
    }
    call_.weights = weights_.data();
    call_.grad_weights = grad_weights_.data();
    if (between(random_, 0, 3)) {
      call_.gate_weight = numbers(units);
      call_.gate_bias = numbers(1);
      if (between(random_, 0, 1)) call_.gate_shift = numbers(b);
      call_.grad_gate_weight = output(units);
      call_.grad_gate_bias = output(1);
    }
    const i64 state = call_.layers * b * units;
    call_.h0 = numbers(state);
    call_.h = output(state);
    call_.grad_h0 = output(state);
    if (call_.cell == 0) {
      call_.c0 = numbers(state);
      call_.c = output(state);
      call_.grad_c0 = output(state);
    }
    auto* increment = numbers(b);
    auto* steps_since_update = numbers(b);
    for (i64 i = 0; i < b; ++i) {
      const T odd[] = {1, T(0.5), T(0.05), 0, T(1e-30), std::numeric_limits<T>::quiet_NaN()};
      increment[i] = odd[between(random_, 0, rarely() ? 5 : 2)];
      wild_ |= !(increment[i] > T(0.01));  // held so long, its gradient may well overflow
      steps_since_update[i] = T(between(random_, 0, 5));
    }
    call_.increment0 = increment;
    call_.steps_since_update0 = steps_since_update;
    if (between(random_, 0, 1)) call_.sequence = output(b * t * units);
    call_.increment = output(b);
    call_.steps_since_update = output(b);
    call_.num_updates = output(b);
    call_.update_gates = make<T>(b * t);
  }

  void run() {
    const bool training = !call_.ids && between(random_, 0, 3);
    if (training) {
      const i64 b = call_.batch, t = call_.steps;
      call_.updates = make<std::int32_t>(b * t);
      call_.counts = make<std::int32_t>(b);
      call_.checkpoints = numbers(b * (t / call_.every) * call_.layers * 2 * call_.units);
      if (between(random_, 0, 1)) call_.products = output_unread(b * t * (call_.cell ? 3 : 4) * call_.units);
      if (sizeof(T) == sizeof(float)) call_.amx = call_.rounded = between(random_, 0, 1);
    }
    const std::int32_t stop = 1, go_on = 0;
    ahead_factor = rarely() ? 1.15 : 0;
    call_.cancel = &stop;
    expect(skip_rnn_forward(&call_) == kCancelled, "a forward pass that was cancelled");
    call_.cancel = between(random_, 0, 1) ? &go_on : nullptr;
    expect(skip_rnn_forward(&call_) == kDone, "forward");
    check_gates();
    if (training) {
      backward();
    } else {
      if (sizeof(T) == sizeof(float)) check_bf16();
      ahead_factor = std::numeric_limits<double>::infinity();
      check_same(call_, "results without products ahead of time");
    }
    for (const auto& [from, count] : outputs_)
      for (i64 i = 0; i < count; ++i) expect(wild_ || std::isfinite(from[i]), "an output was not written");
  }

 private:
  bool rarely() { return between(random_, 0, 7) == 0; }

  template <class U>
  U* make(i64 count) {
    auto block = std::shared_ptr<U[]>(new U[count]());
    blocks_.push_back(block);
    return block.get();
  }
  T* numbers(i64 count, double scale = 1) {
    T* block = make<T>(count);
    std::normal_distribution<double> normal;
    for (i64 i = 0; i < count; ++i) block[i] = T(scale * normal(random_));
    return block;
  }
  T* output_unread(i64 count) {
    T* block = make<T>(count);
    std::fill(block, block + count, std::numeric_limits<T>::quiet_NaN());
    return block;
  }
  // Of a backward pass, if it is one: checked only where the pass ran.
  T* output(i64 count) {
    T* block = output_unread(count);
    pending_.push_back({block, count});
    return block;
  }
  std::uint8_t* flags(i64 count) {
    if (between(random_, 0, 1)) return nullptr;
    auto* block = make<std::uint8_t>(count);
    for (i64 i = 0; i < count; ++i) block[i] = between(random_, 0, 2) != 0;
    return block;
  }

  // Numbers that bfloat16 holds exactly, and the same ones in bfloat16.
  T* weight(i64 count, double scale = 1) {
    T* block = numbers(count, scale);
    Bf16* low = make<Bf16>(count);
    for (i64 i = 0; i < count; ++i) {
      const float value = float(block[i]);
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      low[i].bits = std::uint16_t(bits >> 16);
      block[i] = T(value_of(low[i]));
    }
    low_.push_back(low);
    return block;
  }

  // Its results are those of the call before up to a tolerance; 0: bit for bit.
  void check_same(SkipRnnCall other, const char* what, double tolerance = 0) {
    const i64 b = call_.batch, state = call_.layers * b * call_.units;
    std::vector<std::tuple<const void*, void*, i64>> pairs;
    const auto again = [&](void*& to, i64 count) {
      const void* before = to;
      if (to) pairs.push_back({before, to = output_unread(count), count});
    };
    again(other.h, state), again(other.c, state), again(other.sequence, b * call_.steps * call_.units);
    again(other.increment, b), again(other.steps_since_update, b), again(other.num_updates, b);
    other.update_gates = make<T>(b * call_.steps);
    pairs.push_back({call_.update_gates, other.update_gates, b * call_.steps});
    expect(skip_rnn_forward(&other) == kDone, what);
    for (const auto& [want, got, count] : pairs) {
      const auto want_of = [p = want](i64 i) { return typed<T>(p)[i]; };
      const auto got_of = [p = got](i64 i) { return typed<T>(p)[i]; };
      if (!tolerance) expect(!std::memcmp(want, got, count * sizeof(T)), what);
      for (i64 i = 0; tolerance && i < count; ++i)
        expect(std::abs(want_of(i) - got_of(i)) <= tolerance || (std::isnan(want_of(i)) && std::isnan(got_of(i))), what);
    }
  }

  void check_bf16() {
    SkipRnnCall low = call_;
    low.is_bf16 = 1, low.x = low_x_, low.weights = low_weights_.data();
    check_same(low, "results from bfloat16 inputs and weights");
    low.amx = 1;
    std::vector<std::uint8_t> gates(std::max<i64>(call_.batch * call_.steps, 1));  // rounding may move a learned gate's updates
    for (i64 i = 0; i < call_.batch * call_.steps; ++i) gates[i] = typed<T>(call_.update_gates)[i] == 1;
    if (call_.gate_weight) low.forced = gates.data();
    check_same(low, "results with AMX", 1e-4);
  }

  void check_gates() {
    for (i64 b = 0; b < call_.batch; ++b) {
      i64 count = 0;
      for (i64 t = 0; t < call_.steps; ++t) {
        const i64 at = b * call_.steps + t;
        const bool update = typed<T>(call_.update_gates)[at] == 1;
        count += update;
        expect(!update || !call_.mask || call_.mask[at], "a masked step was an update");
        expect(!update || !call_.forced || call_.forced[at], "a step was an update against the given gates");
      }
      expect(typed<T>(call_.num_updates)[b] == T(count), "num_updates");
    }
    const void* forward[] = {call_.h, call_.c, call_.increment, call_.steps_since_update, call_.num_updates, call_.sequence};
    for (const auto& item : pending_)
      for (const void* p : forward)
        if (item.first == p) outputs_.push_back(item);
  }

  void backward() {
    const i64 b = call_.batch, t = call_.steps, state = call_.layers * b * call_.units;
    const auto maybe = [this](i64 count) { return between(random_, 0, 2) ? numbers(count) : nullptr; };
    call_.grad_sequence = maybe(b * t * call_.units);
    call_.grad_h = maybe(state);
    call_.grad_c = call_.c0 ? maybe(state) : nullptr;
    call_.grad_increment = maybe(b);
    call_.grad_steps_since_update = maybe(b);
    call_.grad_num_updates = maybe(b);
    call_.grad_update_gates = maybe(b * t);
    if (between(random_, 0, 1)) call_.grad_x = make<T>(b * t * call_.inputs);
    if (call_.gate_shift) call_.grad_gate_shift = output(b);
    outputs_ = pending_;
    outputs_.push_back({call_.increment0 ? typed<T>(call_.grad_increment0 = output(b)) : nullptr, b});
    outputs_.push_back({typed<T>(call_.grad_steps_since_update0 = output(b)), b});
    expect(skip_rnn_backward(&call_) == kDone, "backward");
    if (call_.grad_gate_shift) check_gate_shift();
    if (call_.grad_x) outputs_.push_back({typed<T>(call_.grad_x), b * t * call_.inputs});
  }

  // A shift that all rows share is a bias: the rows' gradients add up to the bias's.
  void check_gate_shift() const {
    const T* of_rows = typed<T>(call_.grad_gate_shift);
    double sum = 0, size = 1e-6;
    for (i64 b = 0; b < call_.batch; ++b) sum += double(of_rows[b]), size += std::abs(double(of_rows[b]));
    const double error = std::abs(sum - double(*typed<T>(call_.grad_gate_bias))) / size;
    expect(wild_ || error < (sizeof(T) == 4 ? 1e-4 : 1e-12), "gradients of the gate's shift and bias");
  }

  void expect(bool holds, const char* what) const {
    if (holds) return;
    std::fprintf(stderr, "%s: cell %lld, B %lld, T %lld, I %lld, H %lld, L %lld, threads %lld\n", what, (long long)call_.cell,
                 (long long)call_.batch, (long long)call_.steps, (long long)call_.inputs, (long long)call_.units,
                 (long long)call_.layers, (long long)call_.threads);
    std::abort();
  }

  Random random_;
  SkipRnnCall call_{};
  bool wild_ = false;
  std::vector<std::shared_ptr<void>> blocks_;
  std::vector<const void*> weights_, low_weights_;
  std::vector<Bf16*> low_;
  const void* low_x_ = nullptr;
  std::vector<void*> grad_weights_;
  std::vector<std::pair<T*, i64>> pending_, outputs_;
};

void run_one(std::uint64_t seed, int threads) {
  if (seed % 2) Problem<float>(seed, threads).run();
  else Problem<double>(seed, threads).run();
}

// Ctrl-C ends a scan of minutes at once, in every thread, and the handler that was there before is called, too.
void check_interrupt(int threads) {
  static volatile std::sig_atomic_t handled = 0;
  std::signal(SIGINT, [](int) { handled = 1; });
  constexpr i64 kBatch = 4, kSteps = 2000000, kUnits = 32;
  SkipRnnCall call{};
  call.size = sizeof call, call.cell = kGru, call.threads = threads;
  call.batch = kBatch, call.steps = kSteps, call.inputs = 1, call.units = kUnits, call.layers = 1;
  const std::vector<float> x(kBatch * kSteps), zeros(3 * kUnits * kUnits);
  std::vector<float> h(kBatch * kUnits), row(3 * kBatch), gates(kBatch * kSteps);
  const void* weights[] = {zeros.data(), zeros.data(), nullptr, nullptr};
  call.x = x.data(), call.weights = weights, call.h0 = call.increment0 = call.steps_since_update0 = zeros.data();
  call.h = h.data(), call.increment = row.data(), call.steps_since_update = row.data() + kBatch;
  call.num_updates = row.data() + 2 * kBatch, call.update_gates = gates.data();
  call.cancel = skip_rnn_watch_interrupt();
  using Clock = std::chrono::steady_clock;
  Clock::time_point sent;
  std::thread sender([&sent] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    sent = Clock::now();
    kill(getpid(), SIGINT);
  });
  const int status = skip_rnn_forward(&call);
  const auto returned = Clock::now();
  sender.join();
  skip_rnn_stop_watching();
  const double seconds = std::chrono::duration<double>(returned - sent).count();
  if (status == kCancelled && handled && seconds < INTERRUPT_SECONDS) return;
  std::fprintf(stderr, "interrupted: status %d, handled %d, after %.3f s\n", status, int(handled), seconds);
  std::abort();
}

}  // namespace

#ifdef FUZZER
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::uint64_t seed = 0;
  std::memcpy(&seed, data, std::min(size, sizeof seed));
  run_one(seed, 1);
  return 0;
}
#else
// fuzz [calls] [threads]
int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 10000, threads = argc > 2 ? std::atoi(argv[2]) : 1;
  for (int seed = 0; seed < calls; ++seed) run_one(std::uint64_t(seed), threads);
  check_interrupt(threads);
  std::printf("%d calls, %d thread(s)\n", calls, threads);
}
#endif
