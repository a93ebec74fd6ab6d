/* The most float32 operations a second that one core reaches: independent multiply-adds on registers, and no memory.
   peak.py compiles this file for an instruction set; BYTES is the width of its vectors. */
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
