// sparse_attn on CUDA: forward and backward for whole samples, head_dim 128, BF16, on mma.sync
// tiles.
//
// The fold over keys is the contract's (sparse_attn.h): window chunks of 64 absolute positions,
// then blocks in chunks of 64, the sink last. A row of a tile never sees another row, so results do
// not depend on what shares a tile. Backward without atomics: one kernel per query tile for grad_q,
// one per key tile for grad_kv and grad_blocks, which walks the queries in order.
#include <cmath>

#include <cuda_runtime.h>

#include "base/check.h"
#include "ops/attention/sparse_attn_kernels.h"
#include "ops/cuda/mma.cuh"

namespace hadal::ops {
namespace {

using cuda::kTileBytes;
using cuda::kTileRows;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kThreads = 128;

void check_launch(const char* what) {
  const cudaError_t status = cudaGetLastError();
  HADAL_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

/// The key chunks that the queries of one tile fold, in order.
struct Chunks {
  int first_window, num_window, num_total;
};

template <bool kSelected>
__device__ Chunks plan_chunks(const SparseAttnParams& p, const TokenTile& tile) {
  Chunks chunks;
  const int last_pos = tile.pos + tile.num_tokens - 1;
  chunks.first_window = max(tile.pos - p.window + 1, 0) / kTileRows;
  chunks.num_window = last_pos / kTileRows - chunks.first_window + 1;
  int num_keys = 0;
  if (p.ratio > 0) {
    num_keys = (last_pos + 1) / p.ratio;
    if (kSelected) num_keys = min(num_keys, p.topk);
  }
  chunks.num_total = chunks.num_window + (num_keys + kTileRows - 1) / kTileRows;
  return chunks;
}

/// Loads chunk `index` into shared memory; threads [0, kCount) share the work. Keys that no query
/// may see are zeros.
template <bool kSelected, int kCount>
__device__ void load_chunk(const SparseAttnParams& p,
                           const TokenTile& tile,
                           const Chunks& chunks,
                           int index,
                           uint32_t destination,
                           int thread) {
  const int last_pos = tile.pos + tile.num_tokens - 1;
  const bool is_window = index < chunks.num_window;
  const int first_key = is_window ? (chunks.first_window + index) * kTileRows
                                  : (index - chunks.num_window) * kTileRows;
  const char* rows = static_cast<const char*>(is_window ? p.kv : p.blocks);
  const int base = is_window ? p.cu_seqlens[tile.seq] : p.ratio > 0 ? p.cu_blocks[tile.seq] : 0;
  const int limit = is_window ? last_pos + 1 : p.ratio > 0 ? (last_pos + 1) / p.ratio : 0;
  for (int i = thread; i < kTileRows * 16; i += kCount) {
    const int row = i >> 4, piece = i & 15;
    int key = first_key + row;
    bool valid = key < limit;
    if (kSelected && !is_window) {
      valid = valid && key < p.topk;
      if (valid) key = p.selection[static_cast<int64_t>(tile.first_token) * p.topk + key];
      valid = valid && key >= 0;
    }
    const int64_t source = valid ? base + key : base;
    cuda::copy_async(destination + cuda::tile_offset(row, piece), rows + source * 256 + piece * 16,
                     valid);
  }
  cuda::copy_async_commit();
}

/// Whether the query at `pos` sees key `row` of chunk `index`.
template <bool kSelected>
__device__ __forceinline__ bool sees(
    const SparseAttnParams& p, const Chunks& chunks, int index, int row, int pos) {
  if (index < chunks.num_window) {
    const int key = (chunks.first_window + index) * kTileRows + row;
    return key <= pos && key > pos - p.window;
  }
  const int key = (index - chunks.num_window) * kTileRows + row;
  const int visible = (pos + 1) / p.ratio;
  return key < (kSelected ? min(visible, p.topk) : visible);
}

/// Loads up to 16 query rows of a warp into its part of a tile.
__device__ void load_rows(const void* source,
                          int64_t first_row,
                          int num_rows,
                          uint32_t destination,
                          int tile_row,
                          int lane) {
  const char* rows = static_cast<const char*>(source);
  for (int i = lane; i < 16 * 16; i += 32) {
    const int row = i >> 4, piece = i & 15;
    const bool valid = row < num_rows;
    cuda::copy_async(destination + cuda::tile_offset(tile_row + row, piece),
                     rows + (first_row + (valid ? row : 0)) * 256 + piece * 16, valid);
  }
  cuda::copy_async_commit();
}

/// What one warp works on: 16 query rows, a tile buffer and how its chunks are shared.
template <bool kSelected>
struct WarpTile {
  TokenTile tile;
  Chunks chunks;
  int64_t first_row;  // of the warp's rows in [tokens * heads]
  int num_rows;       // valid ones, 0..16
  int pos[2];         // positions of rows group and group + 8
  bool active;

  __device__ WarpTile(const SparseAttnParams& p, int warp, int lane) {
    const int index = kSelected ? blockIdx.x * 4 + warp : blockIdx.x;
    active = index < p.num_tiles;
    if (!active) return;
    tile = p.tiles[index];
    chunks = plan_chunks<kSelected>(p, tile);
    const int tile_row = kSelected ? 0 : warp * 16;
    const int all_rows = tile.num_tokens * p.heads;
    first_row = static_cast<int64_t>(tile.first_token) * p.heads + tile_row;
    num_rows = max(0, min(16, all_rows - tile_row));
    for (int half = 0; half < 2; ++half) {
      const int row = min(tile_row + (lane >> 2) + half * 8, all_rows - 1);
      pos[half] = tile.pos + row / p.heads;
    }
  }
};

template <bool kSelected>
__device__ __forceinline__ void sync_tile() {
  if (kSelected) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

/// Writes acc (16 x 128) as BF16 rows.
__device__ void store_rows(void* destination,
                           int64_t first_row,
                           int num_rows,
                           const float (&acc)[16][4],
                           const float (&factor)[2],
                           int lane) {
  const int group = lane >> 2, pair = lane & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group + half * 8;
    if (row >= num_rows) continue;
    uint32_t* out =
        reinterpret_cast<uint32_t*>(static_cast<char*>(destination) + (first_row + row) * 256);
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      out[n * 4 + pair] =
          cuda::pack_bf16(acc[n][half * 2] * factor[half], acc[n][half * 2 + 1] * factor[half]);
    }
  }
}

/// Dynamic shared memory: two tiles that all warps share, or one tile a warp.
template <bool kSelected>
constexpr int shared_bytes() {
  return (kSelected ? 4 : 2) * kTileBytes;
}

template <bool kSelected>
__global__ void __launch_bounds__(kThreads) sparse_attn_kernel(const SparseAttnParams p) {
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = lane >> 2, pair = lane & 3;
  const WarpTile<kSelected> w(p, warp, lane);
  if (kSelected && !w.active) return;
  const uint32_t buffers = cuda::shared_address(shared) + (kSelected ? warp * kTileBytes : 0);
  const int thread = kSelected ? lane : threadIdx.x;
  constexpr int kCount = kSelected ? 32 : kThreads;

  uint32_t q[8][4];
  load_rows(p.q, w.first_row, w.num_rows, buffers, kSelected ? 0 : warp * 16, lane);
  cuda::copy_async_wait<0>();
  sync_tile<kSelected>();
  cuda::load_a(q, buffers, kSelected ? 0 : warp * 16, lane);
  sync_tile<kSelected>();

  // max, rescale, exp, FP32 sum, BF16 weights into the value product (reference: fold_chunk)
  float acc[16][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};
  const float scale = p.scale * kLog2e;
  load_chunk<kSelected, kCount>(p, w.tile, w.chunks, 0, buffers, thread);
  for (int index = 0; index < w.chunks.num_total; ++index) {
    const uint32_t current = kSelected ? buffers : buffers + (index & 1) * kTileBytes;
    if (!kSelected && index + 1 < w.chunks.num_total) {
      load_chunk<kSelected, kCount>(p, w.tile, w.chunks, index + 1,
                                    buffers + ((index + 1) & 1) * kTileBytes, thread);
      cuda::copy_async_wait<1>();
    } else {
      cuda::copy_async_wait<0>();
    }
    sync_tile<kSelected>();
    float s[8][4] = {};
    cuda::product_rows<4>(s, q, current, 0, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = row_max[half];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool seen = sees<kSelected>(p, w.chunks, index, n * 8 + pair * 2 + e, w.pos[half]);
          float& value = s[n][half * 2 + e];
          value = seen ? value * scale : -INFINITY;
          highest = fmaxf(highest, value);
        }
      }
      highest = cuda::quad_max(highest);
      const float base = highest == -INFINITY ? 0.0f : highest;
      const float rescale = exp2f(row_max[half] - base);
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = s[n][half * 2 + e];
          value = exp2f(value - base);
          sum += value;
        }
      }
      row_sum[half] = row_sum[half] * rescale + cuda::quad_sum(sum);
      row_max[half] = highest;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        acc[n][half * 2] *= rescale;
        acc[n][half * 2 + 1] *= rescale;
      }
    }
    uint32_t weights[4][4];
    cuda::to_a<4>(weights, s);
    cuda::product_columns<4>(acc, weights, current, 0, lane);
    sync_tile<kSelected>();
    if (kSelected && index + 1 < w.chunks.num_total) {
      load_chunk<kSelected, kCount>(p, w.tile, w.chunks, index + 1, buffers, thread);
    }
  }
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group + half * 8;
    const int64_t global = w.first_row + min(row, max(w.num_rows - 1, 0));
    const float sink = p.sink[global % p.heads] * kLog2e;
    const float denominator = row_sum[half] + exp2f(sink - row_max[half]);
    inverse[half] = 1.0f / denominator;
    if (row < w.num_rows && pair == 0) p.lse[global] = (row_max[half] + log2f(denominator)) * kLn2;
  }
  store_rows(p.out, w.first_row, w.num_rows, acc, inverse, lane);
}

