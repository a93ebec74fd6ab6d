/* What one core reaches: float32 operations a second of independent multiply-adds on registers, and bytes a second read from
   memory. peak.py compiles this file for an instruction set; BYTES is the width of its vectors. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHAINS 12 /* enough to hide the latency of a multiply-add on two ports */
#define STEPS 20000
#define RUNS 50
#define LANES (BYTES / 4)

typedef float Vector __attribute__((vector_size(BYTES)));

static double now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

/* The best of many short runs: an interruption spoils some of them, never all. */
double peak_flops(void) {
  double best = 0;
  for (int run = 0; run < RUNS; ++run) {
    Vector acc[CHAINS]; /* they start from different values: the compiler would merge equal chains */
    const Vector zero = {0};
    for (int c = 0; c < CHAINS; ++c) acc[c] = zero + (float)(run + c);
    const Vector x = zero + (0.5f + (float)run), y = zero + 1.0f;
    const double start = now();
    for (int i = 0; i < STEPS; ++i)
#pragma GCC unroll 12
      for (int c = 0; c < CHAINS; ++c) acc[c] = acc[c] * x + y;
    const double rate = 2.0 * LANES * CHAINS * STEPS / (now() - start);
    volatile float used = 0; /* the results are read, so that the loop is not removed */
    for (int c = 0; c < CHAINS; ++c)
      for (int lane = 0; lane < LANES; ++lane) used = used + acc[c][lane];
    if (rate > best) best = rate;
  }
  return best;
}

/* The most bytes a second that one core reads in order, again and again, from `bytes` of memory; 0 without memory. */
double read_bandwidth(long bytes) {
  const long count = bytes / (8 * BYTES) * 8;
  Vector *data = aligned_alloc(64, (size_t)count * BYTES);
  if (!data) return 0;
  memset(data, 0, (size_t)count * BYTES);
  double best = 0;
  for (int run = 0; run < RUNS; ++run) {
    Vector acc[8] = {{0}};
    const double start = now();
    for (long i = 0; i < count; i += 8)
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) acc[c] += data[i + c];
    const double rate = (double)count * BYTES / (now() - start);
    volatile float used = 0;
    for (int c = 0; c < 8; ++c) used = used + acc[c][0];
    if (rate > best) best = rate;
  }
  free(data);
  return best;
}
