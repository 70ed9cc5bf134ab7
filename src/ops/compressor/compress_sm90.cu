// Pooling has two forms. Of eight candidates (ratio 4) a thread holds one channel's in registers.
// Of more, a block brings 64 channels' to shared memory with all its threads, which also compute
// the exponentials; the sums walk positions upwards in one thread a channel, as the CPU's do.
#include "ops/compressor/compress_sm90.h"
#include "ops/cuda/elementwise.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/row_piece.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"

namespace hadal::ops::cuda {
namespace {

constexpr int kFewThreads = 128, kChannels = 64, kThreads = 512;
constexpr int kSlices = kThreads / kChannels;  // threads that share a channel's candidates
constexpr int kKept = 512;                     // columns of a block that keeps rows

/// Blocks that share a row of so many columns.
__host__ __device__ constexpr int64_t pieces_of(int64_t columns, int64_t each) {
  return (columns + each - 1) / each;
}

/// Where the candidates of a block lie: the previous block's first half of the columns (ratio 4),
/// then this block's second half.
struct Candidates {
  const CompressorRowsSm90& rows;
  int64_t first, start;  ///< position of the first candidate, and of the step's first token
  int64_t step_row;      ///< row of the step at the first candidate's position
  int64_t ring_row;      ///< the sequence's first row of the rings
  int ring_place;        ///< of the first candidate that there is in its ring
  int64_t width;

  __device__ Candidates(const CompressSm90Params& p, int64_t block, int overlap)
      : rows(p.rows), width(overlap * p.rows.d) {
    const int64_t sequence = p.block_seq[block], first_row = rows.first_row[sequence];
    first = p.block_pos[block] - (overlap - 1) * rows.ratio;
    start = rows.pos[first_row];
    step_row = first_row + first - start;
    ring_row = rows.ring.row(sequence, 0);
    ring_place = static_cast<int>(rows.ring.row(sequence, first < 0 ? 0 : first) - ring_row);
  }
  __device__ int absent() const { return first < 0 ? static_cast<int>(-first) : 0; }
  /// Score and value of candidate j, not absent, in column c of the row.
  __device__ __forceinline__ void load(int j, int64_t c, float& score, float& value) const {
    if (first + j < start) {
      int place = ring_place + j - absent();
      if (place >= rows.ring.size) place -= static_cast<int>(rows.ring.size);
      const int64_t at = (ring_row + place) * width + c;
      score = rows.score_ring[at];
      value = rows.kv_ring[at];
      return;
    }
    const int64_t at = (step_row + j) * rows.stride + c;
    const int ratio = static_cast<int>(rows.ratio);
    score = rows.gate[at] + rows.ape[(j < ratio ? j : j - ratio) * width + c];
    value = rows.kv[at];
  }
};

constexpr float kLowest = -3.402823466e38f;

__device__ __forceinline__ void store_pooled(
    const CompressSm90Params& p, int64_t block, int64_t channel, float sum, float total) {
  p.pooled[block * p.rows.d + channel] = __bfloat16_as_ushort(__float2bfloat16_rn(sum / total));
}

__global__ void __launch_bounds__(kFewThreads)
    compress_few_kernel(const __grid_constant__ CompressSm90Params p) {
  constexpr int kCount = 8;
  const auto [block, piece] = row_piece(pieces_of(p.rows.d, kFewThreads));
  const int64_t i = static_cast<int64_t>(piece) * kFewThreads + threadIdx.x;
  if (threadIdx.x % 32 == 0 && i < p.rows.d) {
    for (int line = 0; line < kCount; ++line) prefetch_constant(p.rows.ape + line * p.rows.d + i);
  }
  wait_for_previous();
  launch_dependents();
  if (i >= p.rows.d || p.block_seq[block] < 0) return;
  const Candidates candidates(p, block, 2);
  const int absent = candidates.absent();
  float score[kCount], value[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    score[j] = value[j] = 0.0f;
    if (j >= absent) candidates.load(j, i + (j >= kCount / 2 ? p.rows.d : 0), score[j], value[j]);
  }
  float highest = kLowest, total = 0.0f, sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kCount; ++j) highest = j >= absent && score[j] > highest ? score[j] : highest;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (j < absent) continue;
    const float weight = exp_exact(score[j] - highest);
    total = total + weight;
    sum = fmaf(weight, value[j], sum);
  }
  store_pooled(p, block, i, sum, total);
}

