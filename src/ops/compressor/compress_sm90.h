// The compressor on Hopper, as functions of pointers, with the bits of the CPU's kernel
// (compress_cpu.h): pooling, and the state that later steps pool from. What a pooled block becomes
// in the cache is ops/cache/rows_sm90.h. Tables are those of a step (ops/cache/batch.h). Free of
// ATen.
#pragma once

#include "ops/cache/row_tables.h"
#include "ops/kernel_types.h"

namespace hadal::ops {

/// A step's rows of kv and gate, and the rows of kv and score (gate + ape) from before it.
struct CompressorRowsSm90 {
  const float* kv;    ///< [tokens, stride] FP32; o d columns count, o = 2 for ratio 4, else 1
  const float* gate;  ///< the same
  const float* ape;   ///< [ratio, o d]
  float* kv_ring;     ///< [.., o d]
  float* score_ring;  ///< [.., o d]
  RingRows ring;      ///< of both; size: at least o * ratio - 1
  const int32_t* first_row;  ///< [sequences] row of each sequence's first token in the step
  const int64_t* pos;        ///< [tokens] absolute position
  int64_t stride, ratio, d;
};

/// Pools blocks that the step completes; the rings are only read.
struct CompressSm90Params {
  CompressorRowsSm90 rows;
  const int64_t* block_seq;  ///< [blocks] sequence of a block, negative: none
  const int64_t* block_pos;  ///< [blocks] position of its first token
  uint16_t* pooled;          ///< [blocks, d] BF16
  int64_t blocks;
};
/// Whether there is a kernel for blocks of so many tokens.
inline bool serves_compress_sm90(int64_t ratio) { return ratio <= 440; }
void compress_sm90(const CompressSm90Params& p, Stream stream);
/// The same on a CPU.
void compress_twin(const CompressSm90Params& p);

/// Keeps rows of the step in the rings: row from[i] as row to[i] of both; after compress_sm90.
struct KeepRowsSm90Params {
  CompressorRowsSm90 rows;
  const int64_t* from;  ///< [count] rows of the step, negative: none
  const int64_t* to;    ///< [count] rows of the rings
  int64_t count;
};
void keep_rows_sm90(const KeepRowsSm90Params& p, Stream stream);
/// The same on a CPU.
void keep_rows_twin(const KeepRowsSm90Params& p);

}  // namespace hadal::ops
