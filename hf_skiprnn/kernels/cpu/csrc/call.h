// The argument of the C ABI's functions. The Python side mirrors it field by field. A changed field needs a new kAbi on both
// sides.
#pragma once

#include <cstdint>

constexpr std::int64_t kAbi = 8;

// Contiguous arrays of the scalar type (float or double) unless said otherwise. B rows, T steps, I inputs, H units, L layers.
struct SkipRnnCall {
  // sizes and flags
  std::int64_t size;      // sizeof(SkipRnnCall)
  std::int64_t is_double;
  std::int64_t is_bf16;   // x and weights are bfloat16, all else float; for inference
  std::int64_t cell;      // 0 lstm, 1 gru, 2 gru_reset_after
  std::int64_t batch, steps, inputs, units, layers;
  std::int64_t threads;
  std::int64_t every;     // training: updates from one checkpoint to the next
  std::int64_t rows;      // backward: rows that are computed together
  std::int64_t capped;    // backward: the gate's slope is min(1, capped * D); 0: 1
  std::int64_t amx;       // multiply bfloat16 weights with AMX if this machine has it (amx.h)
  std::int64_t rounded;   // x and weights are float, but each number is a bfloat16 number; for training

  // inputs
  const void* x;                   // [B, T, I]; with ids: the embedding table [., I]
  const std::int64_t* ids;         // [B, T], rows of x, or null
  const std::uint8_t* mask;        // [B, T], 1 at real steps, or null: all are
  const std::uint8_t* forced;      // [B, T], 1 at updates, or null
  const void* const* weights;      // [L * 4]: weight_ih [G H, I], weight_hh [G H, H], bias [G H] or null, bias_hh_n [H] or null
  const void* gate_weight;         // [H], or null: no learned gate
  const void* gate_bias;           // [1]
  const void *h0, *c0;             // [L, B, H]; c0 null for a GRU
  const void *increment0, *steps_since_update0;  // [B]
  const void* gate_shift;                        // [B], added to the gate's pre-activation, or null
  const volatile std::int32_t* cancel;           // null, or where a value other than 0 ends the call with kCancelled

  // forward: outputs
  void* sequence;            // [B, T, H] or null
  void *h, *c;               // [L, B, H]
  void* increment;           // [B]; the backward pass reads it
  void* steps_since_update;  // [B]
  void* num_updates;         // [B]
  void* update_gates;        // [B, T], zeros on entry
  // training: written by the forward pass, read by the backward pass; null in inference
  std::int32_t* updates;     // [B, T], times of each row's updates
  std::int32_t* counts;      // [B]
  void* checkpoints;         // [B, T / every, L, 1 or 2, H], the state (h, then c) after each `every` updates
  void* products;            // [B, T, G H], the lowest layer's input products; null: each pass computes them itself

  // backward: cotangents, each may be null
  const void *grad_sequence, *grad_h, *grad_c, *grad_increment, *grad_steps_since_update, *grad_num_updates,
      *grad_update_gates;
  // backward: outputs
  void* grad_x;              // [B, T, I], zeros on entry, or null
  void* const* grad_weights; // as weights
  void *grad_gate_weight, *grad_gate_bias;
  void *grad_h0, *grad_c0, *grad_increment0, *grad_steps_since_update0;
  void* grad_gate_shift;     // [B], or null
};

enum SkipRnnStatus : int { kDone = 0, kBadCall = 1, kNoMemory = 2, kCancelled = 3 };