__global__ void delta_kernel(const SparseAttnBackwardParams b) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) >> 5;
  const int lane = threadIdx.x & 31;
  if (row >= static_cast<int64_t>(b.forward.tokens) * b.forward.heads) return;
  const __nv_bfloat162* grad = static_cast<const __nv_bfloat162*>(b.grad_out) + row * 64 + lane * 2;
  const __nv_bfloat162* out =
      static_cast<const __nv_bfloat162*>(b.forward.out) + row * 64 + lane * 2;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 g = __bfloat1622float2(grad[i]), o = __bfloat1622float2(out[i]);
    sum = fmaf(g.x, o.x, fmaf(g.y, o.y, sum));
  }
  for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) b.delta[row] = sum;
}

/// Bit c of a token's words: block c is selected. One thread a word; the selection ascends.
__global__ void selected_bits_kernel(const SparseAttnParams p, uint32_t* selected, int mask_words) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= static_cast<int64_t>(p.tokens) * mask_words) return;
  const int32_t* row = p.selection + i / mask_words * p.topk;
  const int first = static_cast<int>(i % mask_words) * 32;
  int low = 0, high = p.topk;  // first entry that is -1 or >= first
  while (low < high) {
    const int middle = (low + high) / 2;
    if (row[middle] >= 0 && row[middle] < first) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  uint32_t bits = 0;
  for (; low < p.topk && row[low] >= 0 && row[low] < first + 32; ++low)
    bits |= 1u << (row[low] - first);
  selected[i] = bits;
}

