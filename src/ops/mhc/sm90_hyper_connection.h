// Hyper-connections by the Hopper kernels, or their twins, with the bits of the CPU's.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/mhc/hyper_connection.h"

namespace hadal::ops {

/// Four streams whose widths the Hopper kernels take.
bool serves_hc_sm90(const at::Tensor& streams);

/// A kernel that reads a constant while the kernel before it still runs must be given the tensor
/// itself: a copy might be what that kernel makes.
bool reads_as_it_is(const at::Tensor& constant);

/// hc_pre, or the collapse (head), with the bits of run_pre_cpu.
HcPre hc_pre_on_sm90(const at::Tensor& streams_any,
                     const at::Tensor& fn,
                     const at::Tensor& base_any,
                     const at::Tensor& scale_any,
                     const HcParams& params,
                     bool head);

/// hc_pre and the norm behind it in one launch.
HcInput hc_pre_norm_on_sm90(const at::Tensor& streams_any,
                            const at::Tensor& fn,
                            const at::Tensor& base_any,
                            const at::Tensor& scale_any,
                            const HcParams& params,
                            const at::Tensor& norm,
                            Numerics numerics,
                            OperandKinds kinds,
                            SideBranch& comb_beside);

at::Tensor hc_post_on_sm90(const at::Tensor& out_any,
                           const at::Tensor& streams_any,
                           const at::Tensor& post_any,
                           const at::Tensor& comb_any);

}  // namespace hadal::ops
