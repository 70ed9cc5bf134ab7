// The CUDA kernels of the ops that work row by row, against their references.
#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/attention/rope.h"
#include "ops/moe/swiglu.h"
#include "ops/norm/rms_norm.h"
#include "testing/gpu.h"

namespace hadal::ops {
namespace {

class RowOps : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  at::Tensor random(at::IntArrayRef shape) const {
    return at::randn(shape, at::device(at::kCUDA).dtype(at::kFloat)).to(GetParam());
  }
  bool bf16() const { return GetParam() == at::kBFloat16; }
  std::string name(const char* op) const { return std::string(op) + (bf16() ? " bf16" : " fp32"); }
  /// FP32: sums over up to 65,536 rows in another order; BF16: one rounding of either result.
  double tolerance() const { return bf16() ? 8e-3 : 1e-4; }
};

TEST_P(RowOps, RmsNorm) {
  const at::Tensor x = random({65536, 384}), weight = random({384}).to(at::kFloat);
  hadal::testing::check_gpu_case(
      name("rms_norm"), [](const auto& in) { return std::vector{rms_norm(in[0], in[1], 1e-6)}; },
      {x, weight}, tolerance(), 2.0 * static_cast<double>(x.nbytes()));
}

TEST_P(RowOps, HeadNorm) {
  const at::Tensor x = random({65536, 6, 128});
  hadal::testing::check_gpu_case(
      name("head_norm"),
      [](const auto& in) { return std::vector{head_norm(in[0], 1e-6, Numerics::kBf16)}; }, {x},
      tolerance(), 2.0 * static_cast<double>(x.nbytes()));
}

TEST_P(RowOps, Swiglu) {
  const at::Tensor gate = random({65536, 256}) * 4, up = random({65536, 256}) * 4;
  const at::Tensor weight = random({65536}).to(at::kFloat);
  hadal::testing::check_gpu_case(
      name("swiglu"), [](const auto& in) { return std::vector{swiglu(in[0], in[1], in[2], 7.0)}; },
      {gate, up, weight}, tolerance(), 3.0 * static_cast<double>(gate.nbytes()));
}

TEST_P(RowOps, SwigluWithoutWeight) {
  const at::Tensor gate = random({65536, 256}) * 4, up = random({65536, 256}) * 4;
  hadal::testing::check_gpu_case(
      name("swiglu, no weight"),
      [](const auto& in) { return std::vector{swiglu(in[0], in[1], at::Tensor(), 7.0)}; },
      {gate, up}, tolerance(), 3.0 * static_cast<double>(gate.nbytes()));
}

TEST_P(RowOps, Rope) {
  const at::Tensor x = random({65536, 6, 128});
  const at::Tensor angle = random({65536, 32}).to(at::kFloat);
  const at::Tensor cos_sin = at::stack({angle.cos(), angle.sin()}, -1);
  hadal::testing::check_gpu_case(
      name("rope"), [&](const auto& in) { return std::vector{rope(in[0], cos_sin, false)}; }, {x},
      tolerance(), 2.0 * static_cast<double>(x.nbytes()));
}

INSTANTIATE_TEST_SUITE_P(Types, RowOps, ::testing::Values(at::kFloat, at::kBFloat16));

}  // namespace
}  // namespace hadal::ops
