// Threads. They are PyTorch's own OpenMP team where the process has one, else std::thread's, started for the call.
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

// During its life denormal numbers (below 1e-38 in float32) count as 0 in this thread. Gradients that vanish over many steps
// become denormal, and many x86 processors need over a hundred cycles for an operation on them. The destructor restores the
// thread's own setting.
class DenormalsAreZero {
 public:
#if defined(__x86_64__)
  DenormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero); }
  ~DenormalsAreZero() { _mm_setcsr(before_); }
  DenormalsAreZero(const DenormalsAreZero&) = delete;
  DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned before_;
#else
  DenormalsAreZero() {}
#endif
};

// The process whose OpenMP team may be used: a forked child inherits only the belief that there is one. The Python package
// sets it to the process that imported the package, which may have forked before this library was loaded.
pid_t team_of = getpid();

// Calls body(i) once for each i = 0 .. n - 1, in up to n threads.
template <class Body>
void run_threads(int n, const Body& body) {
  struct Team {
    const Body& body;
    int n;
    std::atomic<int> next{0};
    void pull() noexcept {
      const DenormalsAreZero setting;
      for (int i; (i = next.fetch_add(1)) < n;) body(i);
    }
  } team{body, n};
  if (n <= 1) return team.pull();
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#ifndef SKIP_RNN_STD_THREADS
  if (parallel && getpid() == team_of) {
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
    // The system has too many threads. Those that started, and this one, do the work.
  }
  team.pull();
  for (auto& helper : helpers) helper.join();
}

}  // namespace
