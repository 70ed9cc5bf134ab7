#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/indexer/index_kl.h"
#include "ops/indexer/index_scores.h"
#include "testing/gpu.h"

namespace hadal::ops {
namespace {

// Scores and their gradients by library products on BF16 against the reference: ragged samples, one
// shorter than a block.
TEST(IndexScoresGpu, MatchesReference) {
  at::manual_seed(3);
  const at::Device device(at::kCUDA);
  constexpr int64_t kRatio = 4, kHeads = 8, kDim = 128;
  const std::vector<int64_t> lengths = {300, 3, 4096, 205};
  const Batch batch(lengths, {0, 0, 0, 0}, device);
  const BlockPlan& plan = batch.blocks(kRatio);
  const auto options = at::TensorOptions().device(device).dtype(at::kBFloat16);
  const std::vector<at::Tensor> inputs = {at::randn({batch.num_tokens(), kHeads, kDim}, options),
                                          at::randn({batch.num_tokens(), kHeads}, options) * 0.03,
                                          at::randn({plan.num_blocks(), kDim}, options)};
  for (const Numerics numerics : {Numerics::kBf16, Numerics::kReleased}) {
    testing::check_gpu_case(
        std::string("index_scores ") + numerics_name(numerics),
        [&](const std::vector<at::Tensor>& in) {
          const BlockView keys = step_blocks(in[2], batch, kRatio);
          const at::Tensor scores = index_scores(in[0], in[1], keys, batch, kRatio, numerics);
          return std::vector{scores.masked_fill(scores.isneginf(), 0.0)};
        },
        inputs, 1e-2, 4.0 * 4096 * 1024);
  }
}

}  // namespace
}  // namespace hadal::ops
