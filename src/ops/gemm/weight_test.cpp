#include "ops/gemm/weight.h"

#include <cstdlib>
#include <string>
#include <thread>
#include <tuple>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

using testing::fp4;
using testing::fp8;
using testing::fp8_rows;
using testing::make_fp4;
using testing::make_fp8;
using testing::near_fp4;
using testing::same_bits;
using testing::Stored;

TEST(Weight, FormsHoldTheSameValues) {
  const Stored a = near_fp4(70, 160, 4), b = make_fp8(140, 130, 5);
  for (const auto& [panels, values, storage] : {std::tuple{fp4(a), a.values, OfficialStorage::kFp4},
                                                {fp8(b), b.values, OfficialStorage::kFp8}}) {
    const Weight packed(panels), dense(values);
    EXPECT_TRUE(same_bits(packed.to_dense().values(0), values));
    EXPECT_TRUE(same_bits(dense.to_panels().to_dense().values(0), values));
    const std::optional<Weight> from_panels = packed.to_sm90(storage),
                                from_dense = dense.to_sm90(storage);
    ASSERT_TRUE(from_panels && from_dense);
    for (const Weight& w : {*from_panels, *from_dense}) {
      EXPECT_EQ(w.form(), WeightForm::kSm90);
      EXPECT_TRUE(same_bits(w.values(0), values));
      EXPECT_TRUE(same_bits(w.to_dense().values(0), values));
      EXPECT_TRUE(same_bits(w.to_panels().values(0), values));
      EXPECT_TRUE(same_bits(w.to_sm90(storage)->values(0), values));
    }
    // Values off the grid have no codes.
    EXPECT_FALSE(Weight(values.to(at::kFloat) + 1e-3).to_sm90(storage).has_value());
    const std::optional<Weight> low = dense.to_sm90(OfficialStorage::kBf16);
    ASSERT_EQ(low.has_value(), values.size(1) % 8 == 0);
    if (low) {
      EXPECT_TRUE(same_bits(low->values(0), values));
    }
  }
  const at::Tensor wide = at::randn({3, 70, 33});
  EXPECT_TRUE(same_bits(Weight(wide).to_panels().values(), wide));
  EXPECT_FALSE(Weight(wide).to_panels().to_sm90(OfficialStorage::kFp8).has_value());
}

TEST(Weight, TheRoleOfTheProductsChoosesTheLayout) {
  const Stored b = make_fp8(64, 256, 5);
  for (const Weight& w : {Weight(fp8(b)), Weight(b.values)}) {
    const auto widened = w.to_sm90(OfficialStorage::kFp8, GemmRole::kBf16);
    ASSERT_TRUE(widened.has_value());
    EXPECT_TRUE(widened->sm90().widened);
    EXPECT_TRUE(same_bits(widened->values(0), b.values));
    EXPECT_FALSE(w.to_sm90(OfficialStorage::kFp8)->sm90().widened);
    const auto experts = w.to_sm90(OfficialStorage::kFp8, GemmRole::kFp4);
    ASSERT_TRUE(experts.has_value());
    EXPECT_TRUE(experts->sm90().rounds_rows());
  }
  const Weight low(pack_panels(b.values));
  EXPECT_EQ(low.to_sm90(OfficialStorage::kFp8)->sm90().format, WeightFormat::kBf16);
  EXPECT_EQ(low.to_sm90(OfficialStorage::kBf16, GemmRole::kFp4)->sm90().format,
            WeightFormat::kBf16);
}

