#include "ops/compressor/compress_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

/// y = sum_j softmax_j(score) * kv per channel, candidates in ascending position.
void compress_blocks(const CompressCpuParams& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const float* const* kv = p.kv + block * p.candidates;
    const float* const* score = p.score + block * p.candidates;
    float* out = p.pooled + block * p.d;
    cpu::for_lanes(p.d, [&](int64_t i, int64_t n) {
      F16 highest = cpu::splat(-3.402823466e38f);
      for (int64_t j = 0; j < p.candidates; ++j) {
        if (score[j] != nullptr) highest = cpu::max(cpu::load_n(score[j] + i, n), highest);
      }
      F16 total = cpu::splat(0.0f), sum = cpu::splat(0.0f);
      for (int64_t j = 0; j < p.candidates; ++j) {
        if (score[j] == nullptr) continue;
        const F16 weight = cpu::exp(cpu::load_n(score[j] + i, n) - highest);
        total = total + weight;
        sum = cpu::fma(weight, cpu::load_n(kv[j] + i, n), sum);
      }
      cpu::store_n(out + i, sum / total, n);
    });
  }
}

const bool filled = compress_cpu.fill(cpu::kIsa, compress_blocks);

}  // namespace
}  // namespace hadal::ops
