#include "ops/gemm/trained_product.h"

#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "base/check.h"
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

}  // namespace
}  // namespace hadal::ops
