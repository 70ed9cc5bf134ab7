// Scores of FP4 keys by E4M3 products: keys are operand A, decoded from their cache rows in
// registers; the heads of one token's query are operand B. One warp feeds a ring of pages, one
// warpgroup scores 64 keys at a time. A token's pages are shared among blocks.
#include <algorithm>

#include "ops/cuda/fp4.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/row_piece.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/gemm/sm90_layout.h"
#include "ops/indexer/index_scores_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kPageBytes = static_cast<int>(kIndexPageRows * kIndexRowBytes);
constexpr int kStages = 6;

/// Shared memory: the query as operand B, then pages.
template <int kHeads>
struct Memory {
  alignas(1024) uint8_t q[kHeads * 128];
  alignas(128) uint8_t pages[kStages][kPageBytes];
  uint64_t full[kStages], empty[kStages];
  uint2 table[16];
  float q_scale[kHeads];  ///< of a head's chains
  float w[kHeads];
  uint32_t scaled_w[kHeads / 2];  ///< w times q_scale of two heads, BF16
  uint32_t q_wide[kHeads];
  uint32_t plain;  ///< every head allows the short way (see score_rows)
};

/// Base and exponents of a row: exponent i of the fold lies in bits 4 i of `exponents`.
struct Fold {
  uint32_t exponents;
  float scale;
  bool wide;
  bool plain;  ///< not wide, and scaling by it neither rounds nor overflows
};

/// Exponents within which products of three factors are normal numbers.
__device__ __forceinline__ bool moderate(uint32_t exponent_field) {
  return exponent_field >= 127 - 36 && exponent_field <= 127 + 36;
}

/// `scales`: four E8M0 bytes; `used`: bit i is set where group i holds a value that is not zero.
__device__ __forceinline__ Fold fold_of(uint32_t scales, uint32_t used) {
  uint32_t base = 0, least = 255;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t of_group = scales >> (8 * i) & 255;
    if (used >> i & 1) base = max(base, of_group), least = min(least, of_group);
  }
  if (base == 0) base = least = 127;
  // 2^(base - 127 - 6), a subnormal number where the base is tiny
  const uint32_t scale = base > 6 ? (base - 6) << 23 : 1u << (base + 16);
  const bool wide = base - least > sm90::kMaxSpread;
  Fold fold = {0, __uint_as_float(scale), wide, !wide && moderate(base)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int exponent = 14 + static_cast<int>(scales >> (8 * i) & 255) - static_cast<int>(base);
    fold.exponents |= static_cast<uint32_t>(used >> i & 1 ? max(exponent, 0) : 14) << (4 * i);
  }
  return fold;
}

