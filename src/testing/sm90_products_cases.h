// Products of packed weights where the Hopper kernels serve them, against the integer model of the
// matrix units, bit for bit: on a GPU, and on a CPU in its place. Who includes this defines where.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/math.h"
#include "ops/gemm/hopper_twin.h"
#include "ops/gemm/sm90_products.h"
#include "ops/gemm/weight.h"
#include "ops/moe/permute.h"
#include "ops/moe/sm90_experts.h"
#include "ops/moe/swiglu.h"
#include "ops/sm90.h"
#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

/// Where the tensors under test lie.
at::Device card();

}  // namespace
}  // namespace hadal::ops

namespace hadal::testing {
namespace {

/// BF16 values [n, in] as E4M3 codes and a power of two for each row's 128 inputs, exactly. Which
/// powers changes no bit of a product.
struct Codes {
  at::Tensor data, scales;

  explicit Codes(const at::Tensor& values) {
    const int64_t n = values.size(0), slabs = ceil_div(values.size(1), int64_t{128});
    const at::Tensor groups =
        at::constant_pad_nd(values.to(at::kFloat), {0, slabs * 128 - values.size(1)})
            .reshape({n, slabs, 128});
    const auto [fraction, exponent] = at::frexp(groups.abs().amax(2, /*keepdim=*/true) / 448);
    const at::Tensor scale =
        at::ldexp(at::ones_like(fraction), exponent - fraction.eq(0.5f).to(at::kInt))
            .to(at::kFloat);
    const at::Tensor codes = (groups / scale).to(at::kFloat8_e4m3fn);
    EXPECT_TRUE(at::equal(codes.to(at::kFloat) * scale, groups));
    data = codes.view(at::kByte).reshape({n, slabs * 128}).contiguous();
    scales = scale.reshape({n, slabs}).contiguous();
  }
};

at::Tensor twin_fp8(const at::Tensor& x, const at::Tensor& w) {
  const Codes a(x), b(w);
  at::Tensor y = at::empty({x.size(0), w.size(0)}, at::kFloat);
  ops::twin_fp8_cpu({.w = b.data.const_data_ptr<uint8_t>(),
                     .w_scale = b.scales.const_data_ptr<float>(),
                     .x = a.data.const_data_ptr<uint8_t>(),
                     .x_scale = a.scales.const_data_ptr<float>(),
                     .y = y.mutable_data_ptr<float>(),
                     .outputs = w.size(0),
                     .rows = x.size(0),
                     .in = a.data.size(1)});
  return y;
}

at::Tensor twin_bf16(const at::Tensor& x_any, const at::Tensor& w_any) {
  const at::Tensor x = x_any.contiguous(), w = w_any.contiguous();
  at::Tensor y = at::empty({x.size(0), w.size(0)}, at::kFloat);
  ops::twin_bf16_cpu({.w = reinterpret_cast<const uint16_t*>(w.const_data_ptr<at::BFloat16>()),
                      .x = reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>()),
                      .y = y.mutable_data_ptr<float>(),
                      .outputs = w.size(0),
                      .rows = x.size(0),
                      .in = x.size(1)});
  return y;
}

at::Tensor bf16_rows(at::IntArrayRef shape) { return at::randn(shape).to(at::kBFloat16); }

}  // namespace
}  // namespace hadal::testing

namespace hadal::ops {
namespace {

using testing::bf16_rows;
using testing::fp8_rows;
using testing::make_fp8;
using testing::near_fp4;
using testing::same_bits;
using testing::Stored;
using testing::twin_bf16;
using testing::twin_fp8;

class Sm90Products : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    at::manual_seed(5);
    if (card().is_cpu()) as_hopper_.emplace();
  }
  static void expect_products(const at::Tensor& x, const Weight& w, const at::Tensor& twin) {
    const Weight there = w.to(card());
    EXPECT_TRUE(same_bits(linear(x.to(card()), there, GemmRole::kFp32).cpu(), twin));
    EXPECT_TRUE(
        same_bits(linear(x.to(card()), there, GemmRole::kBf16).cpu(), twin.to(at::kBFloat16)));
  }

