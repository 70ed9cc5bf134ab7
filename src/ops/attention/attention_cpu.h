// CPU kernel contract of attention: keys found by pointer, so that chunk, ring and
// pages look alike. Every sum runs in the order of the contract
// (sparse_attn.h), which no batch, chunking or thread count changes.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cache/kv_rows.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

/// One query token's keys, in fold order and cut into chunks of at most 64.
struct AttentionKeysCpu {
  const void* const* rows;       ///< [num_keys] each [dim]
  const bool* packed = nullptr;  ///< [num_keys] whether a row is packed; null: none is
  const int32_t* chunk_ends;     ///< [num_chunks] running number of keys
  int32_t num_chunks;
};

struct AttentionCpuParams {
  const void* q;      ///< [heads, dim] of the token
  const float* sink;  ///< [heads]
  void* out;          ///< [heads, dim], q's dtype
  float* lse;         ///< [heads]
  float* scratch;     ///< attention_scratch_floats(heads, dim)
  int64_t heads, dim;
  float scale;
  ElementType dtype;
  RowFormat format = {};     ///< of packed rows
  bool round_probabilities;  ///< BF16 probabilities into the value product
};

constexpr int64_t attention_scratch_floats(int64_t heads, int64_t dim) {
  return 64 * dim + heads * dim + heads * 64 + 3 * heads + dim * heads + 64;
}

extern CpuSlot<void(const AttentionCpuParams&, const AttentionKeysCpu&)> attention_cpu;

}  // namespace hadal::ops
