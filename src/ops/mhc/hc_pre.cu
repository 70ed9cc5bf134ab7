// hc_pre forward and backward for four streams. v is a token's streams laid end to end, 4 dim long.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/mhc/hc_math.h"
#include "ops/mhc/hyper_connection_kernels.h"

namespace hadal::ops {
namespace {

using cuda::as_stream;
using cuda::axpy4;
using cuda::blocks_for;
using cuda::check_launch;
using cuda::dot4;
using cuda::load4;
using cuda::store4;
using cuda::warp_sum;
using hc::kCells;
using hc::kRows;
using hc::kStreams;

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kChunk = 128;         // channels of v staged at a time
constexpr int kPitch = kChunk + 4;  // floats; shifts neighbouring rows to other banks
constexpr int kTokens = 32;         // tokens of a block, forward
constexpr int kSums = kRows + 3;    // d_base and d_scale
constexpr int kFactors = kStreams + 1;
constexpr int kBackwardTokens = 64;  // tokens of a block, streams' gradient

__device__ inline float4 zero4() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }

/// Channels [first, first + kChunk) of all rows of fn; zeros beyond the width.
__device__ inline void stage_fn(const float* fn,
                                int64_t width,
                                int64_t first,
                                float (*tile)[kPitch]) {
  for (int i = threadIdx.x; i < kRows * kChunk / 4; i += kThreads) {
    const int row = i / (kChunk / 4), c = i % (kChunk / 4) * 4;
    store4(&tile[row][c], first + c < width ? load4(fn + row * width + first + c) : zero4());
  }
}

struct ForwardTiles {
  float v[kTokens][kPitch];
  float fn[kRows][kPitch];
};

/// z and rho of 32 tokens. The dots are a product [32, 4 dim] x [4 dim, 24]: a warp takes 16 of the
/// 128 staged channels, a lane 4 tokens and 6 rows of them; warps add up in order at the end.
template <typename T>
__device__ void block_logits(
    const HcPreParams& p, int64_t first_token, ForwardTiles& tiles, float (*z)[kRows], float* rho) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token_group = lane % 8, row_group = lane / 8;
  const int64_t width = kStreams * p.dim;
  // Staging: eight threads per token.
  const int staged = threadIdx.x / 8, part = threadIdx.x % 8;
  const bool live = first_token + staged < p.tokens;
  const T* v = static_cast<const T*>(p.streams) + (first_token + staged) * width;
  float squares = 0.0f, acc[4][6] = {};
  for (int64_t first = 0; first < width; first += kChunk) {
    for (int i = 0; i < 4; ++i) {
      const int c = (i * 8 + part) * 4;
      const float4 x = live && first + c < width ? load4(v + first + c) : zero4();
      squares = dot4(x, x, squares);
      store4(&tiles.v[staged][c], x);
    }
    stage_fn(p.fn, width, first, tiles.fn);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int c = warp * 16 + step * 4;
      float4 x[4];
      for (int t = 0; t < 4; ++t) x[t] = load4(&tiles.v[token_group + 8 * t][c]);
      for (int r = 0; r < 6; ++r) {
        const float4 w = load4(&tiles.fn[row_group + 4 * r][c]);
        for (int t = 0; t < 4; ++t) acc[t][r] = dot4(x[t], w, acc[t][r]);
      }
    }
    __syncthreads();
  }
  for (int offset = 4; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  if (part == 0) rho[staged] = rsqrtf(squares / static_cast<float>(width) + p.norm_eps);
  static_assert(sizeof(ForwardTiles) >= sizeof(float) * kWarps * kTokens * kRows);
  float* partial = reinterpret_cast<float*>(&tiles);  // [warp][token][row]
  for (int t = 0; t < 4; ++t) {
    for (int r = 0; r < 6; ++r) {
      partial[(warp * kTokens + token_group + 8 * t) * kRows + row_group + 4 * r] = acc[t][r];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kRows; i += kThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += partial[w * kTokens * kRows + i];
    z[i / kRows][i % kRows] = sum * rho[i / kRows];
  }
  __syncthreads();
}

/// z, rho and mixed = sum_j a_j X_j.
template <typename T>
__global__ void __launch_bounds__(kThreads) mix(HcPreParams p) {
  __shared__ __align__(16) ForwardTiles tiles;
  __shared__ float z[kTokens][kRows], rho[kTokens];
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  block_logits<T>(p, first_token, tiles, z, rho);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int t = warp; t < kTokens && first_token + t < p.tokens; t += kWarps) {
    const int64_t token = first_token + t;
    if (lane < kRows) p.z[token * kRows + lane] = z[t][lane];
    if (lane == 0) p.rho[token] = rho[t];
    float pre[kStreams];
    for (int j = 0; j < kStreams; ++j) {
      pre[j] = hc::logistic(z[t][j] * p.scale[0] + p.base[j]) + p.hc_eps;
    }
    const T* v = static_cast<const T*>(p.streams) + token * kStreams * p.dim;
    T* mixed = static_cast<T*>(p.mixed) + token * p.dim;
    for (int64_t c = lane * 4; c < p.dim; c += 128) {
      float4 sum = zero4();
      for (int j = 0; j < kStreams; ++j) sum = axpy4(pre[j], load4(v + j * p.dim + c), sum);
      store4(mixed + c, sum);
    }
  }
}