 private:
  std::optional<AsHopperGuard> as_hopper_;
};

TEST_P(Sm90Products, Fp8) {
  for (const auto& [out, in] : {std::tuple{200, 384}, {64, 128}, {512, 1152}}) {
    const Stored w = make_fp8(out, in, 3);
    const at::Tensor x = fp8_rows(GetParam(), in);
    expect_products(x, Weight(*pack_sm90_fp8({w.data}, {w.scale})), twin_fp8(x, w.values));
  }
}

TEST_P(Sm90Products, Bf16) {
  for (const auto& [out, in] : {std::tuple{8, 384}, {200, 72}, {130, 2176}}) {
    const at::Tensor x = bf16_rows({GetParam(), in}), w = bf16_rows({out, in});
    expect_products(x, Weight(*pack_sm90_bf16(w)), twin_bf16(x, w));
  }
}

// Rows of a longer row, and an address that is no multiple of 16.
TEST_P(Sm90Products, RowsThatDoNotLieTogether) {
  const at::Tensor wide = bf16_rows({GetParam(), 400}), x = wide.narrow(1, 3, 256);
  const at::Tensor w = bf16_rows({64, 256});
  const Weight there = Weight(*pack_sm90_bf16(w)).to(card());
  EXPECT_TRUE(same_bits(linear(wide.to(card()).narrow(1, 3, 256), there, GemmRole::kFp32).cpu(),
                        twin_bf16(x, w)));
}

TEST_P(Sm90Products, WidenedGroups) {
  const int64_t groups = 3, rows = GetParam();
  for (const auto& [out, in] : {std::tuple{128, 256}, {64, 1408}}) {
    const at::Tensor x = bf16_rows({rows, groups, in});
    std::vector<at::Tensor> data, scale, expected;
    for (int64_t g = 0; g < groups; ++g) {
      const Stored w = make_fp8(out, in, static_cast<unsigned>(30 + g));
      data.push_back(w.data), scale.push_back(w.scale);
      expected.push_back(twin_bf16(x.select(1, g), w.values).to(at::kBFloat16));
    }
    const Weight there = Weight(*pack_sm90_widened(data, scale)).to(card());
    EXPECT_TRUE(same_bits(group_linear(x.to(card()), there).cpu(), at::stack(expected, 1)));
  }
}

TEST_P(Sm90Products, Bf16Groups) {
  const int64_t groups = 3, rows = GetParam();
  const at::Tensor x = bf16_rows({rows, groups, 192}), w = bf16_rows({groups, 72, 192});
  std::vector<at::Tensor> expected;
  for (int64_t g = 0; g < groups; ++g)
    expected.push_back(twin_bf16(x.select(1, g), w[g]).to(at::kBFloat16));
  const Weight there = Weight(*pack_sm90_bf16(w)).to(card());
  EXPECT_TRUE(same_bits(group_linear(x.to(card()), there).cpu(), at::stack(expected, 1)));
}

/// Experts of one form: weights there and their values.
struct ExpertWeights {
  Weight there;
  std::vector<at::Tensor> values;

  ExpertWeights(WeightFormat format, int64_t experts, int64_t out, int64_t in, unsigned seed) {
    std::vector<at::Tensor> data, scale;
    for (unsigned e = 0; e < experts; ++e) {
      if (format == WeightFormat::kBf16) {
        values.push_back(bf16_rows({out, in}));
        continue;
      }
      const Stored w =
          format == WeightFormat::kFp4 ? near_fp4(out, in, seed + e) : make_fp8(out, in, seed + e);
      data.push_back(w.data), scale.push_back(w.scale), values.push_back(w.values);
    }
    auto packed = format == WeightFormat::kFp4   ? pack_sm90_fp4(data, scale)
                  : format == WeightFormat::kFp8 ? pack_sm90_fp8(data, scale)
                                                 : pack_sm90_bf16(at::stack(values));
    there = Weight(std::move(*packed)).to(card());
  }
};

