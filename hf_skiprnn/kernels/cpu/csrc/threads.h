// Threads: torch's own OpenMP team where it can be borrowed, else threads of this call.
#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace {

const pid_t kLoadedIn = getpid();

// Runs body(thread) with thread = 0 .. n-1, each once, in no more than n threads at a time.
template <class Body>
void run_threads(int n, const Body& body) {
  if (n <= 1) return body(0);
  struct Team {
    const Body& body;
    int n;
    std::atomic<int> next{0};
    void pull() noexcept {
      for (int i; (i = next.fetch_add(1)) < n;) body(i);
    }
  } team{body, n};
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
