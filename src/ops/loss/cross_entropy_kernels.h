// The CUDA kernel behind linear_cross_entropy; free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

struct CrossEntropyParams {
  const float* logits;     ///< [rows, vocab]
  const int64_t* targets;  ///< [rows], negative = not scored
  float* loss;             ///< [rows] -log softmax[target]; 0 where not scored
  void* grad;              ///< [rows, vocab] BF16, softmax - one-hot, 0 where not scored; or null
  int64_t rows, vocab;     ///< vocab a multiple of 4
};

/// A target that is no row of the vocabulary makes its loss NaN.
extern KernelSlot<void(const CrossEntropyParams&, Stream)> cross_entropy_cuda;

}  // namespace hadal::ops
