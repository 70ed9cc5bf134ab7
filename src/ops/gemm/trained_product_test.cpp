#include "ops/gemm/trained_product.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/quant/e4m3_operands.h"
#include "ops/quant/official_storage.h"
#include "ops/quant/round_trip.h"
#include "ops/sum_tree.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

/// Which leaves are added to which, as text: the tree itself.
std::string tree_of(const std::vector<uint64_t>& numbers) {
  SumSchedule schedule;
  for (const uint64_t number : numbers) schedule.add(number);
  schedule.finish();
  std::vector<std::string> stack;
  for (size_t i = 0; i < numbers.size(); ++i) {
    stack.push_back(std::to_string(numbers[i]));
    for (int32_t merge = 0; merge < schedule.merges()[i]; ++merge) {
      const std::string right = stack.back();
      stack.pop_back();
      stack.back() = concat("(", stack.back(), " ", right, ")");
    }
    EXPECT_LE(std::ssize(stack), schedule.depth());
  }
  EXPECT_EQ(stack.size(), 1u);
  return stack.back();
}

TEST(SumSchedule, IsTheTreeOfTheNumbersInBinary) {
  EXPECT_EQ(tree_of({0}), "0");
  EXPECT_EQ(tree_of({0, 1, 2}), "((0 1) 2)");
  EXPECT_EQ(tree_of({0, 1, 2, 3, 4, 5, 6}), "(((0 1) (2 3)) ((4 5) 6))");
  // Absent leaves change no other's place.
  EXPECT_EQ(tree_of({1, 2, 3, 6}), "((1 (2 3)) 6)");
  EXPECT_EQ(tree_of({3, 4}), "(3 4)");
  EXPECT_EQ(tree_of({5, 1ull << 63}), concat("(5 ", 1ull << 63, ")"));
}

class TrainedProduct : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override { at::manual_seed(3); }
  at::Tensor random(at::IntArrayRef shape) const { return at::randn(shape).to(GetParam()); }
};

/// Rows by expert with an empty one and one of a single row, and their tokens' places among 700.
struct Rows {
  at::Tensor offsets = at::tensor({0, 200, 200, 201, 460}, at::kLong);
  at::Tensor places;
  Rows() {
    std::vector<at::Tensor> parts;
    for (const int64_t count : {200, 1, 259})
      parts.push_back(std::get<0>(at::randperm(700).narrow(0, 0, count).sort()));
    places = at::cat(parts);
  }
};

// The sum of a dense product: 5 chunks, the last one short; widths that are no multiple of a panel.
TEST_P(TrainedProduct, WeightGradientIsNearTheReferenceWhateverTheMachine) {
  for (const int64_t rows : {1, 7, 128, 557}) {
    const at::Tensor dy = random({rows, 101}), x = random({rows, 70});
    const auto run = [](const std::vector<at::Tensor>& in) {
      return std::vector{weight_gradient(in[0], in[1])};
    };
    const at::Tensor dw = testing::expect_machine_independent(run, {dy, x})[0];
    const at::Tensor exact = at::mm(dy.to(at::kDouble).t(), x.to(at::kDouble));
    EXPECT_EQ(dw.scalar_type(), at::kFloat);
    EXPECT_LT((dw.to(at::kDouble) - exact).abs().max().item<double>(),
              2e-6 * exact.abs().max().item<double>())
        << rows;
  }
}

