#include "ops/gemm/linear.h"

#include <cmath>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/cpu.h"
#include "base/parallel.h"
#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

using testing::fp4;
using testing::fp8;
using testing::fp8_rows;
using testing::make_fp4;
using testing::make_fp8;
using testing::same_bits;
using testing::Stored;

/// The contract's tree in scalar code: pairs of K, the odd element first, slabs in order.
at::Tensor tree(const at::Tensor& x, const at::Tensor& w, int64_t slab) {
  const at::Tensor a = x.to(at::kFloat), b = w.to(at::kFloat);
  const int64_t rows = x.size(0), out = w.size(0), in = w.size(1);
  const bool pairs = w.scalar_type() == at::kBFloat16;
  const auto* px = a.const_data_ptr<float>();
  const auto* pw = b.const_data_ptr<float>();
  at::Tensor y = at::empty({rows, out}, at::kFloat);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < out; ++o) {
      const auto add = [&](int64_t k, float acc) {
        return k < in ? std::fma(pw[o * in + k], px[r * in + k], acc) : acc;
      };
      float total = 0;
      for (int64_t s = 0; s < in; s += slab) {
        float acc = 0;
        for (int64_t k = s; k < std::min(in, s + slab); k += 2)
          acc = pairs ? add(k, add(k + 1, acc)) : add(k + 1, add(k, acc));
        total += acc;
      }
      y.data_ptr<float>()[r * out + o] = total;
    }
  }
  return y;
}

class Linear : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    at::manual_seed(1);
    if (GetParam() > static_cast<int>(detect_isa())) GTEST_SKIP() << "this processor lacks it";
    force_isa(static_cast<Isa>(GetParam()));
  }
  void TearDown() override { force_isa(detect_isa()); }
};

const int64_t kRowCounts[] = {1, 2, 3, 4, 5, 6, 7, 13};

/// Rows whose sums are exact in any order beside rows whose are not: values of every size, a last
/// bit far below the sum, all zeros, infinities.
at::Tensor mixed_rows(int64_t rows, int64_t in) {
  at::Tensor x = fp8_rows(rows, in).to(at::kFloat);
  for (int64_t r = 0; r < rows; ++r) {
    switch (r % 7) {
      case 1:
        x[r] = at::randn({in});  // eight significant bits each
        break;
      case 2:
        x[r] = at::randn({in}) * at::exp2(at::randint(-40, 20, {in}).to(at::kFloat));
        break;
      case 3:
        x[r].fill_(448.0);
        x[r][static_cast<int64_t>(r) % in] = 0x1p-9;
        break;
      case 4:
        x[r].zero_();
        break;
      case 5:
        x[r] = x[r] * 0x1p-120f;
        break;
      default:
        break;
    }
  }
  return x.to(at::kBFloat16);
}

TEST_P(Linear, Fp4RowsThatRoundAndRowsThatDoNot) {
  for (const auto& [rows, out, in] :
       {std::tuple{16, 64, 128}, {96, 128, 256}, {100, 48, 384}, {5, 16, 64}, {33, 200, 1024}}) {
    const Stored s = make_fp4(out, in, 5);
    for (const at::Tensor& x : {mixed_rows(rows, in), fp8_rows(rows, in)}) {
      const at::Tensor many = linear(x, fp4(s), GemmRole::kFp4);
      for (int64_t r = 0; r < rows; ++r) {
        const at::Tensor one = linear(x.narrow(0, r, 1), fp4(s), GemmRole::kFp4);
        ASSERT_TRUE(same_bits(many.narrow(0, r, 1), one)) << rows << " rows, row " << r;
      }
    }
  }
}

TEST_P(Linear, Fp4HasTheBitsOfItsDenseValuesAndOfTheTree) {
  for (const int64_t out : {1, 16, 40, 64, 100, 200}) {
    for (const int64_t in : {32, 96, 320}) {
      const Stored s = make_fp4(out, in, 1);
      const Panels packed = fp4(s);
      const at::Tensor x = fp8_rows(13, in);
      const at::Tensor expected = tree(x, s.values, 32).to(at::kBFloat16);
      for (const int64_t rows : kRowCounts) {
        const at::Tensor y = linear(x.narrow(0, 0, rows), packed, GemmRole::kFp4);
        EXPECT_TRUE(same_bits(y, expected.narrow(0, 0, rows))) << out << " " << in << " " << rows;
        EXPECT_TRUE(same_bits(y, linear(x.narrow(0, 0, rows), s.values, GemmRole::kFp4)));
      }
    }
  }
}

/// FP32 scales beside FP8 codes; `power`: powers of two.
at::Tensor factors_like(const at::Tensor& scale, bool power) {
  if (power) return at::exp2(scale.to(at::kFloat) - 127.0f);
  return (at::rand(scale.sizes()) + 0.5) * at::exp2(scale.to(at::kFloat) - 127.0f);
}

