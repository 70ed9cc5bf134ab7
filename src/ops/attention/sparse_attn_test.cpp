#include "ops/attention/sparse_attn.h"

#include <cmath>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/attention/attention_cpu.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

struct Case {
  const char* name;
  int64_t window, ratio, topk;  // topk 0: every visible block
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class SparseAttn : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kHeads = 3, kDim = 20;
  // Two sequences; the first has more than 64 blocks when the ratio is small.
  std::vector<int64_t> lengths_ = {150, 41};
  int64_t tokens_ = 191;

  void SetUp() override {
    at::manual_seed(5);
    q_ = at::randn({tokens_, kHeads, kDim}, at::kDouble);
    kv_ = at::randn({tokens_, kDim}, at::kDouble);
    sink_ = at::randn({kHeads}, at::kDouble);
    batch_ = std::make_unique<Batch>(lengths_, std::vector<int64_t>{0, 0}, at::kCPU);
    const Case& c = GetParam();
    params_ = {.window = c.window, .scale = 0.3, .ratio = c.ratio};
    if (c.ratio == 0) return;
    first_ = lengths_[0] / c.ratio;
    rows_ = at::randn({first_ + lengths_[1] / c.ratio, kDim}, at::kDouble);
    if (c.topk == 0) return;
    // Random ascending distinct visible blocks.
    selection_ = at::full({tokens_, c.topk}, -1, at::kInt);
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t visible = (batch_->host_pos()[static_cast<size_t>(t)] + 1) / c.ratio;
      const int64_t count = std::min(visible, c.topk);
      if (count == 0) continue;
      const at::Tensor some = at::randperm(visible, at::kInt).narrow(0, 0, count);
      selection_[t].narrow(0, 0, count).copy_(std::get<0>(some.sort()));
    }
  }

  AttentionResult run(at::ScalarType type, Numerics numerics = Numerics::kIdeal) const {
    AttentionParams params = params_;
    params.numerics = numerics;
    const BlockView blocks =
        rows_.defined() ? BlockView::consecutive(rows_.to(type), {0, first_}) : BlockView{};
    return sparse_attn(q_.to(type), kv_.to(type), {}, blocks, selection_, sink_, *batch_, params);
  }

  /// One softmax over all keys with a sink column, float64.
  AttentionResult dense() const {
    // LibTorch's own threads: a second one's first exponentials may be off by 1e-9.
    const testing::OneAtenThread one;
    Tensors outs, lses;
    for (int64_t seq = 0; seq < 2; ++seq) {
      const int64_t begin = batch_->begin(seq), length = lengths_[static_cast<size_t>(seq)];
      const int64_t blocks = params_.ratio > 0 ? length / params_.ratio : 0;
      at::Tensor keys = kv_.narrow(0, begin, length);
      if (blocks > 0) keys = at::cat({keys, rows_.narrow(0, seq * first_, blocks)});
      at::Tensor allowed = at::zeros({length, length + blocks}, at::kBool);
      for (int64_t p = 0; p < length; ++p) {
        const int64_t from = std::max<int64_t>(0, p - params_.window + 1);
        allowed[p].narrow(0, from, p - from + 1).fill_(true);
        if (selection_.defined()) {
          for (int64_t i = 0; i < selection_.size(1); ++i) {
            const int64_t block = selection_[begin + p][i].item<int64_t>();
            if (block >= 0) allowed[p][length + block] = true;
          }
        } else if (blocks > 0) {
          allowed[p].narrow(0, length, (p + 1) / params_.ratio).fill_(true);
        }
      }
      const at::Tensor logits = at::einsum("phd,kd->phk", {q_.narrow(0, begin, length), keys})
                                    .mul(params_.scale)
                                    .masked_fill(allowed.logical_not().unsqueeze(1), -INFINITY);
      const at::Tensor with_sink =
          at::cat({logits, sink_.reshape({1, kHeads, 1}).expand({length, kHeads, 1})}, 2);
      const at::Tensor p = at::softmax(with_sink, 2).narrow(2, 0, length + blocks);
      outs.push_back(at::einsum("phk,kd->phd", {p, keys}));
      lses.push_back(at::logsumexp(with_sink, {2}));
    }
    return {.out = at::cat(outs), .lse = at::cat(lses)};
  }

  at::Tensor q_, kv_, sink_, rows_, selection_;
  std::unique_ptr<Batch> batch_;
  AttentionParams params_;
  int64_t first_ = 0;
};

