// The CUDA kernels of the hyper-connections against their references.
#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/mhc/hyper_connection.h"
#include "testing/gpu.h"

namespace hadal::ops {
namespace {

struct Case {
  at::ScalarType type;
  int64_t tokens, dim;
};

class HyperConnectionGpu : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override { at::manual_seed(7); }
  at::Tensor random(at::IntArrayRef shape, double size = 1.0) const {
    return at::randn(shape, at::device(at::kCUDA).dtype(at::kFloat)) * size;
  }
  at::Tensor streams() const {
    return random({GetParam().tokens, 4, GetParam().dim}).to(GetParam().type);
  }
  std::string name(const char* op) const {
    return std::string(op) + (bf16() ? " bf16 [" : " fp32 [") + std::to_string(GetParam().tokens) +
           ", 4, " + std::to_string(GetParam().dim) + "]";
  }
  bool bf16() const { return GetParam().type == at::kBFloat16; }
  /// FP32: sums over tokens and channels in another order; BF16: one rounding of either result.
  double tolerance() const { return bf16() ? 8e-3 : 1e-4; }
};

TEST_P(HyperConnectionGpu, Pre) {
  const at::Tensor x = streams();
  const at::Tensor fn = random({24, 4 * GetParam().dim}, 0.02), base = random({24}),
                   scale = random({3});
  hadal::testing::check_gpu_case(
      name("hc_pre"),
      [](const auto& in) {
        const HcPre out = hc_pre(in[0], in[1], in[2], in[3], {});
        return std::vector{out.mixed, out.post, out.comb};
      },
      {x, fn, base, scale}, tolerance(), 1.25 * static_cast<double>(x.nbytes()));
}

TEST_P(HyperConnectionGpu, Post) {
  const at::Tensor x = streams();
  const at::Tensor out = random({GetParam().tokens, GetParam().dim}).to(GetParam().type);
  const at::Tensor post = random({GetParam().tokens, 4}).sigmoid() * 2;
  const at::Tensor comb = at::softmax(random({GetParam().tokens, 4, 4}), -1);
  hadal::testing::check_gpu_case(
      name("hc_post"),
      [](const auto& in) { return std::vector{hc_post(in[0], in[1], in[2], in[3])}; },
      {out, x, post, comb}, tolerance(), 2.25 * static_cast<double>(x.nbytes()));
}

TEST_P(HyperConnectionGpu, Head) {
  const at::Tensor x = streams();
  const at::Tensor fn = random({4, 4 * GetParam().dim}, 0.02), base = random({4}),
                   scale = random({1});
  hadal::testing::check_gpu_case(
      name("hc_head"),
      [](const auto& in) { return std::vector{hc_head(in[0], in[1], in[2], in[3], {})}; },
      {x, fn, base, scale}, tolerance(), 1.25 * static_cast<double>(x.nbytes()));
}

// The small sizes leave blocks of tokens and of channels partly filled.
INSTANTIATE_TEST_SUITE_P(Sizes,
                         HyperConnectionGpu,
                         ::testing::Values(Case{at::kFloat, 1, 4},
                                           Case{at::kFloat, 77, 36},
                                           Case{at::kFloat, 65536, 384},
                                           Case{at::kBFloat16, 77, 36},
                                           Case{at::kBFloat16, 65536, 384},
                                           Case{at::kBFloat16, 8192, 4096}));

}  // namespace
}  // namespace hadal::ops
