// CPU kernel contract of the indexer's scores: keys found by pointer, so that a step's rows and
// pages look alike.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cache/kv_rows.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

/// Consecutive tokens of one sequence: a block of keys is read once for all of them.
struct IndexScoresCpuParams {
  const void* q;            ///< [tokens, heads, dim]
  const void* w;            ///< [tokens, heads]
  const void* const* rows;  ///< [largest num_keys] each [dim], all as `format` says
  const int64_t* num_keys;  ///< [tokens] how many of the rows a token sees
  float* scores;            ///< [tokens, scores_row], the first num_keys of each row are written
  float* scratch;           ///< [16 * dim]
  int64_t tokens, heads, dim, scores_row;
  ElementType dtype;
  RowFormat format = {};
  bool round_bf16;  ///< `released`: dots, products and the sum rounded to BF16
};

extern CpuSlot<void(const IndexScoresCpuParams&)> index_scores_cpu;

}  // namespace hadal::ops