/// Value i of a cache row.
__device__ float element(const uint8_t* row, int i) {
  constexpr float kValues[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const int code = row[i / 2] >> (i % 2 * 4) & 15;
  const float value = ldexpf(kValues[code & 7], row[64 + i / 32] - 127);
  return code & 8 ? -value : value;
}

/// The dot of rows of which one is wide.
__device__ __noinline__ float wide_dot(const uint8_t* q, const uint8_t* key) {
  float sum = 0.0f;
  for (int i = 0; i < kIndexDim; ++i) sum = fmaf(element(q, i), element(key, i), sum);
  return sum;
}

/// The query's rows to operand B. Position j of a k step holds the input that the thread of A's
/// position j reads: 8 (j / 4) + j % 4 in the first half, 4 more in the second.
/// Heads from `heads` on are zero.
template <int kHeads>
__device__ void load_query(Memory<kHeads>& m, const uint8_t* q, const uint16_t* w, int heads) {
  for (int head = static_cast<int>(threadIdx.x); head < kHeads; head += kWarpgroup) {
    if (head >= heads) {
      for (int64_t at = 0; at < kIndexDim; at += 4)
        *reinterpret_cast<uint32_t*>(m.q + sm90::operand_offset(head, at, kHeads / 8)) = 0;
      m.q_scale[head] = m.w[head] = 0.0f;
      m.q_wide[head] = 0;
      reinterpret_cast<__nv_bfloat16*>(m.scaled_w)[head] = __float2bfloat16_rn(0.0f);
      continue;
    }
    const auto* words = reinterpret_cast<const uint32_t*>(q + head * kIndexRowBytes);
    uint32_t used = 0;
    for (int i = 0; i < 16; ++i) used |= (words[i] & 0x77777777u) != 0 ? 1u << (i / 4) : 0;
    const Fold fold = fold_of(words[16], used);
    for (int i = 0; i < 16; ++i) {
      uint32_t first, second;
      decode_fp4_row(words[i], m.table[fold.exponents >> (i / 4 * 4) & 15], first, second);
      const int64_t at = i / 4 * 32 + i % 4 * 4;
      *reinterpret_cast<uint32_t*>(m.q + sm90::operand_offset(head, at, kHeads / 8)) = first;
      *reinterpret_cast<uint32_t*>(m.q + sm90::operand_offset(head, at + 16, kHeads / 8)) = second;
    }
    m.q_scale[head] = fold.scale;
    m.q_wide[head] = fold.wide;
    const uint32_t bits = w[head];
    m.w[head] = __uint_as_float(bits << 16);
    reinterpret_cast<__nv_bfloat16*>(m.scaled_w)[head] =
        __float2bfloat16_rn(m.w[head] * fold.scale);
    if (!fold.plain || !(moderate(bits >> 7 & 255) || (bits & 0x7fff) == 0)) m.plain = 0;
  }
}

/// The sum over the thread's heads of one row where all scales are moderate: powers of two commute
/// with rounding, so the dots are rounded as they are, and the sum has yet to be multiplied by the
/// key's.
template <int kHeads>
__device__ __forceinline__ float2 plain_sums(const Memory<kHeads>& m,
                                             const float (&d)[kHeads / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
  const __nv_bfloat162 zero = __float2bfloat162_rn(0.0f);
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kHeads / 2; i += 4) {
    const __nv_bfloat162 w = reinterpret_cast<const __nv_bfloat162*>(m.scaled_w)[i + lane];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __nv_bfloat162 dots = __floats2bfloat162_rn(d[i + half * 2], d[i + half * 2 + 1]);
      const __nv_bfloat162 products = __hmul2_rn(__hmax2(dots, zero), w);
      const auto bits = *reinterpret_cast<const uint32_t*>(&products);
      sum[half] += __uint_as_float(bits << 16);
      sum[half] += __uint_as_float(bits & 0xffff0000u);
    }
  }
  return make_float2(sum[0], sum[1]);
}

/// The same in general: dots scaled and rounded one by one, wide ones computed anew. Unrolled,
/// since an index into the accumulators would move them to memory on the short way, too.
template <int kHeads>
__device__ __forceinline__ float2 general_sums(const Memory<kHeads>& m,
                                               const float (&d)[kHeads / 2],
                                               const Fold (&fold)[2],
                                               const uint8_t* row,
                                               const uint8_t* q,
                                               int heads) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) {
    const int half = i / 2 % 2, head = i / 4 * 8 + lane * 2 + (i & 1);
    float dot = d[i] * fold[half].scale * m.q_scale[head];
    if ((fold[half].wide || m.q_wide[head] != 0) && head < heads)
      dot = wide_dot(q + head * kIndexRowBytes, row + half * 8 * kIndexRowBytes);
    sum[half] += round_to<__nv_bfloat16>(fmaxf(round_to<__nv_bfloat16>(dot), 0.0f) * m.w[head]);
  }
  return make_float2(sum[0], sum[1]);
}

/// Scores of the thread's two rows (16 * warp + lane / 4, and 8 below) of a page.
template <int kHeads>
__device__ __forceinline__ float2
score_rows(const Memory<kHeads>& m, const uint8_t* page, const uint8_t* q, int heads) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 4;
  const uint8_t* rows[2] = {page + (t / 32 * 16 + t % 32 / 4) * kIndexRowBytes, nullptr};
  rows[1] = rows[0] + 8 * kIndexRowBytes;
  uint32_t words[2][4], used = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      words[half][step] = *reinterpret_cast<const uint32_t*>(rows[half] + step * 16 + lane * 4);
      used |= (words[half][step] & 0x77777777u) != 0 ? 1u << (half * 4 + step) : 0;
    }
  }
  used |= __shfl_xor_sync(0xffffffffu, used, 1);
  used |= __shfl_xor_sync(0xffffffffu, used, 2);
  Fold fold[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    fold[half] = fold_of(*reinterpret_cast<const uint32_t*>(rows[half] + 64), used >> (4 * half));
  uint32_t a[4][4];
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      decode_fp4_row(words[half][step], m.table[fold[half].exponents >> (4 * step) & 15],
                     a[step][half], a[step][half + 2]);
    }
  }
  float d[kHeads / 2];
  keep(d);
  wgmma_fence();
  const uint64_t b = operand_descriptor(smem_address(m.q));