template <bool kSelected>
__global__ void __launch_bounds__(kThreads) grad_q_kernel(const SparseAttnBackwardParams b) {
  extern __shared__ __align__(128) char shared[];
  const SparseAttnParams& p = b.forward;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = lane >> 2, pair = lane & 3;
  const WarpTile<kSelected> w(p, warp, lane);
  if (kSelected && !w.active) return;
  const uint32_t buffers = cuda::shared_address(shared) + (kSelected ? warp * kTileBytes : 0);
  const int thread = kSelected ? lane : threadIdx.x;
  constexpr int kCount = kSelected ? 32 : kThreads;

  uint32_t q[8][4], grad_out[8][4];
  const int tile_row = kSelected ? 0 : warp * 16;
  load_rows(p.q, w.first_row, w.num_rows, buffers, tile_row, lane);
  cuda::copy_async_wait<0>();
  sync_tile<kSelected>();
  cuda::load_a(q, buffers, tile_row, lane);
  sync_tile<kSelected>();
  load_rows(b.grad_out, w.first_row, w.num_rows, buffers, tile_row, lane);
  cuda::copy_async_wait<0>();
  sync_tile<kSelected>();
  cuda::load_a(grad_out, buffers, tile_row, lane);
  sync_tile<kSelected>();

  float lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Rows beyond the tile read some valid row; their results are not stored.
    const int64_t last = static_cast<int64_t>(p.tokens) * p.heads - 1;
    const int64_t global = min(w.first_row + min(group + half * 8, max(w.num_rows - 1, 0)), last);
    lse[half] = p.lse[global] * kLog2e;
    delta[half] = b.delta[global];
  }
  const float scale = p.scale * kLog2e;
  float acc[16][4] = {};
  load_chunk<kSelected, kCount>(p, w.tile, w.chunks, 0, buffers, thread);
  for (int index = 0; index < w.chunks.num_total; ++index) {
    const uint32_t current = kSelected ? buffers : buffers + (index & 1) * kTileBytes;
    if (!kSelected && index + 1 < w.chunks.num_total) {
      load_chunk<kSelected, kCount>(p, w.tile, w.chunks, index + 1,
                                    buffers + ((index + 1) & 1) * kTileBytes, thread);
      cuda::copy_async_wait<1>();
    } else {
      cuda::copy_async_wait<0>();
    }
    sync_tile<kSelected>();
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // 32 keys at a time keep the registers in bounds
      float s[4][4] = {}, dp[4][4] = {};
      cuda::product_rows<2>(s, q, current, part * 32, lane);
      cuda::product_rows<2>(dp, grad_out, current, part * 32, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int half = e >> 1;
          const bool seen = sees<kSelected>(p, w.chunks, index,
                                            part * 32 + n * 8 + pair * 2 + (e & 1), w.pos[half]);
          const float weight = seen ? exp2f(s[n][e] * scale - lse[half]) : 0.0f;
          s[n][e] = weight * (dp[n][e] - delta[half]) * p.scale;
        }
      }
      uint32_t ds[2][4];
      cuda::to_a<2>(ds, s);
      cuda::product_columns<2>(acc, ds, current, part * 32, lane);
    }
    sync_tile<kSelected>();
    if (kSelected && index + 1 < w.chunks.num_total) {
      load_chunk<kSelected, kCount>(p, w.tile, w.chunks, index + 1, buffers, thread);
    }
  }
  const float one[2] = {1.0f, 1.0f};
  store_rows(b.grad_q, w.first_row, w.num_rows, acc, one, lane);
}