template <typename Params>
__device__ hc::GateInput<float> gate_input(const Params& p, int64_t token) {
  hc::GateInput<float> in;
  for (int o = 0; o < kRows; o += 4) {
    const float4 z = load4(p.z + token * kRows + o);
    in.z[o] = z.x, in.z[o + 1] = z.y, in.z[o + 2] = z.z, in.z[o + 3] = z.w;
  }
  for (int o = 0; o < kRows; ++o) in.base[o] = p.base[o];
  for (int s = 0; s < 3; ++s) in.scale[s] = p.scale[s];
  in.eps = p.hc_eps;
  in.iters = p.iters;
  return in;
}

/// post and P, one thread per token.
__global__ void __launch_bounds__(128) gates(HcPreParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token >= p.tokens) return;
  float post[kStreams], comb[kCells];
  hc::post_and_comb(gate_input(p, token), post, comb);
  store4(p.post + token * kStreams, make_float4(post[0], post[1], post[2], post[3]));
  for (int i = 0; i < kCells; i += 4) {
    store4(p.comb + token * kCells + i,
           make_float4(comb[i], comb[i + 1], comb[i + 2], comb[i + 3]));
  }
}

/// token_factors[j] = d_mixed . X_j, one warp per token.
template <typename T>
__global__ void __launch_bounds__(kThreads) collapse_gradients(HcPreBackwardParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (token >= p.tokens) return;
  const T* v = static_cast<const T*>(p.streams) + token * kStreams * p.dim;
  const T* d_mixed = static_cast<const T*>(p.d_mixed) + token * p.dim;
  float sums[kStreams] = {};
  for (int64_t c = lane * 4; c < p.dim; c += 128) {
    const float4 d = load4(d_mixed + c);
    for (int j = 0; j < kStreams; ++j) sums[j] = dot4(d, load4(v + j * p.dim + c), sums[j]);
  }
  for (int j = 0; j < kStreams; ++j) {
    const float sum = warp_sum(sums[j]);
    if (lane == 0) p.token_factors[token * kFactors + j] = sum;
  }
}

/// One thread per token: dz_rho and token_factors; per block a line of parts, d_base and d_scale.
__global__ void __launch_bounds__(128) gate_gradients(HcPreBackwardParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float totals[kSums] = {};
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       token < p.tokens; token += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const hc::GateInput<float> in = gate_input(p, token);
    float d_pre[kStreams], d_post[kStreams], d_comb[kCells], d_logit[kRows], dz_rho[kRows], factor;
    for (int j = 0; j < kStreams; ++j) {
      d_pre[j] = p.token_factors[token * kFactors + j];
      d_post[j] = p.d_post[token * kStreams + j];
    }
    for (int i = 0; i < kCells; ++i) d_comb[i] = p.d_comb[token * kCells + i];
    hc::gates_backward(in, d_pre, d_post, d_comb, d_logit);
    hc::logits_backward(in, p.rho[token], static_cast<float>(kStreams * p.dim), d_logit, dz_rho,
                        factor);
    for (int o = 0; o < kRows; ++o) {
      p.dz_rho[token * kRows + o] = dz_rho[o];
      totals[o] += d_logit[o];
      totals[kRows + hc::scale_index(o)] += d_logit[o] * in.z[o];
    }
    for (int j = 0; j < kStreams; ++j) {
      p.token_factors[token * kFactors + j] = hc::logistic(hc::logit(in, j)) + p.hc_eps;
    }
    p.token_factors[token * kFactors + kStreams] = factor;
  }
  __shared__ float by_warp[4][kSums];
  for (int i = 0; i < kSums; ++i) {
    const float sum = warp_sum(totals[i]);
    if (lane == 0) by_warp[warp][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    const int i = threadIdx.x;
    p.parts[static_cast<int64_t>(blockIdx.x) * kSums + i] =
        (by_warp[0][i] + by_warp[1][i]) + (by_warp[2][i] + by_warp[3][i]);
  }
}

