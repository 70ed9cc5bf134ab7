// A copy of the state shares nothing with the run, and checksums know no cut onto ranks.
#include "train/state_copy.h"

#include <map>
#include <string>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "model/init.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"

namespace hadal::train {
namespace {

TEST(StateCopy, NothingInItIsWhatTheNextStepWrites) {
  model::Transformer model = testing::random_model(testing::tiny_config(), 2, at::kFloat);
  model::require_gradients(model);
  Optimizer optimizer(model, {});
  const at::NoGradGuard no_grad;
  const std::vector<NamedState> run = named_state(model, optimizer);
  std::map<std::string, at::Tensor> before;
  for (const NamedState& each : run)
    for (const StateTensor::Part& part : each.tensor.parts)
      before[each.tensor.name] = part.values.clone();
  const StateCopy copy(run);
  ASSERT_EQ(copy.tensors().size(), run.size());
  // The next step writes all of it.
  for (const NamedState& each : run)
    for (const StateTensor::Part& part : each.tensor.parts) part.values.add_(1);
  int64_t bytes = 0;
  for (size_t i = 0; i < run.size(); ++i) {
    const NamedState& each = copy.tensors()[i];
    EXPECT_EQ(each.tensor.name, run[i].tensor.name);
    ASSERT_EQ(each.tensor.parts.size(), 1U);
    const at::Tensor& values = each.tensor.parts[0].values;
    EXPECT_TRUE(testing::same_bits(values, before.at(each.tensor.name))) << each.tensor.name;
    EXPECT_FALSE(testing::same_bits(values, run[i].tensor.parts[0].values)) << each.tensor.name;
    bytes += static_cast<int64_t>(values.nbytes());
  }
  EXPECT_EQ(state_bytes(run), bytes);
}

TEST(StateCopy, ChecksumsKnowNoCut) {
  for (const int64_t ranks : {2, 3, 5}) {
    model::Transformer model = testing::random_model(testing::tiny_config(), 2, at::kFloat);
    model::require_gradients(model);
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const Optimizer optimizer(model, {}, Ownership(model, ranks, rank));
      for (const NamedState& each : named_state(model, optimizer)) {
        const auto blocks = checked_blocks(each.tensor.whole.numel(), each.unit);
        for (const StateTensor::Part& part : each.tensor.parts) {
          const auto is_border = [&](int64_t element) {
            if (element == each.tensor.whole.numel()) return true;
            for (const CheckedBlock& block : blocks)
              if (block.begin == element) return true;
            return false;
          };
          EXPECT_TRUE(is_border(part.begin) && is_border(part.begin + part.values.numel()))
              << each.tensor.name << " from " << part.begin;
        }
      }
    }
  }
  int64_t covered = 0;
  for (const CheckedBlock& block :
       checked_blocks(5 * kCheckedElements + 7, 2 * kCheckedElements + 1)) {
    EXPECT_EQ(block.begin, covered);
    EXPECT_LE(block.end - block.begin, kCheckedElements);
    covered = block.end;
  }
  EXPECT_EQ(covered, 5 * kCheckedElements + 7);
}

}  // namespace
}  // namespace hadal::train
