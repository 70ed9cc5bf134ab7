#include "ops/mhc/hyper_connection_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

constexpr int64_t kMaxRows = (2 + kHcMaxStreams) * kHcMaxStreams;
constexpr int64_t kTokenBlock = 4;  // tokens that share one pass over fn

/// z[t][o] = (fn[o] . v_t) * rho_t for up to kTokenBlock tokens; each token's sums are its own,
/// whatever the block.
template <typename T>
void mixing_logits(const HcPreCpuParams& p,
                   const T* streams,
                   int64_t tokens,
                   int64_t rows,
                   float (&z)[kTokenBlock][kMaxRows]) {
  const int64_t width = p.n * p.dim;
  float rho[kTokenBlock];
  for (int64_t t = 0; t < tokens; ++t) {
    const float mean =
        cpu::dot(streams + t * width, streams + t * width, width) / static_cast<float>(width);
    rho[t] = 1.0f / __builtin_sqrtf(mean + p.norm_eps);
  }
  for (int64_t o = 0; o < rows; ++o) {
    const float* weights = p.fn + o * width;
    F16 acc[kTokenBlock] = {cpu::splat(0.0f), cpu::splat(0.0f), cpu::splat(0.0f), cpu::splat(0.0f)};
    cpu::for_lanes(width, [&](int64_t i, int64_t n) {
      const F16 w = cpu::load_n(weights + i, n);
      for (int64_t t = 0; t < tokens; ++t) {
        acc[t] = cpu::fma(cpu::load_n(streams + t * width + i, n), w, acc[t]);
      }
    });
    for (int64_t t = 0; t < tokens; ++t) z[t][o] = cpu::sum(acc[t]) * rho[t];
  }
}

/// P = softmax over k + eps; columns; then iters - 1 times rows and columns (reference: sinkhorn).
void sinkhorn(float* p, int64_t n, int64_t iters, float eps) {
  for (int64_t j = 0; j < n; ++j) {
    float* row = p + j * n;
    float highest = row[0];
    for (int64_t k = 1; k < n; ++k) highest = row[k] > highest ? row[k] : highest;
    float lanes[16] = {};
    for (int64_t k = 0; k < n; ++k) lanes[k] = row[k] - highest;
    cpu::to_array(lanes, cpu::exp(cpu::load(lanes)));
    float total = lanes[0];
    for (int64_t k = 1; k < n; ++k) total = total + lanes[k];
    for (int64_t k = 0; k < n; ++k) row[k] = lanes[k] / total + eps;
  }
  const auto normalise = [&](int64_t step, int64_t next) {
    for (int64_t j = 0; j < n; ++j) {
      float* line = p + j * next;
      float total = line[0];
      for (int64_t k = 1; k < n; ++k) total = total + line[k * step];
      total = total + eps;
      for (int64_t k = 0; k < n; ++k) line[k * step] = line[k * step] / total;
    }
  };
  normalise(n, 1);
  for (int64_t i = 1; i < iters; ++i) {
    normalise(1, n);
    normalise(n, 1);
  }
}

template <typename T>
void mix_token(const HcPreCpuParams& p, int64_t token, const float* z) {
  const int64_t n = p.n;
  float lanes[16] = {}, pre[kHcMaxStreams];
  for (int64_t j = 0; j < n; ++j) lanes[j] = z[j] * p.scale[0] + p.base[j];
  cpu::to_array(lanes, cpu::sigmoid(cpu::load(lanes)));
  for (int64_t j = 0; j < n; ++j) pre[j] = lanes[j] + p.hc_eps;
  if (!p.head) {
    for (int64_t j = 0; j < n; ++j) lanes[j] = z[n + j] * p.scale[1] + p.base[n + j];
    cpu::to_array(lanes, cpu::sigmoid(cpu::load(lanes)));
    for (int64_t j = 0; j < n; ++j) p.post[token * n + j] = 2.0f * lanes[j];
    float* comb = p.comb + token * n * n;
    for (int64_t i = 0; i < n * n; ++i) comb[i] = z[2 * n + i] * p.scale[2] + p.base[2 * n + i];
    sinkhorn(comb, n, p.sinkhorn_iters, p.hc_eps);
  }
  const T* streams = static_cast<const T*>(p.streams) + token * n * p.dim;
  T* mixed = static_cast<T*>(p.mixed) + token * p.dim;
  cpu::for_lanes(p.dim, [&](int64_t i, int64_t count) {
    F16 sum = cpu::splat(pre[0]) * cpu::load_n(streams + i, count);
    for (int64_t j = 1; j < n; ++j) {
      sum = cpu::fma(cpu::splat(pre[j]), cpu::load_n(streams + j * p.dim + i, count), sum);
    }
    cpu::store_n(mixed + i, sum, count);
  });
}

template <typename T>
void pre_tokens(const HcPreCpuParams& p, int64_t begin, int64_t end) {
  const int64_t rows = p.head ? p.n : (2 + p.n) * p.n;
  float z[kTokenBlock][kMaxRows];
  for (int64_t first = begin; first < end; first += kTokenBlock) {
    const int64_t tokens = end - first < kTokenBlock ? end - first : kTokenBlock;
    mixing_logits(p, static_cast<const T*>(p.streams) + first * p.n * p.dim, tokens, rows, z);
    for (int64_t t = 0; t < tokens; ++t) mix_token<T>(p, first + t, z[t]);
  }
}

/// new[k] = post[k] * out + sum_j comb[j, k] * streams[j]
template <typename T>
void post_tokens(const HcPostCpuParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const T* out = static_cast<const T*>(p.out) + token * p.dim;
    const T* streams = static_cast<const T*>(p.streams) + token * p.n * p.dim;
    T* result = static_cast<T*>(p.result) + token * p.n * p.dim;
    const float* post = p.post + token * p.n;
    const float* comb = p.comb + token * p.n * p.n;
    cpu::for_lanes(p.dim, [&](int64_t i, int64_t count) {
      F16 old[kHcMaxStreams];
      for (int64_t j = 0; j < p.n; ++j) old[j] = cpu::load_n(streams + j * p.dim + i, count);
      const F16 f = cpu::load_n(out + i, count);
      for (int64_t k = 0; k < p.n; ++k) {
        F16 carried = cpu::splat(comb[k]) * old[0];
        for (int64_t j = 1; j < p.n; ++j)
          carried = cpu::fma(cpu::splat(comb[j * p.n + k]), old[j], carried);
        cpu::store_n(result + k * p.dim + i, cpu::fma(cpu::splat(post[k]), f, carried), count);
      }
    });
  }
}

void hc_pre_tokens(const HcPreCpuParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) {
    pre_tokens<float>(p, begin, end);
  } else {
    pre_tokens<uint16_t>(p, begin, end);
  }
}

void hc_post_tokens(const HcPostCpuParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) {
    post_tokens<float>(p, begin, end);
  } else {
    post_tokens<uint16_t>(p, begin, end);
  }
}

const bool filled_pre = hc_pre_cpu.fill(cpu::kIsa, hc_pre_tokens);
const bool filled_post = hc_post_cpu.fill(cpu::kIsa, hc_post_tokens);

}  // namespace
}  // namespace hadal::ops
