// Rows on their way to a cache on Hopper, as functions of pointers: norm, rotation, round trip and
// packing in one kernel, with the bits of the CPU's kernels one after the other (rms_norm.h,
// rope.h, hadamard.h, round_trip.h, kv_rows.h). Free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

inline constexpr int64_t kRotaryDim = 64;

/// Latents: RMSNorm, rotation of the last 64 channels, Q8_64 of the others. A row that went through
/// all of that is only packed where neither a weight nor a rotation is given.
struct LatentRowsSm90Params {
  const uint16_t* x;     ///< [rows, stride] BF16
  const float* weight;   ///< [width] of the norm; null: no norm
  const float* cos_sin;  ///< [rows, 32, 2]; null: no rotation
  const int64_t* place;  ///< [rows] row of `out`, negative: not stored; null: row i
  uint8_t* out;          ///< packed latents (kv_rows.h): 584 bytes a row for 512 channels
  int64_t rows, width;   ///< width: a multiple of 64 up to 512
  int64_t stride;        ///< a multiple of 4
  float eps;
};
void latent_rows_sm90(const LatentRowsSm90Params& p, Stream stream);
/// The same on a CPU; Error for a row that is only packed and no round trip gave.
void latent_rows_twin(const LatentRowsSm90Params& p);

/// Keys and queries of the indexer: RMSNorm (keys), rotation of the last 64 of 128 channels,
/// Hadamard, Q4_32; or packing alone.
struct IndexRowsSm90Params {
  const uint16_t* x;     ///< [rows, 128] BF16
  const float* weight;   ///< [128] of the norm; null: no norm
  const float* cos_sin;  ///< [rows / heads, 32, 2]; null: the rows are only packed
  const int64_t* place;  ///< [rows] row of `out`, negative: not stored; null: row i
  uint8_t* out;          ///< rows of 68 bytes
  int64_t rows, heads;
  float eps;
};
void index_rows_sm90(const IndexRowsSm90Params& p, Stream stream);
/// The same on a CPU, as latent_rows_twin.
void index_rows_twin(const IndexRowsSm90Params& p);

}  // namespace hadal::ops
