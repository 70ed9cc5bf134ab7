// The kernels have the bits of the CPU's.
#include "base/parallel.h"
#include "ops/mhc/hyper_connection_cpu.h"
#include "ops/mhc/hyper_connection_sm90.h"

namespace hadal::ops {

void hc_pre_twin(const HcPreSm90Params& p) {
  const HcPreCpuParams params{.streams = p.streams,
                              .fn = p.fn,
                              .base = p.base,
                              .scale = p.scale,
                              .mixed = p.mixed,
                              .post = p.post,
                              .comb = p.comb,
                              .n = 4,
                              .dim = p.dim,
                              .sinkhorn_iters = p.sinkhorn_iters,
                              .norm_eps = p.norm_eps,
                              .hc_eps = p.hc_eps,
                              .dtype = ElementType::kBf16,
                              .head = p.head};
  parallel_for(p.tokens, 4, [&](int64_t begin, int64_t end) { hc_pre_cpu(params, begin, end); });
}

void hc_post_twin(const HcPostSm90Params& p) {
  const HcPostCpuParams params{.out = p.out,
                               .streams = p.streams,
                               .post = p.post,
                               .comb = p.comb,
                               .result = p.result,
                               .n = 4,
                               .dim = p.dim,
                               .dtype = ElementType::kBf16};
  parallel_for(p.tokens, 8, [&](int64_t begin, int64_t end) { hc_post_cpu(params, begin, end); });
}

}  // namespace hadal::ops
