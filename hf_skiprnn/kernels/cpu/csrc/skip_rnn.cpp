// The Skip RNN scan on a CPU, behind a C ABI. This file is compiled once for each instruction set, each time to a library of
// its own. All but the exported functions has internal linkage: no library can call another one's code.
#include <cerrno>
#include <csignal>

#include "backward.h"

#define SKIP_RNN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Checks the call and runs it. No exception leaves the library.
template <class Run>
int guarded(const SkipRnnCall* call, const Run& run) noexcept {
  if (!call || call->size != i64(sizeof(SkipRnnCall))) return kBadCall;
  if (call->batch < 0 || call->steps < 0 || call->inputs < 1 || call->units < 1 || call->layers < 1) return kBadCall;
  if (call->is_bf16 && (call->is_double || call->updates || call->products)) return kBadCall;
  if (call->cell < kLstm || call->cell > kGruResetAfter || call->steps > INT32_MAX) return kBadCall;
  try {
    run();
    return is_cancelled(*call) ? kCancelled : kDone;
  } catch (...) {  // std::bad_alloc, or std::length_error from a size beyond all memory
    return kNoMemory;
  }
}

}  // namespace

SKIP_RNN_EXPORT void skip_rnn_use_team_of(int process) { team_of = process; }

SKIP_RNN_EXPORT std::int64_t skip_rnn_abi() { return kAbi; }

// A hash of these files, from build_native.py: library.py refuses a library that is older than the source beside it.
#ifndef SKIP_RNN_SOURCE
#define SKIP_RNN_SOURCE 0
#endif
SKIP_RNN_EXPORT std::uint64_t skip_rnn_source() { return SKIP_RNN_SOURCE; }

SKIP_RNN_EXPORT int skip_rnn_forward(const SkipRnnCall* call) {
  return guarded(call, [call] { call->is_double ? forward<double>(*call) : forward<float>(*call); });
}

SKIP_RNN_EXPORT int skip_rnn_backward(const SkipRnnCall* call) {
  if (call && (call->every < 1 || call->rows < 1 || call->rows > kLanes)) return kBadCall;
  return guarded(call, [call] { call->is_double ? backward<double>(*call) : backward<float>(*call); });
}

// Ctrl-C during a call. Python's own signal handler only records the signal, and Python raises KeyboardInterrupt after the
// call has returned. So during a call this handler replaces it: it sets the flag that ends the call, then calls the replaced
// handler. Only Python's main thread may use it, because Python handles signals there.
namespace {

volatile std::int32_t interrupted = 0;
struct sigaction before_watching;

void on_interrupt(int signal, siginfo_t* info, void* context) {
  const int error = errno;  // of the code that the signal interrupts
  __atomic_store_n(&interrupted, 1, __ATOMIC_RELAXED);  // other threads read it
  if (before_watching.sa_flags & SA_SIGINFO) before_watching.sa_sigaction(signal, info, context);
  else before_watching.sa_handler(signal);
  errno = error;
}

}  // namespace

// Installs the handler and returns the flag for a call's `cancel`. Returns null where SIGINT has no handler: then it ends the
// process or is ignored.
SKIP_RNN_EXPORT const volatile std::int32_t* skip_rnn_watch_interrupt() {
  __atomic_store_n(&interrupted, 0, __ATOMIC_RELAXED);
  if (sigaction(SIGINT, nullptr, &before_watching)) return nullptr;
  const bool has_handler = (before_watching.sa_flags & SA_SIGINFO) ||
                           (before_watching.sa_handler != SIG_DFL && before_watching.sa_handler != SIG_IGN);
  if (!has_handler) return nullptr;
  struct sigaction ours = before_watching;
  ours.sa_sigaction = on_interrupt;
  ours.sa_flags |= SA_SIGINFO;
  return sigaction(SIGINT, &ours, nullptr) ? nullptr : &interrupted;
}

// Restores the replaced handler, unless somebody has set another one since: a handler in Python may do so. To be called after
// each call that skip_rnn_watch_interrupt returned a flag for.
SKIP_RNN_EXPORT void skip_rnn_stop_watching() {
  struct sigaction current;
  if (sigaction(SIGINT, nullptr, &current)) return;
  if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_interrupt) sigaction(SIGINT, &before_watching, nullptr);
}

#if !defined(__AVX2__)
// The instruction set that this machine runs: 0 portable (NEON on aarch64), 1 AVX2 and FMA, 2 also AVX-512 F, BW, VL and DQ,
// 3 also AMX.
SKIP_RNN_EXPORT int skip_rnn_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512dq")
             ? 2 + has_amx()
             : 1;
#else
  return 0;
#endif
}
#endif
