// The compressor on Hopper, as functions of pointers, with the bits of the CPU's kernel
// (compress_cpu.h): pooling, and the state that later steps pool from. What a pooled block becomes
// in the cache is ops/cache/rows_sm90.h. Free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

/// A step's rows of kv and gate, and the rows of kv and score (gate + ape) from before it. Position
/// p of sequence s lies in step row begin[s] + p - start[s] from start[s] on, and in ring row
/// ring_row[s] + p mod ring before; ring: at least o * ratio - 1.
struct CompressorRowsSm90 {
  const float* kv;          ///< [tokens, stride] FP32; o d columns count, o = 2 for ratio 4, else 1
  const float* gate;        ///< the same
  const float* ape;         ///< [ratio, o d]
  float* kv_ring;           ///< [.., o d]
  float* score_ring;        ///< [.., o d]
  const int32_t* begin;     ///< [sequences]
  const int32_t* start;     ///< [sequences]
  const int32_t* ring_row;  ///< [sequences]
  int64_t stride, ring, ratio, d;
};

/// Pools blocks that the step completes; the rings are only read.
struct CompressSm90Params {
  CompressorRowsSm90 rows;
  const int32_t* sequence;  ///< [blocks]
  const int32_t* block;     ///< [blocks] number of the block in its sequence
  uint16_t* pooled;         ///< [blocks, d] BF16
  int64_t blocks;
};
void compress_sm90(const CompressSm90Params& p, Stream stream);

/// Keeps the last `ring` rows of every sequence of the step; after compress_sm90.
struct KeepRowsSm90Params {
  CompressorRowsSm90 rows;
  const int32_t* end;  ///< [sequences] the step row behind each sequence's last
  int64_t sequences;
  int64_t longest;  ///< tokens of the longest, or more
};
void keep_rows_sm90(const KeepRowsSm90Params& p, Stream stream);

}  // namespace hadal::ops