TEST_P(TrainedProduct, GroupedGradientsAreNearTheReference) {
  const Rows rows;
  const at::Tensor x = random({460, 48}), w = random({4, 33, 48}), dy = random({460, 33});
  const auto run = [&](const std::vector<at::Tensor>& in) {
    const at::AutoGradMode enable(true);
    const at::Tensor leaf = in[0].detach().requires_grad_(true);
    const at::Tensor master = in[1].detach().to(at::kFloat).requires_grad_(true);
    const at::Tensor y =
        trained_grouped_linear(leaf, in[1], master, rows.offsets, rows.places, GemmRole::kFp4);
    std::vector<at::Tensor> out = torch::autograd::grad({y}, {leaf, master}, {in[2]});
    out.push_back(y.detach());
    return out;
  };
  const std::vector<at::Tensor> out = testing::expect_machine_independent(run, {x, w, dy});
  const auto wide = [](const at::Tensor& t) { return t.to(at::kDouble); };
  const at::Tensor exact_dw = reference::grouped_weight_gradient(wide(dy), wide(x), rows.offsets);
  EXPECT_LT((wide(out[1]) - exact_dw).abs().max().item<double>(),
            2e-6 * exact_dw.abs().max().item<double>());
  EXPECT_EQ(out[1][1].abs().max().item<float>(), 0.0f);  // an expert without rows
  const at::Tensor exact_dx = reference::grouped_linear(
      wide(dy), wide(w.transpose(1, 2).contiguous()), rows.offsets, GemmRole::kFp4);
  EXPECT_LT((wide(out[0]) - exact_dx).abs().max().item<double>(),
            (GetParam() == at::kFloat ? 2e-6 : 4e-3) * exact_dx.abs().max().item<double>());
  const at::Tensor y = grouped_linear(x, w, rows.offsets, GemmRole::kFp4);
  EXPECT_TRUE(testing::same_bits(out[2], y));
}

TEST_P(TrainedProduct, GroupGradientsAreThoseOfEachGroup) {
  const at::Tensor x = random({150, 3, 40}), w = random({3, 24, 40}), dy = random({150, 3, 24});
  const at::Tensor leaf = x.detach().requires_grad_(true);
  const at::Tensor master = w.detach().to(at::kFloat).reshape({72, 40}).requires_grad_(true);
  const auto grads =
      torch::autograd::grad({trained_group_linear(leaf, w, master)}, {leaf, master}, {dy});
  for (int64_t g = 0; g < 3; ++g) {
    const at::Tensor dy_g = dy.select(1, g).contiguous(), x_g = x.select(1, g).contiguous();
    EXPECT_TRUE(testing::same_bits(grads[1].narrow(0, g * 24, 24), weight_gradient(dy_g, x_g)));
    EXPECT_TRUE(testing::same_bits(grads[0].select(1, g).contiguous(), input_gradient(dy_g, w[g])));
  }
}

// The tree is over places: rows of aligned runs of chunks, summed apart, are its subtrees.
TEST_P(TrainedProduct, AlignedRunsOfChunksAreSubtrees) {
  const at::Tensor dy = random({4 * kSumChunk, 30}), x = random({4 * kSumChunk, 40});
  const auto part = [&](int64_t from, int64_t count) {
    return weight_gradient(dy.narrow(0, from * kSumChunk, count * kSumChunk),
                           x.narrow(0, from * kSumChunk, count * kSumChunk));
  };
  const at::Tensor whole = weight_gradient(dy, x);
  EXPECT_TRUE(testing::same_bits(whole, part(0, 2) + part(2, 2)));
  EXPECT_TRUE(testing::same_bits(whole, (part(0, 1) + part(1, 1)) + (part(2, 1) + part(3, 1))));
  EXPECT_FALSE(testing::same_bits(whole, part(0, 1) + part(1, 3)));
}

// An expert's rows are cut by where their tokens stand, not by their number.
TEST_P(TrainedProduct, ExpertsAreCutByPlace) {
  const Rows rows;
  const at::Tensor x = random({460, 16}), w = random({4, 16, 16}), dy = random({460, 16});
  const auto gradient = [&](const at::Tensor& places) {
    const at::Tensor master = w.detach().to(at::kFloat).requires_grad_(true);
    const at::Tensor y = trained_grouped_linear(x, w, master, rows.offsets, places, GemmRole::kFp4);
    return torch::autograd::grad({y}, {master}, {dy})[0];
  };
  const at::Tensor all = gradient(rows.places);
  // Places 0 to 511 and 512 to 1023 are two subtrees.
  at::Tensor sum = at::full_like(all, kNoSum);  // an expert without rows in a half has this there
  for (const bool late : {false, true}) {
    for (int64_t e = 0; e < 4; ++e) {
      const int64_t begin = rows.offsets[e].item<int64_t>(),
                    count = rows.offsets[e + 1].item<int64_t>() - begin;
      const at::Tensor mine =
          ((rows.places.narrow(0, begin, count) >= 512) == late).nonzero().flatten() + begin;
      if (mine.size(0) == 0) continue;
      const at::Tensor offsets = at::tensor({int64_t{0}, mine.size(0)}, at::kLong);
      const at::Tensor master = w[e].to(at::kFloat).unsqueeze(0).requires_grad_(true);
      const at::Tensor y =
          trained_grouped_linear(x.index_select(0, mine), w[e].unsqueeze(0), master, offsets,
                                 rows.places.index_select(0, mine), GemmRole::kFp4);
      sum[e] += torch::autograd::grad({y}, {master}, {dy.index_select(0, mine)})[0][0];
    }
  }
  EXPECT_TRUE(testing::same_bits(all, sum));
  EXPECT_FALSE(testing::same_bits(all, gradient({})));
  const at::Tensor reversed = rows.places.flip(0);
  EXPECT_THROW(gradient(reversed), Error);
}

