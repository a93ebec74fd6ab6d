// Threads: torch's own OpenMP team where it can be borrowed, else threads of this call.
#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// While one lives, its thread's results that are too small for a normal number (1e-38 in float32) are 0, as are such operands.
// Gradients that vanish over many steps become so small, and an x86 processor takes 30 times as long for an operation on
// them. The thread's own setting returns afterwards.
class VanishingIsZero {
 public:
#if defined(__x86_64__)
  VanishingIsZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero); }
  ~VanishingIsZero() { _mm_setcsr(before_); }
  VanishingIsZero(const VanishingIsZero&) = delete;
  VanishingIsZero& operator=(const VanishingIsZero&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned before_;
#else
  VanishingIsZero() {}
#endif
};

const pid_t kLoadedIn = getpid();

// Runs body(thread) with thread = 0 .. n-1, each once, in no more than n threads at a time.
template <class Body>
void run_threads(int n, const Body& body) {
  struct Team {
    const Body& body;
    int n;
    std::atomic<int> next{0};
    void pull() noexcept {
      const VanishingIsZero setting;
      for (int i; (i = next.fetch_add(1)) < n;) body(i);
    }
  } team{body, n};
  if (n <= 1) return team.pull();
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#ifndef SKIP_RNN_STD_THREADS
  if (parallel && getpid() == kLoadedIn) {  // a forked child must not use its parent's team
    parallel([](void* p) { static_cast<Team*>(p)->pull(); }, &team, unsigned(n), 0);
    return;
  }
#endif
  (void)parallel;
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(n - 1);
    for (int i = 1; i < n; ++i) helpers.emplace_back([&team] { team.pull(); });
  } catch (const std::system_error&) {
    // Too many threads already: those that started, and this one, do the work.
  }
  team.pull();
  for (auto& helper : helpers) helper.join();
}

}  // namespace