#pragma unroll
  for (int step = 0; step < 4; ++step) Wgmma<kHeads>::e4m3(d, a[step], b + step * 2, step > 0);
  wgmma_commit();
  wgmma_wait<0>();
  keep(d);
  float2 sums;
  if (__all_sync(0xffffffffu, m.plain != 0 && fold[0].plain && fold[1].plain)) {
    sums = plain_sums<kHeads>(m, d);
    sums.x *= fold[0].scale;
    sums.y *= fold[1].scale;
  } else {
    sums = general_sums<kHeads>(m, d, fold, rows[0], q, heads);
  }
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    sums.x += __shfl_xor_sync(0xffffffffu, sums.x, step);
    sums.y += __shfl_xor_sync(0xffffffffu, sums.y, step);
  }
  return sums;
}

template <int kHeads>
__global__ void __launch_bounds__(kWarpgroup + 32)
    index_scores_kernel(const __grid_constant__ IndexScoresSm90Params p, int blocks) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& m = *reinterpret_cast<Memory<kHeads>*>(raw);
  if (threadIdx.x < 16) m.table[threadIdx.x] = fp4_codes(min(static_cast<int>(threadIdx.x), 14));
  if (threadIdx.x == 0) {
    m.plain = 1;
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&m.full[i], 1);
      barrier_init(&m.empty[i], kWarpgroup);
    }
    barrier_init_done();
  }
  __syncthreads();
  wait_for_previous();
  launch_dependents();
  const auto [token, piece] = row_piece(blocks);
  const int64_t visible = p.visible[token];
  const auto pages = static_cast<int>((visible + kIndexPageRows - 1) / kIndexPageRows);
  if (threadIdx.x >= kWarpgroup) {
    if (threadIdx.x != kWarpgroup) return;
    const int32_t* table = p.pages + p.sequence[token] * p.max_pages;
    uint32_t stage = 0, parity = 1;
    for (int page = static_cast<int>(piece); page < pages; page += blocks) {
      barrier_wait(&m.empty[stage], parity);
      // The last page may end before its 64 rows do; what lies behind is never used.
      barrier_arrive_expect(&m.full[stage], kPageBytes);
      bulk_copy(m.pages[stage], p.keys + static_cast<int64_t>(table[page]) * kPageBytes, kPageBytes,
                &m.full[stage]);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      parity ^= stage == 0;
    }
    return;
  }
  const auto heads = static_cast<int>(p.heads);
  const uint8_t* q = p.q + token * p.heads * kIndexRowBytes;
  load_query<kHeads>(m, q, p.w + token * p.heads, heads);
  // wgmma reads what plain stores wrote.
  asm volatile("fence.proxy.async.shared::cta;\nbar.sync 1, 128;" ::: "memory");
  const int t = static_cast<int>(threadIdx.x);
  uint32_t stage = 0, parity = 0;
  for (int page = static_cast<int>(piece); page < pages; page += blocks) {
    barrier_wait(&m.full[stage], parity);
    const float2 sums = score_rows<kHeads>(m, m.pages[stage], q, heads);
    barrier_arrive(&m.empty[stage]);
    if (t % 4 == 0) {
      const int64_t block = page * kIndexPageRows + t / 32 * 16 + t % 32 / 4;
      auto* scores = reinterpret_cast<__nv_bfloat16*>(p.scores) + token * p.stride;
      if (block < visible) scores[block] = __float2bfloat16_rn(sums.x);
      if (block + 8 < visible) scores[block + 8] = __float2bfloat16_rn(sums.y);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
}

template <int kHeads>
void launch(const IndexScoresSm90Params& p, Stream stream) {
  auto* kernel = index_scores_kernel<kHeads>;
  constexpr int kBytes = sizeof(Memory<kHeads>);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  // Some blocks for each of the card's 132 processors, shared by the tokens.
  const int64_t blocks = std::min((132 * 4 + p.tokens - 1) / p.tokens, p.max_pages);
  launch_early(kernel, {blocks_for(p.tokens * blocks, 1), kWarpgroup + 32, kBytes}, stream,
               "index_scores_sm90", p, static_cast<int>(blocks));
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void index_scores_sm90(const IndexScoresSm90Params& p, Stream stream) {
  if (p.tokens == 0 || p.max_pages == 0) return;
  if (!serves_index_heads(p.heads)) throw_kernel_error("index_scores_sm90", "at most 64 heads");
  if (p.heads <= 8) return cuda::launch<8>(p, stream);
  if (p.heads <= 16) return cuda::launch<16>(p, stream);
  if (p.heads <= 32) return cuda::launch<32>(p, stream);
  cuda::launch<64>(p, stream);
}

}  // namespace hadal::ops