INSTANTIATE_TEST_SUITE_P(Types,
                         TrainedProduct,
                         ::testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& type) {
                           return type.param == at::kFloat ? "FP32" : "BF16";
                         });

// The router's products: BF16 rows, FP32 results and gradients.
TEST(TrainedLinear, WideGradientsOfNarrowRows) {
  at::manual_seed(5);
  const at::Tensor x = at::randn({70, 32}).to(at::kBFloat16).requires_grad_(true);
  const at::Tensor w = at::randn({12, 32}), dy = at::randn({70, 12});
  const at::Tensor master = w.clone().requires_grad_(true);
  const at::Tensor y = trained_linear(x, w.to(at::kBFloat16), master, GemmRole::kFp32);
  EXPECT_EQ(y.scalar_type(), at::kFloat);
  const auto grads = torch::autograd::grad({y}, {x, master}, {dy});
  EXPECT_EQ(grads[0].scalar_type(), at::kBFloat16);
  const at::Tensor wide = x.detach().to(at::kFloat);
  EXPECT_TRUE(testing::same_bits(grads[1], weight_gradient(dy, wide)));
  EXPECT_TRUE(testing::same_bits(
      grads[0], input_gradient(dy, w.to(at::kBFloat16).to(at::kFloat)).to(at::kBFloat16)));
}

// --- products of E4M3 operands (`fp8`)

/// sum over k of a[k] b[k] as the kernel adds BF16 values: slabs of 128, pairs, the odd one first.
float scalar_dot(const float* a, const float* b, int64_t count) {
  const auto add = [&](int64_t k, float acc) {
    return k < count ? std::fma(a[k], b[k], acc) : acc;
  };
  float total = 0;
  for (int64_t slab = 0; slab < count; slab += 128) {
    float sum = 0;
    for (int64_t k = slab; k < std::min(count, slab + 128); k += 2)
      sum = k + 1 < std::min(count, slab + 128) ? add(k, add(k + 1, sum)) : add(k, sum);
    total += sum;
  }
  return total;
}

/// a [m, k] times b [n, k] by scalar_dot.
at::Tensor scalar_product(const at::Tensor& a_any, const at::Tensor& b_any) {
  const at::Tensor a = a_any.to(at::kFloat).contiguous(), b = b_any.to(at::kFloat).contiguous();
  at::Tensor y = at::empty({a.size(0), b.size(0)}, at::kFloat);
  for (int64_t i = 0; i < a.size(0); ++i) {
    for (int64_t j = 0; j < b.size(0); ++j)
      y[i][j] = scalar_dot(a.const_data_ptr<float>() + i * a.size(1),
                           b.const_data_ptr<float>() + j * b.size(1), a.size(1));
  }
  return y;
}