double largest(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

TEST_P(SparseAttn, IsADenseSoftmaxWithASinkColumn) {
  const AttentionResult expected = dense();
  const AttentionResult exact = run(at::kDouble), single = run(at::kFloat);
  EXPECT_LT(largest(exact.out, expected.out), 1e-13);
  EXPECT_LT(largest(exact.lse, expected.lse), 1e-13);
  EXPECT_LT(largest(single.out, expected.out), 3e-6);
  EXPECT_LT(largest(single.lse, expected.lse), 3e-6);
  EXPECT_LT(largest(run(at::kBFloat16).out, expected.out), 3e-2);
}

TEST_P(SparseAttn, KernelKeepsTheContract) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (const Numerics numerics : {Numerics::kIdeal, Numerics::kReleased}) {
      const auto call = [&](const Tensors&) {
        const AttentionResult r = run(type, numerics);
        return Tensors{r.out, r.lse};
      };
      testing::expect_machine_independent(call, {});
    }
  }
}

TEST_P(SparseAttn, AllButIdealRoundTheProbabilitiesOfTheValueProductAlone) {
  const AttentionResult plain = run(at::kDouble), rounded = run(at::kDouble, Numerics::kReleased);
  EXPECT_TRUE(testing::same_bits(plain.lse, rounded.lse));
  const double difference = largest(plain.out, rounded.out);
  // A single key has the probability 1, which rounds to itself.
  if (params_.window > 1 || params_.ratio > 0) {
    EXPECT_GT(difference, 1e-5);
  }
  EXPECT_LT(difference, 2e-2);
  const AttentionResult kernel = run(at::kFloat, Numerics::kReleased);
  // A probability at a rounding boundary may fall on either side.
  EXPECT_LT(largest(kernel.out, rounded.out), 1e-2);
  EXPECT_LT((kernel.out - rounded.out).abs().mean().item<double>(), 1e-5);
  // `bf16` rounds them alike, as the CUDA kernels do in both.
  EXPECT_TRUE(testing::same_bits(run(at::kDouble, Numerics::kBf16).out, rounded.out));
  EXPECT_TRUE(testing::same_bits(run(at::kFloat, Numerics::kBf16).out, kernel.out));
}

INSTANTIATE_TEST_SUITE_P(Keys,
                         SparseAttn,
                         ::testing::Values(Case{"window_only", 16, 0, 0},
                                           Case{"window_1", 1, 0, 0},
                                           Case{"window_of_two_chunks", 100, 0, 0},
                                           Case{"dense_blocks", 16, 16, 0},
                                           Case{"more_than_64_blocks", 16, 2, 0},
                                           Case{"selected", 16, 4, 5},
                                           Case{"more_than_64_selected", 8, 2, 70}),
                         [](const auto& param_info) { return param_info.param.name; });

// What the kernel is given is a list: within a chunk its order changes rounding alone, an empty
// list gives zeros, and a sink of -inf is none.
class AttentionKernel : public ::testing::Test {
 protected:
  static constexpr int64_t kHeads = 2, kDim = 24, kKeys = 50;
  void SetUp() override {
    at::manual_seed(6);
    q_ = at::randn({kHeads, kDim});
    keys_ = at::randn({kKeys, kDim});
  }
  at::Tensor run(const std::vector<int64_t>& list, float sink) const {
    const at::Tensor out = at::full({kHeads, kDim}, NAN), lse = at::empty({kHeads}),
                     sinks = at::full({kHeads}, sink);
    std::vector<float> scratch(static_cast<size_t>(attention_scratch_floats(kHeads, kDim)));
    std::vector<const void*> rows;
    for (const int64_t key : list) rows.push_back(keys_.const_data_ptr<float>() + key * kDim);
    const auto count = static_cast<int32_t>(list.size());
    attention_cpu({.q = q_.const_data_ptr(),
                   .sink = sinks.const_data_ptr<float>(),
                   .out = out.mutable_data_ptr(),
                   .lse = lse.mutable_data_ptr<float>(),
                   .scratch = scratch.data(),
                   .heads = kHeads,
                   .dim = kDim,
                   .scale = 0.5f,
                   .dtype = ElementType::kF32,
                   .round_probabilities = false},
                  {.rows = rows.data(), .chunk_ends = &count, .num_chunks = count > 0 ? 1 : 0});
    return out;
  }
  at::Tensor q_, keys_;
};

