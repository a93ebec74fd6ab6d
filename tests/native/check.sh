#!/bin/sh
# Builds the fuzz driver under sanitizers and runs it: memory and undefined behaviour in portable code and in the widest this
# machine runs, then races, then older machines and ARM under qemu. CXX, ARM_CXX, CALLS, THREADED_CALLS and EMULATED_CALLS may be set.
set -eu
cd "$(dirname "$0")"
out=../../build/native
mkdir -p "$out"
common="-DINTERRUPT_SECONDS=10 -std=c++17 -O1 -g -pthread -ffp-contract=off -DSKIP_RNN_POISON -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"
memory="-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
CXX=${CXX:-g++}

$CXX $common $memory fuzz.cpp -o "$out/fuzz_portable" -ldl
"$out/fuzz_portable" "${CALLS:-10000}"

flags=$(sed -n 's/^flags[^:]*://p' /proc/cpuinfo | head -n 1)
case "$flags " in
  *" avx512dq "*) isa="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma" ;;
  *" avx2 "*) isa="-mavx2 -mfma" ;;
  *) isa="" ;;
esac
if [ -n "$isa" ]; then
  $CXX $common $memory $isa fuzz.cpp -o "$out/fuzz_wide" -ldl
  "$out/fuzz_wide" "${CALLS:-10000}"
fi

# The sanitizer does not know OpenMP's synchronisation: threads of the call's own.
$CXX $common -DSKIP_RNN_STD_THREADS -fsanitize=thread fuzz.cpp -o "$out/fuzz_threads" -ldl
"$out/fuzz_threads" "${THREADED_CALLS:-500}" 4

# Older machines, where qemu-user-static is installed: no library uses an instruction that its machines lack.
if command -v qemu-x86_64-static > /dev/null; then
  emulated="-DINTERRUPT_SECONDS=10 -std=c++17 -O1 -pthread -ffp-contract=off -w -static"
  $CXX $emulated fuzz.cpp -o "$out/fuzz_nehalem" -ldl
  qemu-x86_64-static -cpu Nehalem "$out/fuzz_nehalem" "${EMULATED_CALLS:-200}"
  $CXX $emulated -mavx2 -mfma fuzz.cpp -o "$out/fuzz_haswell" -ldl
  qemu-x86_64-static -cpu Haswell "$out/fuzz_haswell" "${EMULATED_CALLS:-200}" 2> /dev/null
fi

# ARM, with a cross-compiler (g++-aarch64-linux-gnu): the NEON instruction set, and threads without OpenMP.
ARM_CXX=${ARM_CXX:-aarch64-linux-gnu-g++}
if command -v qemu-aarch64-static > /dev/null && command -v "$ARM_CXX" > /dev/null; then
  $ARM_CXX -DINTERRUPT_SECONDS=10 -std=c++17 -O2 -pthread -ffp-contract=off -DSKIP_RNN_POISON -w -static fuzz.cpp -o "$out/fuzz_arm" -ldl
  qemu-aarch64-static "$out/fuzz_arm" "${EMULATED_CALLS:-200}"
  qemu-aarch64-static "$out/fuzz_arm" "${EMULATED_CALLS:-200}" 3
fi
