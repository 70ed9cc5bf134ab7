// The choice of experts on a card against its twin, bit for bit.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "ops/moe/gate_sm90.h"
#include "testing/float_data.h"
#include "testing/on_device.h"

namespace hadal::ops {
namespace {

using testing::differences;
using testing::normals;
using testing::OnDevice;

struct Choice {
  int64_t tokens, experts, topk;
};

class GateSm90 : public ::testing::TestWithParam<Choice> {};

TEST_P(GateSm90, IsTheTwins) {
  const auto [tokens, experts, topk] = GetParam();
  auto logits = normals(static_cast<size_t>(tokens * experts), 8.0f, 1);
  auto bias = normals(static_cast<size_t>(experts), 0.3f, 2);
  for (size_t i = 0; i < logits.size(); i += 7) logits[i] = 1.0f;  // ties
  for (size_t i = 5; i < logits.size(); i += 131) logits[i] = NAN;
  for (size_t i = 6; i < logits.size(); i += 137) logits[i] = 40.0f;
  for (size_t i = 9; i < logits.size(); i += 139) logits[i] = -200.0f;
  bias[0] = bias[static_cast<size_t>(experts) - 1] = 0.0f;
  std::mt19937 random(3);
  constexpr int32_t kIds = 50;
  std::vector<int64_t> table, ids(static_cast<size_t>(tokens)), all(static_cast<size_t>(experts));
  std::iota(all.begin(), all.end(), 0);
  for (int32_t id = 0; id < kIds; ++id) {
    std::shuffle(all.begin(), all.end(), random);
    table.insert(table.end(), all.begin(), all.begin() + topk);
  }
  for (int64_t& id : ids) id = static_cast<int64_t>(random() % kIds);
  for (const bool hashed : {false, true}) {
    std::vector<int32_t> chosen(static_cast<size_t>(tokens * topk));
    std::vector<float> weights(chosen.size());
    gate_twin({logits.data(), hashed ? nullptr : bias.data(), table.data(), ids.data(),
               chosen.data(), weights.data(), tokens, experts, topk, 1.5f});
    const OnDevice<float> logits_there(logits), bias_there(bias), weights_there(weights.size());
    const OnDevice<int64_t> table_there(table), ids_there(ids);
    const OnDevice<int32_t> chosen_there(chosen.size());
    gate_sm90(
        {logits_there.get(), hashed ? nullptr : bias_there.get(), table_there.get(),
         ids_there.get(), chosen_there.get(), weights_there.get(), tokens, experts, topk, 1.5f},
        nullptr);
    EXPECT_EQ(differences(chosen_there.read(), chosen), 0) << "hashed " << hashed;
    // A NaN's bits are not told.
    auto found = weights_there.read();
    for (std::vector<float>* values : {&found, &weights}) {
      for (float& v : *values) v = std::isnan(v) ? NAN : v;
    }
    EXPECT_EQ(differences(found, weights), 0) << "hashed " << hashed;
  }
}

INSTANTIATE_TEST_SUITE_P(Choices,
                         GateSm90,
                         ::testing::Values(Choice{1, 256, 6},
                                           Choice{300, 256, 6},
                                           Choice{70, 384, 6},
                                           Choice{9, 13, 3},
                                           Choice{33, 1024, 32},
                                           Choice{5, 6, 6}));

}  // namespace
}  // namespace hadal::ops