struct Fp8Case {
  at::Tensor x, w, dy;  ///< rounded rows, rounded weights, gradients of many sizes
  Fp8Case(int64_t rows, int64_t out, int64_t in) {
    at::manual_seed(9);
    x = fp8_round_trip(at::randn({rows, in}).to(at::kBFloat16), 128);
    w = official_rounding(at::randn({out, in}) * 0.05, OfficialStorage::kFp8);
    dy = (at::randn({rows, out}) * at::exp2(at::randint(-40, -20, {rows, 1}).to(at::kFloat)))
             .to(at::kBFloat16);
  }
  /// dx, dw, y
  std::vector<at::Tensor> gradients(Numerics numerics = Numerics::kFp8) const {
    const auto run = [&](const std::vector<at::Tensor>& in) {
      const at::AutoGradMode enable(true);
      const at::Tensor leaf = in[0].detach().requires_grad_(true);
      const at::Tensor master = in[1].detach().to(at::kFloat).requires_grad_(true);
      const at::Tensor y = trained_linear(leaf, in[1], master, GemmRole::kFp8, numerics);
      std::vector<at::Tensor> grads = torch::autograd::grad({y}, {leaf, master}, {in[2]});
      grads.push_back(y.detach());
      return grads;
    };
    return testing::expect_machine_independent(run, {x, w, dy});
  }
};

TEST(TrainedFp8, HasTheBitsOfTheScalarTree) {
  const Fp8Case c(2 * kSumChunk + 44, 160, 128);
  const std::vector<at::Tensor> found = c.gradients();
  // y and dx: slabs of 128; the second of the outputs is short.
  EXPECT_TRUE(testing::same_bits(found[2], scalar_product(c.x, c.w).to(at::kBFloat16)));
  EXPECT_TRUE(testing::same_bits(
      found[0],
      scalar_product(reference::e4m3_rows(c.dy, 128), c.w.t().contiguous()).to(at::kBFloat16)));
  // dw: chunks of 128 rows, each with scales of its own; then ((0 1) 2).
  std::vector<at::Tensor> chunks;
  for (int64_t first = 0; first < c.x.size(0); first += kSumChunk) {
    const int64_t count = std::min(kSumChunk, c.x.size(0) - first);
    const auto operand = [&](const at::Tensor& rows) {
      const at::Tensor mine = rows.narrow(0, first, count);
      return reference::e4m3_columns(mine, {0, count}).t();
    };
    chunks.push_back(scalar_product(operand(c.dy), operand(c.x)));
  }
  EXPECT_TRUE(testing::same_bits(found[1], (chunks[0] + chunks[1]) + chunks[2]));
  // And not those of BF16 operands.
  const std::vector<at::Tensor> bf16 = c.gradients(Numerics::kReleased);
  EXPECT_TRUE(testing::same_bits(found[2], bf16[2]));
  EXPECT_FALSE(testing::same_bits(found[0], bf16[0]));
  EXPECT_FALSE(testing::same_bits(found[1], bf16[1]));
}

// Each operand is off by 2^-4 of itself at most, or by half the least code of its group.
TEST(TrainedFp8, IsNearTheProductInFp64) {
  const Fp8Case c(300, 256, 384);
  const std::vector<at::Tensor> found = c.gradients();
  const auto wide = [](const at::Tensor& t) { return t.to(at::kDouble); };
  const at::Tensor dx = at::mm(wide(c.dy), wide(c.w)), dw = at::mm(wide(c.dy).t(), wide(c.x));
  const at::Tensor dx_bound = at::mm(wide(c.dy).abs(), wide(c.w).abs());
  EXPECT_LE(((wide(found[0]) - dx).abs() / dx_bound).max().item<double>(), 0x1p-4 + 0x1p-8);
  // Along tokens sizes differ by 2^20: the small ones fall below the least code.
  const double largest = at::mm(wide(c.dy).abs().t(), wide(c.x).abs()).max().item<double>();
  EXPECT_LE((wide(found[1]) - dw).abs().max().item<double>(), 0x1p-3 * largest);
  EXPECT_LE((wide(found[1]) - dw).norm().item<double>(), 0.04 * dw.norm().item<double>());
  EXPECT_LE((wide(found[0]) - dx).norm().item<double>(), 0.04 * dx.norm().item<double>());
}

TEST(TrainedFp8, GradientsFarBelowTheFloorOfActivationsKeepTheirBits) {
  const Fp8Case c(200, 128, 128);
  Fp8Case tiny = c;
  tiny.dy = c.dy * 0x1p-30;
  const std::vector<at::Tensor> a = c.gradients(), b = tiny.gradients();
  EXPECT_GT(a[1].abs().max().item<float>(), 0.0f);
  EXPECT_TRUE(testing::same_bits(a[1] * 0x1p-30, b[1]));
  EXPECT_TRUE(testing::same_bits(a[0] * 0x1p-30, b[0]));
}