__global__ void __launch_bounds__(kThreads)
    compress_kernel(const __grid_constant__ CompressSm90Params p) {
  extern __shared__ __align__(16) float memory[];
  __shared__ float highest_of[kSlices][kChannels];
  const auto count = static_cast<int>(p.rows.ratio);
  float* scores = memory;
  float* values = memory + count * kChannels;
  const int channel = static_cast<int>(threadIdx.x) % kChannels;
  const int slice = static_cast<int>(threadIdx.x) / kChannels;
  const auto [block, piece] = row_piece(pieces_of(p.rows.d, kChannels));
  const int64_t i = static_cast<int64_t>(piece) * kChannels + channel;
  const bool exists = i < p.rows.d;
  for (int j = slice; exists && channel % 32 == 0 && j < count; j += kSlices)
    prefetch_constant(p.rows.ape + j * p.rows.d + i);
  wait_for_previous();
  launch_dependents();
  if (p.block_seq[block] < 0) return;
  const Candidates candidates(p, block, 1);
  float highest = kLowest;
  if (exists) {
#pragma unroll 16
    for (int j = slice; j < count; j += kSlices) {
      float score, value;
      candidates.load(j, i, score, value);
      scores[j * kChannels + channel] = score;
      values[j * kChannels + channel] = value;
      highest = score > highest ? score : highest;
    }
  }
  highest_of[slice][channel] = highest;
  __syncthreads();
#pragma unroll
  for (int other = 0; other < kSlices; ++other) {
    const float h = highest_of[other][channel];
    highest = h > highest ? h : highest;
  }
  for (int j = slice; j < count; j += kSlices) {
    float& score = scores[j * kChannels + channel];
    score = exp_exact(score - highest);
  }
  __syncthreads();
  if (slice != 0 || !exists) return;
  float total = 0.0f, sum = 0.0f;
#pragma unroll 16
  for (int j = 0; j < count; ++j) {
    const float weight = scores[j * kChannels + channel];
    total = total + weight;
    sum = fmaf(weight, values[j * kChannels + channel], sum);
  }
  store_pooled(p, block, i, sum, total);
}

/// Four columns a thread.
__global__ void keep_rows_kernel(const __grid_constant__ KeepRowsSm90Params p) {
  wait_for_previous();
  launch_dependents();
  const CompressorRowsSm90& r = p.rows;
  const int64_t width = (r.ratio == 4 ? 2 : 1) * r.d;
  const auto [row, piece] = row_piece(pieces_of(width, kKept));
  const int64_t token = p.from[row], i = static_cast<int64_t>(piece) * kKept + threadIdx.x * 4;
  if (i >= width || token < 0) return;
  const int64_t to = p.to[row] * width + i;
  const float4 gate = load4(r.gate + token * r.stride + i);
  const float4 ape = load4(r.ape + r.pos[token] % r.ratio * width + i);
  store4(r.kv_ring + to, load4(r.kv + token * r.stride + i));
  store4(r.score_ring + to,
         make_float4(gate.x + ape.x, gate.y + ape.y, gate.z + ape.z, gate.w + ape.w));
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void compress_sm90(const CompressSm90Params& p, Stream stream) {
  if (p.blocks == 0) return;
  if (p.rows.ratio == 4) {
    const unsigned grid =
        cuda::blocks_for(p.blocks * cuda::pieces_of(p.rows.d, cuda::kFewThreads), 1);
    return cuda::launch_early(cuda::compress_few_kernel, {grid, cuda::kFewThreads}, stream,
                              "compress_sm90", p);
  }
  const auto bytes = static_cast<size_t>(p.rows.ratio * cuda::kChannels * 8);
  if (!serves_compress_sm90(p.rows.ratio))
    throw_kernel_error("compress_sm90", "blocks of more than 440 tokens");
  cudaFuncSetAttribute(cuda::compress_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  const unsigned grid = cuda::blocks_for(p.blocks * cuda::pieces_of(p.rows.d, cuda::kChannels), 1);
  cuda::launch_early(cuda::compress_kernel, {grid, cuda::kThreads, bytes}, stream, "compress_sm90",
                     p);
}

void keep_rows_sm90(const KeepRowsSm90Params& p, Stream stream) {
  if (p.count == 0) return;
  const int64_t width = (p.rows.ratio == 4 ? 2 : 1) * p.rows.d;
  if (width % 4 != 0 || p.rows.stride % 4 != 0)
    throw_kernel_error("keep_rows_sm90", "rows of a multiple of 4 columns");
  const unsigned grid = cuda::blocks_for(p.count * cuda::pieces_of(width, cuda::kKept), 1);
  cuda::launch_early(cuda::keep_rows_kernel, {grid, cuda::kKept / 4}, stream, "keep_rows_sm90", p);
}

}  // namespace hadal::ops