constexpr WeightFormat kExpertFormats[] = {WeightFormat::kFp4, WeightFormat::kFp8,
                                           WeightFormat::kBf16};

TEST_P(Sm90Products, Experts) {
  const int64_t experts = 6, rows = GetParam();
  // Nobody chooses the first, the third and the last.
  const at::Tensor offsets = at::tensor(
      {int64_t{0}, int64_t{0}, (rows + 1) / 2, (rows + 1) / 2, rows - rows / 4, rows, rows},
      at::kLong);
  for (const WeightFormat format : kExpertFormats) {
    // Only tiles of FP4 are whole ones.
    const bool bf16 = format == WeightFormat::kBf16;
    const int64_t out = format == WeightFormat::kFp4 ? 192 : 200, in = bf16 ? 1096 : 384;
    const ExpertWeights w(format, experts, out, in, 40);
    const at::Tensor x = bf16 ? bf16_rows({rows, in}) : fp8_rows(rows, in);
    std::vector<at::Tensor> expected;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t first = offsets[e].item<int64_t>(), end = offsets[e + 1].item<int64_t>();
      if (end == first) continue;
      const at::Tensor &of = w.values[static_cast<size_t>(e)],
                       mine = x.narrow(0, first, end - first);
      expected.push_back(bf16 ? twin_bf16(mine, of) : twin_fp8(mine, of));
    }
    EXPECT_TRUE(
        same_bits(grouped_linear(x.to(card()), w.there, offsets.to(card()), GemmRole::kFp4).cpu(),
                  at::cat(expected).to(at::kBFloat16)))
        << static_cast<int>(format);
  }
}

// The fused chain against the ops one after the other, which the tests above hold to the twin.
TEST_P(Sm90Products, ExpertsAsOneChain) {
  const int64_t experts = 9, topk = 3, dim = 256, inter = 128, tokens = GetParam();
  for (const WeightFormat format : kExpertFormats) {
    const Numerics numerics = format == WeightFormat::kBf16 ? Numerics::kBf16 : Numerics::kReleased;
    const ExpertWeights w1(format, experts, inter, dim, 60), w3(format, experts, inter, dim, 70),
        w2(format, experts, dim, inter, 80);
    const at::Tensor x = (bf16_rows({tokens, dim}) * 0.01).to(card()),
                     shared = bf16_rows({tokens, dim}).to(card());
    const Routing routing = gate((at::randn({tokens, experts}) * 3).to(card()),
                                 at::zeros({experts}).to(card()), topk, 1.5);
    const Permutation order = permute_by_expert(routing.experts.to(at::kLong), experts);
    const auto product = [&](const Weight& w, const at::Tensor& in) {
      return grouped_linear(quantise_input(in, GemmRole::kFp4, numerics), w, order.offsets,
                            GemmRole::kFp4);
    };
    const at::Tensor rows = permute_rows(x, order);
    const at::Tensor hidden = swiglu(product(w1.there, rows), product(w3.there, rows),
                                     routing.weights.flatten().index_select(0, order.slot), 2.0);
    const at::Tensor expected = combine(product(w2.there, hidden), order, shared);
    const RoutedExperts chain{.w1 = w1.there, .w3 = w3.there, .w2 = w2.there, .swiglu_limit = 2.0};
    ASSERT_TRUE(serves_experts_sm90(x, chain, numerics));
    const Numerics other = format == WeightFormat::kBf16 ? Numerics::kReleased : Numerics::kBf16;
    EXPECT_FALSE(serves_experts_sm90(x, chain, other));
    SideBranch beside(0);
    const ExpertRoute route = route_on_sm90(routing, experts);
    EXPECT_TRUE(same_bits(experts_on_sm90(x, route, chain, shared, beside).cpu(), expected.cpu()))
        << static_cast<int>(format);
  }
}

}  // namespace
}  // namespace hadal::ops