TEST(TrainedFp8, GroupsOfScalesAreChunksOfPlaces) {
  const Rows rows;
  for (int64_t e = 0; e < 4; ++e) {
    const int64_t begin = rows.offsets[e].item<int64_t>(),
                  end = rows.offsets[e + 1].item<int64_t>();
    const std::vector<int64_t> groups = e4m3_groups(460, rows.offsets, rows.places);
    for (int64_t r = begin + 1; r < end; ++r) {
      const bool cut = rows.places[r].item<int64_t>() / kSumChunk !=
                       rows.places[r - 1].item<int64_t>() / kSumChunk;
      EXPECT_EQ(std::ranges::find(groups, r) != groups.end(), cut) << r;
    }
    EXPECT_NE(std::ranges::find(groups, end), groups.end());
  }
  EXPECT_EQ(e4m3_groups(300, {}, {}), (std::vector<int64_t>{0, 128, 256, 300}));
  // Several rows a place: 128 of them share a scale at most.
  const at::Tensor four = at::arange(600).div(4, "floor");
  EXPECT_EQ(e4m3_groups(600, {}, four), (std::vector<int64_t>{0, 128, 256, 384, 512, 600}));
}

TEST(TrainedFp8, ExpertsAreCutByPlaceAndTheirChunksAreSubtrees) {
  const Rows rows;
  at::manual_seed(4);
  const at::Tensor x = fp8_round_trip(at::randn({460, 128}).to(at::kBFloat16), 128);
  const at::Tensor w = official_rounding(at::randn({4, 128, 128}), OfficialStorage::kFp8);
  const at::Tensor dy = at::randn({460, 128}).to(at::kBFloat16);
  const auto gradients = [&](const at::Tensor& of_x, const at::Tensor& of_w,
                             const at::Tensor& of_dy, const at::Tensor& offsets,
                             const at::Tensor& places) {
    const at::Tensor leaf = of_x.detach().requires_grad_(true);
    const at::Tensor master = of_w.detach().to(at::kFloat).requires_grad_(true);
    const at::Tensor y =
        trained_grouped_linear(leaf, of_w, master, offsets, places, GemmRole::kFp8, Numerics::kFp8);
    return torch::autograd::grad({y}, {leaf, master}, {of_dy});
  };
  const auto all = gradients(x, w, dy, rows.offsets, rows.places);
  at::Tensor sum = at::full_like(all[1], kNoSum);
  for (const bool late : {false, true}) {
    for (int64_t e = 0; e < 4; ++e) {
      const int64_t begin = rows.offsets[e].item<int64_t>(),
                    count = rows.offsets[e + 1].item<int64_t>() - begin;
      const at::Tensor mine =
          ((rows.places.narrow(0, begin, count) >= 512) == late).nonzero().flatten() + begin;
      if (mine.size(0) == 0) continue;
      const auto part = gradients(
          x.index_select(0, mine), w[e].unsqueeze(0), dy.index_select(0, mine),
          at::tensor({int64_t{0}, mine.size(0)}, at::kLong), rows.places.index_select(0, mine));
      sum[e] += part[1][0];
      EXPECT_TRUE(testing::same_bits(part[0], all[0].index_select(0, mine)));
    }
  }
  EXPECT_TRUE(testing::same_bits(all[1], sum));
}

TEST(TrainedFp8, WhatIsNotFiniteReachesTheGradients) {
  for (const double bad : {NAN, INFINITY}) {
    Fp8Case c(130, 128, 128);
    c.dy[129][5] = bad;
    const std::vector<at::Tensor> dy = c.gradients();
    EXPECT_TRUE(dy[0][129].isnan().all().item<bool>());
    EXPECT_TRUE(dy[1][5].isnan().all().item<bool>());
    EXPECT_FALSE(dy[1][6].isnan().any().item<bool>());
    Fp8Case rows(130, 128, 128);
    rows.x[3][7] = bad;
    EXPECT_TRUE(rows.gradients()[1].select(1, 7).isnan().all().item<bool>());
  }
}

}  // namespace
}  // namespace hadal::ops