/// The tree of FP8 with FP32 scales: slab sums of codes, each times its scale by one fused
/// multiply-add.
at::Tensor factor_tree(const at::Tensor& x_any, const Stored& s, const at::Tensor& factors) {
  const at::Tensor x = x_any.to(at::kFloat), codes = s.data.to(at::kFloat).to(at::kBFloat16);
  const int64_t rows = x.size(0), out = codes.size(0), in = codes.size(1);
  at::Tensor y = at::zeros({rows, out}, at::kFloat);
  auto* py = y.data_ptr<float>();
  for (int64_t k = 0; k < in; k += 128) {
    const int64_t count = std::min<int64_t>(128, in - k);
    const at::Tensor sums =
        tree(x.narrow(1, k, count).contiguous(), codes.narrow(1, k, count).contiguous(), 128);
    for (int64_t i = 0; i < rows * out; ++i) {
      const float factor = factors[i % out / 128][k / 128].item<float>();
      py[i] = std::fma(sums.const_data_ptr<float>()[i], factor, py[i]);
    }
  }
  return y;
}

TEST_P(Linear, Fp8WithScalesOfAnyValueHasTheBitsOfItsTree) {
  for (const int64_t out : {1, 40, 64, 200}) {
    for (const int64_t in : {2, 77, 330}) {
      const Stored s = make_fp8(out, in, 2);
      const at::Tensor x = fp8_rows(13, in), factors = factors_like(s.scale, false);
      const auto packed = pack_fp8({s.data}, {factors});
      ASSERT_TRUE(packed.has_value());
      const at::Tensor expected = factor_tree(x, s, factors).to(at::kBFloat16);
      for (const int64_t rows : kRowCounts) {
        const at::Tensor y = linear(x.narrow(0, 0, rows), *packed, GemmRole::kFp8);
        EXPECT_TRUE(same_bits(y, expected.narrow(0, 0, rows))) << out << " " << in << " " << rows;
      }
      const auto powers = pack_fp8({s.data}, {factors_like(s.scale, true)});
      EXPECT_TRUE(same_bits(linear(x, *powers, GemmRole::kFp8), linear(x, fp8(s), GemmRole::kFp8)));
    }
  }
}

TEST_P(Linear, Fp8ExpertsWithScalesOfAnyValue) {
  std::vector<at::Tensor> data, scale;
  for (int seed = 0; seed < 3; ++seed) {
    const Stored s = make_fp8(136, 256, seed);
    data.push_back(s.data);
    scale.push_back(factors_like(s.scale, false));
  }
  const auto stack = pack_fp8(data, scale);
  ASSERT_TRUE(stack.has_value());
  const at::Tensor x = fp8_rows(20, 256), offsets = at::tensor({0, 7, 7, 20}, at::kLong);
  const at::Tensor y = grouped_linear(x, *stack, offsets, GemmRole::kFp8);
  for (const auto& [expert, begin, count] : {std::tuple{0, 0, 7}, {2, 7, 13}}) {
    const auto i = static_cast<size_t>(expert);
    const auto one = pack_fp8({data[i]}, {scale[i]});
    EXPECT_TRUE(same_bits(y.narrow(0, begin, count),
                          linear(x.narrow(0, begin, count), *one, GemmRole::kFp8)));
  }
}

TEST_P(Linear, Fp8HasTheBitsOfItsDenseValuesAndOfTheTree) {
  for (const int64_t out : {1, 16, 40, 64, 100, 200}) {
    for (const int64_t in : {2, 77, 128, 330}) {
      const Stored s = make_fp8(out, in, 2);
      const Panels packed = fp8(s);
      const at::Tensor x = fp8_rows(13, in);
      for (const GemmRole role : {GemmRole::kFp32, GemmRole::kFp8, GemmRole::kFp4}) {
        at::Tensor expected = tree(x, s.values, slab_length(role));
        if (role != GemmRole::kFp32) expected = expected.to(at::kBFloat16);
        for (const int64_t rows : kRowCounts) {
          const at::Tensor y = linear(x.narrow(0, 0, rows), packed, role);
          EXPECT_TRUE(same_bits(y, expected.narrow(0, 0, rows))) << out << " " << in << " " << rows;
          EXPECT_TRUE(same_bits(y, linear(x.narrow(0, 0, rows), s.values, role)));
        }
      }
    }
  }
}

TEST_P(Linear, Fp32WeightsWalkTheTreeElementByElement) {
  for (const int64_t in : {3, 128, 301}) {
    const at::Tensor w = at::randn({75, in}), x = at::randn({13, in});
    const at::Tensor expected = tree(x, w, 128);
    for (const int64_t rows : kRowCounts) {
      EXPECT_TRUE(
          same_bits(linear(x.narrow(0, 0, rows), w, GemmRole::kFp32), expected.narrow(0, 0, rows)))
          << in << " " << rows;
    }
  }
}

