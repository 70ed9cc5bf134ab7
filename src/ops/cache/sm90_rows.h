// Rows of products made into rows of a packed cache on Hopper, in one kernel each
// (ops/cache/rows_sm90.h): norm, rotation, round trip and packing, with the bits of the ops one
// after the other.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "ops/cache/cache_views.h"

namespace hadal::ops {

/// What a layer computed for a cache, before its norm and rotation.
struct CacheRows {
  at::Tensor x;        ///< [rows, width] BF16
  at::Tensor weight;   ///< [width] of the norm
  double eps = 0;      ///< of the norm
  at::Tensor cos_sin;  ///< [rows, rotary / 2, 2]
};

/// Whether cache_rows_sm90 makes such rows: of `released` on a Hopper card, 64 rotary channels.
bool serves_cache_rows_sm90(const at::Tensor& x,
                            const at::Tensor& cos_sin,
                            const RowFormat& format);
/// Row i becomes row numbers[i] (I64) of `out` [*, bytes]; undefined: row i.
void cache_rows_sm90(const CacheRows& rows,
                     const RowFormat& format,
                     const at::Tensor& numbers,
                     const at::Tensor& out);

/// Room for `count` rows of a cache's type that lie a whole number of rows away from those of a
/// cache, so that a kernel reaches both by one base address and a row's number.
at::Tensor rows_in_step_with(const at::Tensor& cache, int64_t count);

/// Queries of the indexer [tokens, heads, 128], rotated, through Hadamard and Q4_32: packed rows
/// [tokens, heads, 68].
at::Tensor index_queries_sm90(const at::Tensor& q, const at::Tensor& cos_sin);

}  // namespace hadal::ops