/// Per query row of the tile under work: what a key needs to know of it.
struct QueryMeta {
  int pos[kTileRows];  // -1: no row
  float lse[kTileRows], delta[kTileRows];
  uint32_t selected[kTileRows][2];
};

__global__ void __launch_bounds__(kThreads) grad_kv_kernel(const SparseAttnBackwardParams b) {
  extern __shared__ __align__(128) char shared[];
  __shared__ QueryMeta meta[2];
  const SparseAttnParams& p = b.forward;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = lane >> 2, pair = lane & 3;
  const KeyTile tile = b.key_tiles[blockIdx.x];
  const int seq_begin = p.cu_seqlens[tile.seq], length = p.cu_seqlens[tile.seq + 1] - seq_begin;
  const bool is_block = tile.is_block != 0;
  const int num_keys = min(kTileRows, (is_block ? length / p.ratio : length) - tile.first_key);
  const uint32_t buffers = cuda::shared_address(shared);

  // Queries that may see a key of this tile: [first_pos, end_pos), as rows of [tokens * heads].
  const int first_pos = is_block ? (tile.first_key + 1) * p.ratio - 1 : tile.first_key;
  const int end_pos = is_block ? length : min(length, tile.first_key + kTileRows - 1 + p.window);
  const int64_t first_row = static_cast<int64_t>(seq_begin + first_pos) * p.heads;
  const int64_t end_row = static_cast<int64_t>(seq_begin + end_pos) * p.heads;
  const int num_steps = static_cast<int>((end_row - first_row + kTileRows - 1) / kTileRows);

  uint32_t keys[8][4];
  load_rows(is_block ? p.blocks : p.kv, tile.first_row + warp * 16,
            max(0, min(16, num_keys - warp * 16)), buffers, warp * 16, lane);
  cuda::copy_async_wait<0>();
  __syncthreads();
  cuda::load_a(keys, buffers, warp * 16, lane);
  __syncthreads();

  // Buffers: stage 0 and 1, each a tile of queries and one of output gradients.
  const auto load_step = [&](int step) {
    const int stage = step & 1;
    const int64_t row = first_row + static_cast<int64_t>(step) * kTileRows;
    const int64_t mine = row + warp * 16;
    const int count = static_cast<int>(max(int64_t{0}, min(int64_t{16}, end_row - mine)));
    const int64_t safe = min(mine, end_row - 1);
    load_rows(p.q, safe, count, buffers + (stage * 2) * kTileBytes, warp * 16, lane);
    load_rows(b.grad_out, safe, count, buffers + (stage * 2 + 1) * kTileBytes, warp * 16, lane);
    if (threadIdx.x < kTileRows) {
      const int64_t global = row + threadIdx.x;
      QueryMeta& m = meta[stage];
      const bool valid = global < end_row;
      const int token = static_cast<int>((valid ? global : first_row) / p.heads);
      m.pos[threadIdx.x] = valid ? token - seq_begin : -1;
      m.lse[threadIdx.x] = valid ? p.lse[global] * kLog2e : 0.0f;
      m.delta[threadIdx.x] = valid ? b.delta[global] : 0.0f;
      if (b.selected != nullptr && is_block) {
        const int word = tile.first_key >> 5;
        const uint32_t* bits = b.selected + static_cast<int64_t>(token) * b.mask_words;
        m.selected[threadIdx.x][0] = word < b.mask_words ? bits[word] : 0u;
        m.selected[threadIdx.x][1] = word + 1 < b.mask_words ? bits[word + 1] : 0u;
      } else {
        m.selected[threadIdx.x][0] = m.selected[threadIdx.x][1] = 0xffffffffu;
      }
    }
  };

  const float scale = p.scale * kLog2e;
  float acc[16][4] = {};
  if (num_steps > 0) load_step(0);
  for (int step = 0; step < num_steps; ++step) {
    if (step + 1 < num_steps) {
      load_step(step + 1);
      cuda::copy_async_wait<2>();
    } else {
      cuda::copy_async_wait<0>();
    }
    __syncthreads();
    const uint32_t q_tile = buffers + ((step & 1) * 2) * kTileBytes,
                   grad_tile = q_tile + kTileBytes;
    const QueryMeta& m = meta[step & 1];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float s[4][4] = {}, dp[4][4] = {};
      cuda::product_rows<2>(s, keys, q_tile, part * 32, lane);
      cuda::product_rows<2>(dp, keys, grad_tile, part * 32, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = part * 32 + n * 8 + pair * 2 + (e & 1);
          const int key_row = warp * 16 + group + (e >> 1) * 8, key = tile.first_key + key_row;
          const int pos = m.pos[column];
          bool seen = pos >= 0 && key_row < num_keys;
          if (is_block) {
            seen = seen && key < (pos + 1) / p.ratio &&
                   ((m.selected[column][key_row >> 5] >> (key & 31)) & 1u) != 0;
          } else {
            seen = seen && key <= pos && key > pos - p.window;
          }
          const float weight = seen ? exp2f(s[n][e] * scale - m.lse[column]) : 0.0f;
          s[n][e] = weight;
          dp[n][e] = weight * (dp[n][e] - m.delta[column]) * p.scale;
        }
      }
      uint32_t weights[2][4], ds[2][4];
      cuda::to_a<2>(weights, s);
      cuda::to_a<2>(ds, dp);
      cuda::product_columns<2>(acc, weights, grad_tile, part * 32, lane);
      cuda::product_columns<2>(acc, ds, q_tile, part * 32, lane);
    }
    __syncthreads();
  }
  const float one[2] = {1.0f, 1.0f};
  store_rows(is_block ? b.grad_blocks : b.grad_kv, tile.first_row + warp * 16,
             max(0, min(16, num_keys - warp * 16)), acc, one, lane);
}

