// The CUDA kernels behind hc_pre and hc_post for n = 4 streams; free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

struct HcPreParams {
  const void* streams;  ///< [tokens, 4, dim] type
  const float* fn;      ///< [24, 4 dim]
  const float* base;    ///< [24]
  const float* scale;   ///< [3]
  void* mixed;          ///< [tokens, dim] type
  float* post;          ///< [tokens, 4]
  float* comb;          ///< [tokens, 4, 4]
  float* z;             ///< [tokens, 24]  fn v rho, kept for the backward pass
  float* rho;           ///< [tokens]
  int64_t tokens, dim;  ///< dim a multiple of 4
  int iters;            ///< 1 to 32
  float norm_eps, hc_eps;
  ElementType type;
};

struct HcPreBackwardParams {
  const void* streams;  ///< as in the forward pass, until hc_eps
  const float* fn;
  const float* base;
  const float* scale;
  const float* z;
  const float* rho;
  const void* d_mixed;    ///< [tokens, dim] type
  const float* d_post;    ///< [tokens, 4]
  const float* d_comb;    ///< [tokens, 4, 4]
  void* d_streams;        ///< [tokens, 4, dim] type
  float* dz_rho;          ///< [tokens, 24]; fn's gradient is its transpose times the streams
  float* token_factors;   ///< [tokens, 5] scratch: collapse weights, then the factor of v
  float* parts;           ///< [num_parts, 27] scratch
  float* d_base_d_scale;  ///< [27]
  int64_t tokens, dim, num_parts;
  int iters;
  float hc_eps;
  ElementType type;
};

struct HcPostParams {
  const void* out;      ///< [tokens, dim] type
  const void* streams;  ///< [tokens, 4, dim] type
  const float* post;    ///< [tokens, 4]
  const float* comb;    ///< [tokens, 4, 4]
  void* result;         ///< [tokens, 4, dim] type
  int64_t tokens, dim;
  ElementType type;
};

struct HcPostBackwardParams {
  const void* out;  ///< as in the forward pass, until comb
  const void* streams;
  const float* post;
  const float* comb;
  const void* d_result;  ///< [tokens, 4, dim] type
  void* d_out;           ///< [tokens, dim] type
  void* d_streams;       ///< [tokens, 4, dim] type
  float* d_post;         ///< [tokens, 4]
  float* d_comb;         ///< [tokens, 4, 4]
  int64_t tokens, dim;
  ElementType type;
};

extern KernelSlot<void(const HcPreParams&, Stream)> hc_pre_cuda;
extern KernelSlot<void(const HcPreBackwardParams&, Stream)> hc_pre_backward_cuda;
extern KernelSlot<void(const HcPostParams&, Stream)> hc_post_cuda;
extern KernelSlot<void(const HcPostBackwardParams&, Stream)> hc_post_backward_cuda;

}  // namespace hadal::ops