TEST_F(AttentionKernel, AnEmptyListGivesZero) {
  EXPECT_TRUE(at::equal(run({}, 0.5f), at::zeros({kHeads, kDim})));
}

TEST_F(AttentionKernel, OrderWithinAChunkIsRounding) {
  std::vector<int64_t> list(static_cast<size_t>(kKeys)), reversed;
  for (int64_t i = 0; i < kKeys; ++i) list[static_cast<size_t>(i)] = i;
  reversed.assign(list.rbegin(), list.rend());
  EXPECT_LT(largest(run(list, 0.2f), run(reversed, 0.2f)), 1e-6);
}

TEST_F(AttentionKernel, ASinkOnlyShrinks) {
  EXPECT_TRUE(at::allclose(run({7}, -INFINITY), keys_[7].expand({kHeads, kDim})));
  const double with = run({3, 4, 5}, 3.0f).norm().item<double>(),
               without = run({3, 4, 5}, -INFINITY).norm().item<double>();
  EXPECT_LT(with, without);
  EXPECT_LT(run({3, 4, 5}, 80.0f).abs().max().item<double>(), 1e-20);
}

// Entries of -1 name nothing, wherever the list is cut; the row they would stand on is never read.
TEST(SparseAttnLists, MinusOneIsSkipped) {
  at::manual_seed(8);
  const Batch batch({12}, {0}, at::kCPU);
  const at::Tensor q = at::randn({12, 2, 8}), kv = at::randn({12, 8}), sink = at::randn({2});
  at::Tensor rows = at::randn({3, 8});
  const AttentionParams params{.window = 4, .scale = 0.4, .ratio = 4};
  const auto run = [&](const at::Tensor& selection, at::ScalarType type) {
    return sparse_attn(q.to(type), kv.to(type), {}, BlockView::consecutive(rows.to(type), {0}),
                       selection, sink, batch, params)
        .out;
  };
  const at::Tensor none = at::full({12, 2}, -1, at::kInt);
  const at::Tensor window =
      sparse_attn(q, kv, {}, {}, {}, sink, batch, {.window = 4, .scale = 0.4}).out;
  EXPECT_TRUE(testing::same_bits(run(none, at::kFloat), window));
  const at::Tensor longer = at::full({12, 130}, -1, at::kInt);
  EXPECT_TRUE(testing::same_bits(run(longer, at::kFloat), window));
  EXPECT_LT(largest(run(longer, at::kDouble), window), 1e-6);
  rows.fill_(1e30);  // would show
  EXPECT_TRUE(testing::same_bits(run(none, at::kFloat), window));
}

// Keys from the step, from a ring of earlier rows and from scattered pages look alike.
TEST(SparseAttnLists, RingAndPagesGiveTheBitsOfOneShot) {
  at::manual_seed(9);
  const int64_t total = 90, heads = 2, dim = 16, window = 20, ratio = 4, ring = 32;
  const at::Tensor q = at::randn({total, heads, dim}), kv = at::randn({total, dim}),
                   rows = at::randn({total / ratio, dim}), sink = at::randn({heads});
  const AttentionParams params{.window = window, .scale = 0.25, .ratio = ratio};
  const Batch whole({total}, {0}, at::kCPU);
  const at::Tensor expected =
      sparse_attn(q, kv, {}, BlockView::consecutive(rows, {0}), {}, sink, whole, params).out;
  // Pages of 8 blocks in reverse order.
  at::Tensor paged = at::full({24, dim}, NAN);
  for (int64_t c = 0; c < rows.size(0); ++c) paged[(2 - c / 8) * 8 + c % 8].copy_(rows[c]);
  const BlockView pages = BlockView::paged(paged, {{2, 1, 0}}, 8);
  for (const int64_t start : {1, 63, 64, 77}) {
    at::Tensor past = at::full({2 * ring, dim}, NAN);
    for (int64_t p = std::max<int64_t>(0, start - ring); p < start; ++p) {
      past[ring + p % ring].copy_(kv[p]);
    }
    const Batch rest({total - start}, {start}, at::kCPU);
    const AttentionResult found =
        sparse_attn(q.narrow(0, start, total - start), kv.narrow(0, start, total - start),
                    RingView::of_slots(past, {1}, ring), pages, {}, sink, rest, params);
    EXPECT_TRUE(testing::same_bits(found.out, expected.narrow(0, start, total - start))) << start;
  }
}

}  // namespace
}  // namespace hadal::ops