template <typename Kernel>
void allow_shared(Kernel kernel, int bytes) {
  const cudaError_t status = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  HADAL_CHECK(status == cudaSuccess, "sparse_attn: shared memory of ", bytes,
              " bytes: ", cudaGetErrorString(status));
}

void launch_sparse_attn(const SparseAttnParams& p, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.selection != nullptr) {
    allow_shared(sparse_attn_kernel<true>, shared_bytes<true>());
    sparse_attn_kernel<true><<<(p.num_tiles + 3) / 4, kThreads, shared_bytes<true>(), s>>>(p);
  } else {
    allow_shared(sparse_attn_kernel<false>, shared_bytes<false>());
    sparse_attn_kernel<false><<<p.num_tiles, kThreads, shared_bytes<false>(), s>>>(p);
  }
  check_launch("sparse_attn");
}

void launch_sparse_attn_backward(const SparseAttnBackwardParams& b, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const SparseAttnParams& p = b.forward;
  const int64_t rows = static_cast<int64_t>(p.tokens) * p.heads;
  delta_kernel<<<static_cast<unsigned>((rows + 7) / 8), 256, 0, s>>>(b);
  if (p.selection != nullptr) {
    const int64_t words = static_cast<int64_t>(p.tokens) * b.mask_words;
    selected_bits_kernel<<<static_cast<unsigned>((words + 255) / 256), 256, 0, s>>>(
        p, const_cast<uint32_t*>(b.selected), b.mask_words);
    allow_shared(grad_q_kernel<true>, shared_bytes<true>());
    grad_q_kernel<true><<<(p.num_tiles + 3) / 4, kThreads, shared_bytes<true>(), s>>>(b);
  } else {
    allow_shared(grad_q_kernel<false>, shared_bytes<false>());
    grad_q_kernel<false><<<p.num_tiles, kThreads, shared_bytes<false>(), s>>>(b);
  }
  allow_shared(grad_kv_kernel, 4 * kTileBytes);
  grad_kv_kernel<<<b.num_key_tiles, kThreads, 4 * kTileBytes, s>>>(b);
  check_launch("sparse_attn backward");
}

const bool filled = sparse_attn_cuda.fill(launch_sparse_attn);
const bool filled_backward = sparse_attn_backward_cuda.fill(launch_sparse_attn_backward);

}  // namespace
}  // namespace hadal::ops