/// Sums of the parts, one warp per column, in an order that depends on their number only.
__global__ void sum_columns(HcPreBackwardParams p) {
  const int column = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0.0f;
  for (int64_t i = lane; i < p.num_parts; i += 32) sum += p.parts[i * kSums + column];
  sum = warp_sum(sum);
  if (lane == 0) p.d_base_d_scale[column] = sum;
}

/// dv = a_j d_mixed + sum_o dz_rho[o] fn[o] - factor v for 64 tokens and 128 channels: a warp takes
/// 8 tokens, a lane 4 channels.
template <typename T>
__global__ void __launch_bounds__(kThreads) stream_gradients(HcPreBackwardParams p) {
  __shared__ __align__(16) float fn[kRows][kPitch];
  __shared__ __align__(16) float dz_rho[kRows][kBackwardTokens + 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t width = kStreams * p.dim, first = static_cast<int64_t>(blockIdx.y) * kChunk;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kBackwardTokens;
  stage_fn(p.fn, width, first, fn);
  for (int i = threadIdx.x; i < kRows * kBackwardTokens; i += kThreads) {
    const int t = i / kRows, o = i % kRows;
    dz_rho[o][t] = first_token + t < p.tokens ? p.dz_rho[first_token * kRows + i] : 0.0f;
  }
  __syncthreads();
  float4 acc[8];
  for (int t = 0; t < 8; ++t) acc[t] = zero4();
#pragma unroll 4
  for (int o = 0; o < kRows; ++o) {
    const float4 w = load4(&fn[o][lane * 4]);
    const float4 a = load4(&dz_rho[o][warp * 8]), b = load4(&dz_rho[o][warp * 8 + 4]);
    const float dz[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    for (int t = 0; t < 8; ++t) acc[t] = axpy4(dz[t], w, acc[t]);
  }
  const int64_t c = first + lane * 4;
  if (c >= width) return;
  const int64_t stream = c / p.dim, channel = c % p.dim;
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const int64_t token = first_token + warp * 8 + t;
    if (token >= p.tokens) break;
    const float* factors = p.token_factors + token * kFactors;
    const float4 v = load4(static_cast<const T*>(p.streams) + token * width + c);
    const float4 d = load4(static_cast<const T*>(p.d_mixed) + token * p.dim + channel);
    const float4 sum = axpy4(-factors[kStreams], v, axpy4(factors[stream], d, acc[t]));
    store4(static_cast<T*>(p.d_streams) + token * width + c, sum);
  }
}

template <typename T>
void launch_forward(const HcPreParams& p, cudaStream_t stream) {
  mix<T><<<blocks_for(p.tokens, kTokens), kThreads, 0, stream>>>(p);
  check_launch("hc_pre");
  gates<<<blocks_for(p.tokens, 128), 128, 0, stream>>>(p);
  check_launch("hc_pre gates");
}

template <typename T>
void launch_backward(const HcPreBackwardParams& p, cudaStream_t stream) {
  collapse_gradients<T><<<blocks_for(p.tokens, kWarps), kThreads, 0, stream>>>(p);
  check_launch("hc_pre collapse gradients");
  gate_gradients<<<static_cast<unsigned>(p.num_parts), 128, 0, stream>>>(p);
  check_launch("hc_pre gate gradients");
  sum_columns<<<1, kSums * 32, 0, stream>>>(p);
  check_launch("hc_pre sums");
  const dim3 grid(blocks_for(p.tokens, kBackwardTokens), blocks_for(kStreams * p.dim, kChunk));
  stream_gradients<T><<<grid, kThreads, 0, stream>>>(p);
  check_launch("hc_pre stream gradients");
}

void launch(const HcPreParams& p, Stream stream) {
  p.type == ElementType::kBf16 ? launch_forward<__nv_bfloat16>(p, as_stream(stream))
                               : launch_forward<float>(p, as_stream(stream));
}
void launch_grad(const HcPreBackwardParams& p, Stream stream) {
  p.type == ElementType::kBf16 ? launch_backward<__nv_bfloat16>(p, as_stream(stream))
                               : launch_backward<float>(p, as_stream(stream));
}

const bool filled = hc_pre_cuda.fill(launch) && hc_pre_backward_cuda.fill(launch_grad);

}  // namespace
}  // namespace hadal::ops