TEST(Weight, ProductsDoNotDependOnTheForm) {
  at::manual_seed(3);
  const int64_t in = 256, out = 96, experts = 3;
  std::vector<at::Tensor> data, scale, values;
  std::vector<at::Tensor> data8, scale8, values8;
  for (unsigned i = 0; i < experts; ++i) {
    const Stored a = near_fp4(out, in, 10 + i), b = make_fp8(out, in, 20 + i);
    data.push_back(a.data), scale.push_back(a.scale), values.push_back(a.values);
    data8.push_back(b.data), scale8.push_back(b.scale), values8.push_back(b.values);
  }
  const at::Tensor x = fp8_rows(11, in);
  const at::Tensor offsets = at::tensor({0, 4, 4, 11}, at::kLong);
  const Weight four[] = {Weight(at::stack(values)), Weight(*pack_fp4(data, scale)),
                         Weight(*pack_sm90_fp4(data, scale))};
  const Weight eight[] = {Weight(at::stack(values8)), Weight(*pack_fp8(data8, scale8)),
                          Weight(*pack_sm90_fp8(data8, scale8))};
  const at::Tensor grouped = at::stack({x, x, x}, 1);
  for (const Weight& w : four) {
    EXPECT_TRUE(same_bits(grouped_linear(x, w, offsets, GemmRole::kFp4),
                          grouped_linear(x, four[0].dense(), offsets, GemmRole::kFp4)));
    EXPECT_EQ(
        grouped_linear(x.narrow(0, 0, 0), w, at::zeros({4}, at::kLong), GemmRole::kFp4).sizes(),
        (std::vector<int64_t>{0, out}));
  }
  for (const Weight& w : eight) {
    EXPECT_TRUE(same_bits(group_linear(grouped, w), group_linear(grouped, eight[0].dense())));
    EXPECT_THROW(linear(x, w, GemmRole::kFp8), Error);  // three matrices
  }
  const Weight one[] = {Weight(values8[0]), Weight(*pack_fp8({data8[0]}, {scale8[0]})),
                        Weight(*pack_sm90_fp8({data8[0]}, {scale8[0]}))};
  for (const Weight& w : one) {
    for (const GemmRole role : {GemmRole::kFp8, GemmRole::kFp32, GemmRole::kBf16})
      EXPECT_TRUE(same_bits(linear(x, w, role), linear(x, values8[0], role)));
    at::Tensor leaf = x.to(at::kFloat).requires_grad_(true);
    linear(leaf, w, GemmRole::kBf16).sum().backward();
    EXPECT_TRUE(at::allclose(leaf.grad()[0], values8[0].to(at::kFloat).sum(0), 1e-4, 1e-4));
  }
}

TEST(Weight, SaysOnceThatAFormIsMadeDense) {
  const Stored b = make_fp8(64, 128, 1);
  const Weight w(*pack_sm90_fp8({b.data}, {b.scale}));
  // In a process of its own: elsewhere it may have been said before.
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        ::testing::internal::CaptureStderr();
        for (int i = 0; i < 3; ++i) linear(fp8_rows(2, 128), w, GemmRole::kFp8);
        const std::string log = ::testing::internal::GetCapturedStderr();
        const size_t first = log.find("makes them dense");
        const bool once = first != std::string::npos &&
                          log.find("makes them dense", first + 1) == std::string::npos;
        std::_Exit(once ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
}

TEST(Weight, KeptPanelsFollowTheirValues) {
  const auto cache = std::make_shared<PanelCache>();
  at::Tensor values = at::randn({32, 64});
  const at::Tensor x = at::randn({3, 64});
  const auto product = [&](const at::Tensor& of) {
    return linear(x, Weight(of, 1, cache), GemmRole::kBf16);
  };
  const at::Tensor before = product(values);
  EXPECT_TRUE(same_bits(before, linear(x, values, GemmRole::kBf16)));
  const auto kept = cache->of(values, 1);
  EXPECT_EQ(cache->of(values, 1), kept);
  EXPECT_EQ(cache->num_bytes(), 32 * 64 * 4);
  values.view({64, 32}).mul_(2.0);  // through a view, as an optimizer writes
  EXPECT_TRUE(same_bits(product(values), before * 2.0));
  values = values.clone();
  EXPECT_NE(cache->of(values, 1), kept);
  EXPECT_EQ(cache->of(values, 2)->matrices, 2);
  values = at::zeros({32, 64});  // replaced: nothing of the old one is left
  EXPECT_TRUE(same_bits(product(values), at::zeros({3, 32})));
}

TEST(Weight, KeptPanelsAreMadeOnceByManyThreads) {
  const auto cache = std::make_shared<PanelCache>();
  const at::Tensor values = at::randn({64, 64});
  std::vector<std::shared_ptr<const Panels>> seen(8);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < seen.size(); ++i)
    threads.emplace_back([&, i] { seen[i] = cache->of(values, 1); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& panels : seen) EXPECT_EQ(panels, seen[0]);
}

}  // namespace
}  // namespace hadal::ops
