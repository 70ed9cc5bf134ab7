// Weights on a GPU: moved without being made dense, and read back there.
#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/gemm/weight.h"
#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

using testing::same_bits;
using testing::Stored;

TEST(WeightGpu, CodesStayCodes) {
  const Stored a = testing::near_fp4(200, 384, 1);
  const Stored b = testing::make_fp8(200, 320, 2);
  for (const Panels& panels : {testing::fp4(a), testing::fp8(b)}) {
    const Weight on_cpu(panels), on_gpu = on_cpu.to(at::kCUDA);
    EXPECT_EQ(on_gpu.form(), WeightForm::kSm90);
    EXPECT_TRUE(on_gpu.device().is_cuda());
    EXPECT_TRUE(same_bits(on_gpu.values(0).cpu(), on_cpu.values(0)));
  }
  const Weight widened = Weight(testing::fp8(testing::make_fp8(192, 256, 3)));
  EXPECT_TRUE(widened.to(at::kCUDA, GemmRole::kBf16).sm90().widened);
  const Weight low(pack_panels(at::randn({16, 32}).to(at::kBFloat16)));
  EXPECT_EQ(low.to(at::kCUDA).form(), WeightForm::kSm90);
  EXPECT_TRUE(same_bits(low.to(at::kCUDA).values(0).cpu(), low.values(0)));
  EXPECT_EQ(low.to(at::kCUDA, GemmRole::kFp4).form(), WeightForm::kSm90);
  EXPECT_EQ(Weight(pack_panels(at::randn({16, 32}))).to(at::kCUDA).form(), WeightForm::kDense);
}

}  // namespace
}  // namespace hadal::ops
