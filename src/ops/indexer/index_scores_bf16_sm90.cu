// Scores of BF16 keys by mma.sync: four warps score 16 keys each of a chunk of 64, which arrives by
// number while the chunk before is scored. A token's chunks are shared among blocks.
#include <algorithm>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/mma.cuh"
#include "ops/cuda/row_piece.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/indexer/index_bf16_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 128, kMostHeads = kTileRows, kKeys = kTileRows;
static_assert(kTileDim == kIndexDim);

struct Memory {
  alignas(128) uint8_t q[kTileBytes];
  alignas(128) uint8_t keys[2][kTileBytes];
  float w[kMostHeads];
  int32_t number[2][kKeys];  ///< rows of a chunk; negative: none
};
extern __shared__ __align__(128) uint8_t scores_memory[];

/// The rows of chunk `chunk` by number, read by the first 64 threads.
__device__ __forceinline__ int32_t read_number(const IndexScoresBf16Sm90Params& p,
                                               int64_t seq,
                                               int64_t visible,
                                               int64_t chunk) {
  const int64_t block = chunk * kKeys + threadIdx.x;
  if (threadIdx.x >= kKeys || block >= visible) return -1;
  return static_cast<int32_t>(p.rows.row(seq, block));
}

__device__ __forceinline__ void copy_keys(const IndexScoresBf16Sm90Params& p,
                                          const int32_t* number,
                                          uint32_t tile) {
  const int piece = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
    const int row = static_cast<int>(threadIdx.x) / 16 + i * 8;
    const int32_t from = number[row];
    const bool any = from >= 0;
    copy_async(tile + tile_offset(row, piece),
               any ? p.keys + static_cast<int64_t>(from) * kIndexDim + piece * 8 : p.q, any);
  }
  copy_async_commit();
}

/// Queries and weights of a token; heads up to a multiple of 16 are zero.
__device__ __forceinline__ void load_query(Memory& m,
                                           const IndexScoresBf16Sm90Params& p,
                                           int64_t token) {
  const auto heads = static_cast<int>(p.heads), padded = (heads + 15) / 16 * 16;
  const uint16_t* q = p.q + token * p.heads * kIndexDim;
  for (int i = static_cast<int>(threadIdx.x); i < padded * 16; i += kThreads) {
    const bool any = i / 16 < heads;
    copy_async(shared_address(m.q) + tile_offset(i / 16, i % 16), any ? q + i * 8 : p.q, any);
  }
  for (int head = static_cast<int>(threadIdx.x); head < padded; head += kThreads) {
    const uint32_t bits = head < heads ? p.w[token * p.heads + head] : 0;
    m.w[head] = __uint_as_float(bits << 16);
  }
}

/// Scores of the thread's two keys of a tile (16 * warp + lane / 4, and 8 below), in every lane of
/// a quad.
__device__ __forceinline__ float2 score_keys(const Memory& m, uint32_t tile, int heads) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t keys[8][4];
  load_a(keys, tile, warp * 16, lane);
  float2 sum = make_float2(0.0f, 0.0f);
  for (int first = 0; first < heads; first += 16) {
    float d[2][4] = {};
    product_rows<1>(d, keys, shared_address(m.q), first, lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* w = m.w + first + i * 8 + lane % 4 * 2;
      sum.x = sum.x + fmaxf(d[i][0], 0.0f) * w[0];
      sum.x = sum.x + fmaxf(d[i][1], 0.0f) * w[1];
      sum.y = sum.y + fmaxf(d[i][2], 0.0f) * w[0];
      sum.y = sum.y + fmaxf(d[i][3], 0.0f) * w[1];
    }
  }
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    sum.x = sum.x + __shfl_xor_sync(0xffffffffu, sum.x, step);
    sum.y = sum.y + __shfl_xor_sync(0xffffffffu, sum.y, step);
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    index_scores_bf16_kernel(const __grid_constant__ IndexScoresBf16Sm90Params p, int blocks) {
  Memory& m = *reinterpret_cast<Memory*>(scores_memory);
  wait_for_previous();
  launch_dependents();
  const auto [token, piece] = row_piece(blocks);
  const int64_t visible = p.visible[token], seq = p.seq[token];
  const int64_t chunks = (visible + kKeys - 1) / kKeys;
  const int t = static_cast<int>(threadIdx.x);
  if (piece >= chunks) return;
  if (t < kKeys) m.number[0][t] = read_number(p, seq, visible, piece);
  load_query(m, p, token);
  __syncthreads();
  copy_keys(p, m.number[0], shared_address(m.keys[0]));
  int stage = 0;
  for (int64_t chunk = piece; chunk < chunks; chunk += blocks, stage ^= 1) {
    if (t < kKeys) m.number[stage ^ 1][t] = read_number(p, seq, visible, chunk + blocks);
    copy_async_wait<0>();
    __syncthreads();  // and everybody is done with the chunk before
    if (chunk + blocks < chunks)
      copy_keys(p, m.number[stage ^ 1], shared_address(m.keys[stage ^ 1]));
    const float2 scores = score_keys(m, shared_address(m.keys[stage]), static_cast<int>(p.heads));
    if (t % 4 != 0) continue;
    const int64_t block = chunk * kKeys + t / 32 * 16 + t % 32 / 4;
    float* out = p.scores + token * p.stride + block;
    if (block < visible) out[0] = scores.x;
    if (block + 8 < visible) out[8] = scores.y;
  }
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void index_scores_bf16_sm90(const IndexScoresBf16Sm90Params& p, Stream stream) {
  const int64_t chunks = (p.stride + cuda::kKeys - 1) / cuda::kKeys;
  if (p.tokens == 0 || chunks == 0) return;
  if (!serves_index_heads(p.heads))
    throw_kernel_error("index_scores_bf16_sm90", "at most 64 heads");
  auto* kernel = cuda::index_scores_bf16_kernel;
  constexpr int kBytes = sizeof(cuda::Memory);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  // Some blocks for each of the card's 132 processors, shared by the tokens.
  const int64_t blocks = std::min((132 * 4 + p.tokens - 1) / p.tokens, chunks);
  cuda::launch_early(kernel, {cuda::blocks_for(p.tokens * blocks, 1), cuda::kThreads, kBytes},
                     stream, "index_scores_bf16_sm90", p, static_cast<int>(blocks));
}

}  // namespace hadal::ops
