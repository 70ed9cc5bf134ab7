// The round trips on the GPU against their references, bit by bit.
#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/quant/round_trip.h"
#include "testing/gpu.h"

namespace hadal::ops {
namespace {

class RoundTripGpu : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override { at::manual_seed(9); }
  /// Values of many magnitudes within a group, rows of many magnitudes, and a row of zeros.
  at::Tensor values(int64_t rows, int64_t dim) const {
    const auto options = at::device(at::kCUDA).dtype(at::kFloat);
    at::Tensor x = at::randn({rows, dim}, options) * at::exp(at::randn({rows, dim}, options) * 2) *
                   at::exp(at::randn({rows, 1}, options) * 8);
    x[0].zero_();
    return x.to(GetParam());
  }
  void check(const char* op, int64_t group, const hadal::testing::OpCall& call) const {
    at::Tensor expected;
    const at::Tensor x = values(301, 384);
    {
      const ReferenceGuard guard;
      expected = call({x})[0];
    }
    EXPECT_TRUE(at::equal(call({x})[0], expected)) << op << " group " << group;
    const at::Tensor large = values(65536, 384);
    const std::string type = GetParam() == at::kBFloat16 ? " bf16 group " : " fp32 group ";
    hadal::testing::check_gpu_case(op + type + std::to_string(group), call, {large}, 0.0,
                                   2.0 * static_cast<double>(large.nbytes()));
  }
};

TEST_P(RoundTripGpu, Fp8) {
  for (const int64_t group : {32, 64, 128, 384}) {
    check("fp8_round_trip", group,
          [&](const auto& in) { return std::vector{fp8_round_trip(in[0], group)}; });
  }
}

TEST_P(RoundTripGpu, Fp8OfLeadingChannels) {
  check("fp8_round_trip_leading", 64,
        [](const auto& in) { return std::vector{fp8_round_trip_leading(in[0], 320, 64)}; });
}

TEST_P(RoundTripGpu, Fp4) {
  for (const int64_t group : {32, 128}) {
    check("fp4_round_trip", group,
          [&](const auto& in) { return std::vector{fp4_round_trip(in[0], group)}; });
  }
}

TEST_P(RoundTripGpu, NanStaysNan) {
  at::Tensor x = values(4, 128);
  x[1][5].fill_(NAN);
  EXPECT_TRUE(fp8_round_trip(x, 128)[1][5].isnan().item<bool>());
  EXPECT_TRUE(fp4_round_trip(x, 32)[1][5].isnan().item<bool>());
}

INSTANTIATE_TEST_SUITE_P(Types, RoundTripGpu, ::testing::Values(at::kFloat, at::kBFloat16));

}  // namespace
}  // namespace hadal::ops
