// Initial values of a model to be trained (model.md 17.8).
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/transformer.h"

namespace hadal::model {

struct InitParams {
  uint64_t seed = 1;
  double std = 0.006;  ///< of every matrix
  /// Unigram counts of the training text by token id, for balanced hash routing; empty: every id
  /// counts alike.
  std::vector<int64_t> token_counts;
};

/// Fills every parameter that is not elsewhere: matrices normal, norms 1, sinks, ape and biases 0,
/// mHC near a plain residual, balanced hash tables. Values are FP32 (`dtype` may be FP64) on the
/// CPU and depend on seed and name alone; a shard has its part of the whole.
void init_weights(Transformer& model, const InitParams& params, at::ScalarType dtype);

/// Makes every floating parameter but the router bias a leaf that requires a gradient, as far as it
/// is not elsewhere.
void require_gradients(Transformer& model);

/// Moves all parameters to a device, keeping requires_grad. FP4 and FP8 stay packed
/// (ops::Weight::to).
void move_to(Transformer& model, at::Device device);

/// Declares the routed experts of every layer as part `part` of `parts`. Before there are values.
void shard_experts(Transformer& model, int64_t part, int64_t parts);

/// Hash routing: a row of topk distinct experts per token id, so that the load weighted by the
/// counts is even. [vocab, topk] I64.
at::Tensor balanced_hash_table(int64_t vocab,
                               int64_t experts,
                               int64_t topk,
                               uint64_t seed,
                               const std::vector<int64_t>& token_counts);

}  // namespace hadal::model