TEST_P(Linear, RowsAndThreadsChangeNoBit) {
  const int threads = num_threads();
  const Stored a = make_fp4(320, 160, 3), b = make_fp8(320, 160, 4);
  const at::Tensor x = fp8_rows(300, 160);
  for (const auto& [packed, role] : {std::pair(fp4(a), GemmRole::kFp4), {fp8(b), GemmRole::kFp8}}) {
    const at::Tensor all = linear(x, packed, role);
    for (const int count : {1, 2, 3}) {
      set_num_threads(count);
      EXPECT_TRUE(same_bits(linear(x, packed, role), all));
      for (int64_t row = 0; row < 300; row += 13)
        EXPECT_TRUE(same_bits(linear(x.narrow(0, row, 1), packed, role), all.narrow(0, row, 1)));
    }
  }
  set_num_threads(threads);
}

TEST_P(Linear, IsCloseToTheReference) {
  const Stored a = make_fp4(200, 512, 5), b = make_fp8(200, 512, 6);
  const at::Tensor x = fp8_rows(70, 512);
  for (const auto& [packed, values, role] :
       {std::tuple(fp4(a), a.values, GemmRole::kFp4), {fp8(b), b.values, GemmRole::kFp8}}) {
    const at::Tensor y = linear(x, packed, role).to(at::kDouble);
    const at::Tensor exact = at::linear(x.to(at::kDouble), values.to(at::kDouble));
    // One rounding to BF16, and FP32 sums against the size of what they add up.
    const at::Tensor size = at::linear(x.to(at::kDouble).abs(), values.to(at::kDouble).abs());
    EXPECT_TRUE(((y - exact).abs() <= exact.abs() * 0x1p-8 + size * 0x1p-20).all().item<bool>());
    const at::Tensor by_reference = reference::linear(x, values, role).to(at::kDouble);
    EXPECT_TRUE(
        ((y - by_reference).abs() <= exact.abs() * 0x1p-7 + size * 0x1p-20).all().item<bool>());
  }
}

TEST_P(Linear, GroupedAndPerGroupFormsAreTheirMatricesOneByOne) {
  std::vector<at::Tensor> data, scale, wide_data, wide_scale;
  std::vector<Stored> experts, groups;
  for (unsigned i = 0; i < 5; ++i) {
    experts.push_back(make_fp4(72, 64, 10 + i));
    data.push_back(experts.back().data);
    scale.push_back(experts.back().scale);
    groups.push_back(make_fp8(128, 160, 20 + i));
    wide_data.push_back(groups.back().data);
    wide_scale.push_back(groups.back().scale);
  }
  const Panels packed = pack_fp4(data, scale).value();
  const std::vector<int64_t> bounds = {0, 3, 3, 110, 111, 111};  // two experts without a row
  const at::Tensor x = fp8_rows(111, 64), offsets = at::tensor(bounds, at::kLong);
  const at::Tensor y = grouped_linear(x, packed, offsets, GemmRole::kFp4);
  for (size_t e = 0; e < 5; ++e) {
    const int64_t rows = bounds[e + 1] - bounds[e];
    if (rows == 0) continue;
    EXPECT_TRUE(same_bits(y.narrow(0, bounds[e], rows),
                          linear(x.narrow(0, bounds[e], rows), fp4(experts[e]), GemmRole::kFp4)));
  }
  EXPECT_TRUE(same_bits(y, grouped_linear(x, unpack_panels(packed), offsets, GemmRole::kFp4)));

  const Panels grouped = pack_fp8(wide_data, wide_scale).value();
  for (const int64_t tokens : {1, 9}) {
    const at::Tensor rows = fp8_rows(tokens * 5, 160).reshape({tokens, 5, 160});
    const at::Tensor out = group_linear(rows, grouped);
    for (int64_t g = 0; g < 5; ++g) {
      EXPECT_TRUE(same_bits(
          out.select(1, g),
          linear(rows.select(1, g), fp8(groups[static_cast<size_t>(g)]), GemmRole::kBf16)));
    }
    EXPECT_TRUE(same_bits(out, group_linear(rows, unpack_panels(grouped))));
  }
}

TEST_P(Linear, NoRowsGiveNoRows) {
  const Panels packed = fp4(make_fp4(40, 64, 7));
  EXPECT_EQ(linear(fp8_rows(0, 64), packed, GemmRole::kFp4).sizes(), at::IntArrayRef({0, 40}));
  EXPECT_EQ(
      grouped_linear(fp8_rows(0, 64), packed, at::zeros({2}, at::kLong), GemmRole::kFp4).sizes(),
      at::IntArrayRef({0, 40}));
}

INSTANTIATE_TEST_SUITE_P(Isas, Linear, ::testing::Values(0, 1, 2));

TEST(LinearPanels, AreConstantsToAutograd) {
  const Stored s = make_fp8(64, 128, 1);
  const at::Tensor x = fp8_rows(3, 128).requires_grad_(true);
  const at::Tensor y = linear(x, fp8(s), GemmRole::kFp8);
  y.sum().backward();
  EXPECT_TRUE(same_bits(y.detach(), linear(x.detach(), fp8(s), GemmRole::kFp8)));
  EXPECT_TRUE(at::allclose(x.grad().to(at::kFloat), s.values.to(at::kFloat).sum(0).expand({3, 128}),
                           1e-2, 1e-3));
}

}  // namespace
}  // namespace hadal::ops
