// Hyper-connections on Hopper with the bits of the CPU kernels (hyper_connection_cpu.h), as
// functions of pointers; four streams, BF16. Free of ATen.
#pragma once

#include "ops/gemm/normalised_sm90.h"
#include "ops/kernel_types.h"

namespace hadal::ops {

struct HcPreSm90Params {
  const void* streams;  ///< [tokens, 4, dim] BF16
  const float* fn;      ///< [24, 4 dim], or [4, 4 dim] for the head
  const float* base;    ///< [24] or [4]
  const float* scale;   ///< [3] or [1]
  void* mixed;          ///< [tokens, dim] BF16
  float* post;          ///< [tokens, 4]; unused for the head
  float* comb;          ///< [tokens, 4, 4]; unused for the head
  int64_t tokens, dim;  ///< dim: a multiple of 128
  int sinkhorn_iters;
  float norm_eps, hc_eps;
  bool head;  ///< collapse weights only
};
void hc_pre_sm90(const HcPreSm90Params& p, Stream stream);
/// The same on a CPU.
void hc_pre_twin(const HcPreSm90Params& p);

/// hc_pre of few tokens and the norm behind it (normalised_sm90) in one launch. Not for the head.
/// fn, base, scale and the norm's weight are constants, read before the kernel before has ended.
struct HcPreNormSm90Params {
  HcPreSm90Params pre;        ///< mixed: unused; comb: logits, which hc_comb_sm90 turns into it
  NormalisedSm90Params norm;  ///< x: unused
};
/// Up to 16 tokens, or 256 of up to 4,096 channels, of a multiple of 256.
bool serves_hc_pre_norm_sm90(int64_t tokens, int64_t dim);
void hc_pre_norm_sm90(const HcPreNormSm90Params& p, Stream stream);

/// Sinkhorn's iteration, in place: a chain of divisions that nothing waits for before the
/// sub-layer has ended.
struct HcCombSm90Params {
  float* comb;  ///< [tokens, 4, 4]: logits
  int64_t tokens;
  int iters;
  float eps;
};
void hc_comb_sm90(const HcCombSm90Params& p, Stream stream);

struct HcPostSm90Params {
  const void* out;      ///< [tokens, dim] BF16
  const void* streams;  ///< [tokens, 4, dim] BF16
  const float* post;    ///< [tokens, 4]
  const float* comb;    ///< [tokens, 4, 4]
  void* result;         ///< [tokens, 4, dim] BF16; may be `streams`
  int64_t tokens, dim;  ///< dim: a multiple of 4
};
void hc_post_sm90(const HcPostSm90Params& p, Stream stream);
/// The same on a CPU.
void hc_post_twin(const HcPostSm90Params& p);

}  // namespace hadal::ops
