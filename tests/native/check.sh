#!/bin/sh
# Builds the fuzz driver under sanitizers and runs it: memory and undefined behaviour in portable code and in the widest this
# machine runs, then races. CXX, CALLS and THREADED_CALLS may be set.
set -eu
cd "$(dirname "$0")"
out=../../build/native
mkdir -p "$out"
common="-std=c++17 -O1 -g -pthread -ffp-contract=off -DSKIP_RNN_POISON -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"
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
