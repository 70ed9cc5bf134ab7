// The kernel has the bits of the CPU's.
#include <algorithm>

#include "base/parallel.h"
#include "ops/norm/rms_norm_cpu.h"
#include "ops/norm/rms_norm_sm90.h"

namespace hadal::ops {

void rms_norm_twin(const RmsNormSm90Params& p) {
  const RmsNormCpuParams params{.x = p.x,
                                .weight = p.weight,
                                .out = p.out,
                                .dim = p.dim,
                                .eps = p.eps,
                                .dtype = ElementType::kBf16,
                                .bf16_chain = p.bf16_chain};
  parallel_for(p.rows, std::max<int64_t>(1, 16384 / p.dim),
               [&](int64_t begin, int64_t end) { rms_norm_cpu(params, begin, end); });
}

}  // namespace hadal::ops
