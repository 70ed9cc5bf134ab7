#include "model/parameter.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::model {
namespace {

using ops::Numerics;

Parameter matrix(at::Tensor values) {
  Parameter p;
  p.name = "layers.0.attn.wq_a.weight";
  p.storage = Storage::kFp8;
  p.role = ops::GemmRole::kFp8;
  p.shape = values.sizes().vec();
  p.hold(std::move(values));
  return p;
}

TEST(Parameter, ProductsFollowAMasterThatIsWrittenTo) {
  const at::NoGradGuard no_grad;
  const at::Tensor x = at::randn({5, 64});
  Parameter p = matrix(at::randn({48, 64}));
  for (int step = 0; step < 3; ++step) {
    EXPECT_TRUE(at::equal(apply_linear(p, x, Numerics::kIdeal), ops::linear(x, p.value, p.role)));
    EXPECT_EQ(p.num_bytes(), 2 * 48 * 64 * 4);  // the master and its panels
    p.value.view({24, 128}).add_(0.5);          // as an optimizer writes: in place, through a view
  }
  const at::Tensor replaced = at::randn({48, 64});
  p.hold(replaced);
  EXPECT_TRUE(at::equal(apply_linear(p, x, Numerics::kIdeal), ops::linear(x, replaced, p.role)));
}

TEST(Parameter, MastersUnderTrainingKeepNoPanels) {
  const at::Tensor x = at::randn({5, 128}).to(at::kBFloat16);
  Parameter p = matrix(at::randn({128, 128}));
  const at::Tensor rounded = ops::official_rounding(p.value, Storage::kFp8);
  EXPECT_TRUE(at::equal(apply_linear(p, x, Numerics::kReleased), ops::linear(x, rounded, p.role)));
  EXPECT_EQ(p.kept_panels->num_bytes(), 0);
  p.value.requires_grad_(true);
  apply_linear(p, at::randn({5, 128}), Numerics::kIdeal).sum().backward();
  EXPECT_TRUE(p.value.grad().defined());
  EXPECT_EQ(p.kept_panels->num_bytes(), 0);
}

TEST(Parameter, NormsAreReadAsFilesHoldThem) {
  Parameter norm;
  norm.name = "norm.weight";
  norm.kind = ParamKind::kNorm;
  norm.shape = {4};
  // 1 + 2^-8 is a tie between 1 and 1 + 2^-7, and goes to the even one.
  norm.hold(at::tensor({1.0F, 1.0F + 0x1p-8F, 1.0F + 0x1.8p-7F, -0x1.008p-3F}));
  norm.value.requires_grad_(true);
  const at::Tensor rounded = at::tensor({1.0F, 1.0F, 1.0F + 0x1p-6F, -0x1p-3F});
  const at::Tensor factor = at::tensor({3.0F, 5.0F, 0x1.000002p0F, -7.0F});
  for (const Numerics numerics : {Numerics::kReleased, Numerics::kFp8}) {
    const at::Tensor read = norm.values_in(numerics);
    EXPECT_EQ(read.scalar_type(), at::kFloat);
    EXPECT_TRUE(at::equal(read, rounded)) << ops::numerics_name(numerics);
    norm.value.mutable_grad().reset();
    read.mul(factor).sum().backward();
    EXPECT_TRUE(at::equal(norm.value.grad(), factor)) << "unrounded, in FP32";
  }
  for (const Numerics numerics : {Numerics::kIdeal, Numerics::kBf16})
    EXPECT_TRUE(norm.values_in(numerics).is_same(norm.value));
  norm.as_stored = true;  // a checkpoint's own FP32
  EXPECT_TRUE(norm.values_in(Numerics::kReleased).is_same(norm.value));
  norm.as_stored = false;
  norm.storage = Storage::kF32;  // sinks, mHC, `ape`
  EXPECT_TRUE(norm.values_in(Numerics::kReleased).is_same(norm.value));
}

TEST(Parameter, HoldsAMasterOrAWeight) {
  const at::Tensor values = at::randn({64, 128}).to(at::kBFloat16);
  Parameter p = matrix(values);
  p.hold(ops::Weight(ops::pack_panels(values)));
  EXPECT_FALSE(p.value.defined());
  EXPECT_EQ(p.num_bytes(), 64 * 128 * 2);
  EXPECT_TRUE(at::equal(p.operand(Numerics::kReleased), values));
  p.hold_dense();
  EXPECT_FALSE(p.weight.defined());
  EXPECT_TRUE(at::equal(p.value, values));
  EXPECT_THROW(p.hold(at::zeros({64, 64})), Error);
  EXPECT_THROW(p.hold(ops::Weight(ops::pack_panels(at::zeros({128, 64})))), Error);
  EXPECT_THROW(p.hold(ops::Weight(ops::pack_panels(at::zeros({2, 64, 128})))), Error);
}

}  // namespace
}  // namespace hadal::model
