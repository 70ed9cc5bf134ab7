// Rows whose places several ranks share: every bit is that of one rank
// (docs/decisions/0030-parts-of-rows.md).
#include "model/row_part.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/philox.h"
#include "model/init.h"
#include "testing/kernel_checks.h"
#include "testing/rank_threads.h"
#include "testing/tiny_model.h"
#include "train/part_sums.h"
#include "train/schedule.h"

namespace hadal::train {
namespace {

using model::AttentionMode;
using ops::Numerics;

/// Every kind of layer; the window sees 128 rows before a query, an HCA block 127 before its last,
/// so that a halo of one row less is too short.
model::ModelConfig part_config() {
  model::ModelConfig config = testing::mini_config();
  config.hc_mult = 4;
  config.window_size = model::kHaloRows + 1;
  config.compress_ratios = {0, 4, 128, 4, 0};
  config.index_topk = 12;
  return config;
}

/// Ranks are threads here, and all of them draw from LibTorch's one generator.
model::Transformer make_model(const model::ModelConfig& config) {
  static std::mutex generator;
  const std::lock_guard<std::mutex> lock(generator);
  model::Transformer model = testing::random_model(config, 4, at::kFloat);
  model::require_gradients(model);
  return model;
}

PackedRows rows_of(const std::vector<std::vector<int64_t>>& rows) {
  PackedRows packed{
      .rows = std::ssize(rows), .row_length = 0, .tokens = {}, .scored = {}, .sample_lengths = {}};
  for (const std::vector<int64_t>& lengths : rows) {
    packed.row_length = 0;
    for (const int64_t length : lengths) packed.row_length += length;
    packed.sample_lengths.insert(packed.sample_lengths.end(), lengths.begin(), lengths.end());
  }
  const Philox random(100, 7);
  for (int64_t i = 0; i < packed.rows * packed.row_length; ++i)
    packed.tokens.push_back(static_cast<int32_t>(128.0 * random.uniform(static_cast<uint64_t>(i))));
  packed.scored.assign(packed.tokens.size(), 1);
  packed.scored[3] = packed.scored[255] = 0;
  return packed;
}

/// 512 tokens, so many samples of `length` and the rest.
std::vector<int64_t> equal_samples(int64_t total, int64_t length) {
  std::vector<int64_t> lengths;
  for (int64_t left = total; left > 0; left -= lengths.back())
    lengths.push_back(std::min(left, length));
  return lengths;
}

/// Borders inside samples, inside blocks and on the ends of both; a sample longer than any part,
/// and samples too short for a block.
std::vector<std::vector<int64_t>> all_rows() {
  return {{3, 190, 1, 2, 131, 185}, {512}, {128, 255, 1, 128}, equal_samples(512, 3)};
}

struct Case {
  AttentionMode mode = AttentionMode::kSparse;
  Numerics numerics = Numerics::kIdeal;
  bool recompute = false;
  std::vector<std::vector<int64_t>> rows = all_rows();
};

/// Of each parameter as many runs as there are members, the last one perhaps empty.
std::vector<CollectedPiece> pieces_of(const std::vector<at::Tensor>& parameters, int64_t members) {
  std::vector<CollectedPiece> pieces;
  for (size_t p = 0; p < parameters.size(); ++p) {
    const int64_t size = parameters[p].numel(), each = (size + members - 1) / members;
    for (int64_t member = 0; member < members; ++member)
      pieces.push_back({p, std::min(size, member * each), std::min(size, (member + 1) * each),
                        (member + static_cast<int64_t>(p)) % members});
  }
  return pieces;
}

struct Result {
  std::vector<std::string> names;
  std::vector<at::Tensor> gradients;  ///< of a member: whole tensors, its pieces alone are right
  std::vector<std::pair<std::string, at::Tensor>> measures;
  std::vector<CollectedPiece> pieces;
};

Result accumulated(const model::Transformer& model, const Case& c, dist::Group& group) {
  const MicroBatch micro(rows_of(c.rows), at::Device(at::kCPU));
  StepCounts counts;
  counts.add(micro, model.config());
  StepSums sums(model);
  Result result;
  result.pieces = pieces_of(sums.parameters(), group.size());
  const ObjectiveParams params{.balance_weight = 0.1,
                               .mode = c.mode,
                               .numerics = c.numerics,
                               .count_clamps = true,
                               .recompute = c.recompute};
  SharedRows shared{.group = group, .pieces = result.pieces};
  accumulate_parts(model, micro, shared, counts, params, sums);
  const StepMeasures m = sums.finish();
  model.visit([&](const model::Parameter& p) {
    if (p.value.requires_grad()) result.names.push_back(p.name);
  });
  for (const at::Tensor& parameter : sums.parameters())
    result.gradients.push_back(parameter.grad());
  result.measures = {{"main", m.main_loss},
                     {"mtp", m.mtp_loss},
                     {"balance", m.balance_loss},
                     {"index", m.index_loss},
                     {"clamped", m.clamped}};
  for (const at::Tensor& load : m.expert_load) result.measures.emplace_back("load", load);
  return result;
}

/// Bits of the member's pieces and of all measures. Returns how many elements it had.
int64_t expect_same(const Result& whole,
                    const Result& part,
                    int64_t member,
                    const std::string& what) {
  int64_t seen = 0;
  for (const CollectedPiece& piece : part.pieces) {
    if (piece.member != member) continue;
    const at::Tensor &a = whole.gradients[piece.parameter], &b = part.gradients[piece.parameter];
    EXPECT_EQ(a.defined(), b.defined()) << what << ": " << whole.names[piece.parameter];
    if (!a.defined() || !b.defined()) continue;
    const auto run = [&](const at::Tensor& x) {
      return x.flatten().narrow(0, piece.begin, piece.end - piece.begin);
    };
    EXPECT_TRUE(testing::same_bits(run(a), run(b)))
        << what << ": " << whole.names[piece.parameter] << " differs by "
        << (run(a) - run(b)).abs().max().item<float>() << " of "
        << run(a).abs().max().item<float>();
    seen += piece.end - piece.begin;
  }
  EXPECT_EQ(whole.measures.size(), part.measures.size());
  for (size_t i = 0; i < whole.measures.size(); ++i) {
    const auto& [name, a] = whole.measures[i];
    const at::Tensor& b = part.measures[i].second;
    EXPECT_EQ(a.defined(), b.defined()) << what << ": " << name;
    if (!a.defined() || !b.defined()) continue;
    EXPECT_TRUE(testing::same_bits(a, b)) << what << ": " << name << ' ' << a << ' ' << b;
  }
  return seen;
}

/// One rank, then so many: equal bits, every element of a gradient on one member.
void expect_bits_of_one(const Case& c,
                        const model::ModelConfig& config,
                        const std::vector<int64_t>& numbers_of_members) {
  const testing::OneAtenThread one_thread;
  const model::Transformer model = make_model(config);
  dist::Group alone;
  const Result whole = accumulated(model, c, alone);
  int64_t elements = 0;
  for (const at::Tensor& gradient : whole.gradients)
    if (gradient.defined()) elements += gradient.numel();
  ASSERT_GT(elements, 0);
  for (const int64_t members : numbers_of_members) {
    std::vector<int64_t> seen(static_cast<size_t>(members), 0);
    const auto errors = testing::run_ranks(members, [&](dist::Ranks& ranks) {
      std::vector<int64_t> all;
      for (int64_t rank = 0; rank < members; ++rank) all.push_back(rank);
      dist::Group group(ranks, all, dist::Axis::kContext);
      const model::Transformer own = make_model(config);
      seen[static_cast<size_t>(ranks.rank())] =
          expect_same(whole, accumulated(own, c, group), ranks.rank(),
                      concat("member ", ranks.rank(), " of ", members));
    });
    for (const std::string& error : errors) EXPECT_EQ(error, "");
    int64_t total = 0;
    for (const int64_t count : seen) total += count;
    EXPECT_EQ(total, elements) << members;
  }
}

class RowPartGradients : public ::testing::TestWithParam<std::tuple<AttentionMode, Numerics>> {};

TEST_P(RowPartGradients, AreTheBitsOfOneRank) {
  const auto [mode, numerics] = GetParam();
  expect_bits_of_one({.mode = mode, .numerics = numerics}, part_config(), {2, 4});
}

INSTANTIATE_TEST_SUITE_P(
    Modes,
    RowPartGradients,
    ::testing::Combine(::testing::Values(AttentionMode::kDense,
                                         AttentionMode::kIndexerWarmup,
                                         AttentionMode::kSparse),
                       ::testing::Values(Numerics::kIdeal, Numerics::kBf16, Numerics::kReleased)),
    [](const auto& c) {
      return std::string(attention_mode_name(std::get<0>(c.param))) + "_" +
             ops::numerics_name(std::get<1>(c.param));
    });

TEST(RowPart, EightMembersAndBlocksComputedAgain) {
  const std::vector<std::vector<int64_t>> rows = {{100, 700, 224}, {1024}};
  expect_bits_of_one({.numerics = Numerics::kBf16, .recompute = true, .rows = rows}, part_config(),
                     {2, 8});
}

TEST(RowPart, RandomPackings) {
  for (uint64_t trial = 0; trial < 3; ++trial) {
    const Philox random(9, trial);
    std::vector<int64_t> lengths;
    uint64_t drawn = 0;
    for (int64_t left = 512; left > 0; left -= lengths.back()) {
      const double u = random.uniform(drawn++);
      lengths.push_back(std::min(left, 1 + static_cast<int64_t>(300.0 * u * u * u)));
    }
    expect_bits_of_one({.numerics = Numerics::kBf16, .rows = {lengths}}, part_config(), {4});
  }
}

// The forward pass alone: logits of every member are a slice of one rank's.
TEST(RowPart, LogitsAreThoseOfOneRank) {
  const testing::OneAtenThread one_thread;
  const at::NoGradGuard no_grad;
  const model::ModelConfig config = part_config();
  for (const std::vector<int64_t>& lengths : all_rows()) {
    const MicroBatch row(rows_of({lengths}), at::Device(at::kCPU));
    const auto logits = [&](const model::Transformer& model, const MicroBatch& micro,
                            const model::RowPart* part) {
      model::ForwardContext context;
      context.batch = &micro.batch;
      context.part = part;
      context.numerics = Numerics::kReleased;
      const at::Tensor streams = model.forward(micro.ids, context).streams;
      return model.logits(model.head_input(streams, context.numerics), context.numerics);
    };
    const model::Transformer model = make_model(config);
    const at::Tensor whole = logits(model, row, nullptr);
    const auto errors = testing::run_ranks(4, [&](dist::Ranks& ranks) {
      const at::NoGradGuard no_grad_here;
      dist::Group group(ranks, {0, 1, 2, 3}, dist::Axis::kContext);
      const model::RowPart part(lengths, group);
      const at::Tensor found = logits(make_model(config), row.part(part), &part);
      EXPECT_TRUE(
          testing::same_bits(found, whole.narrow(0, part.begin(), part.end() - part.begin())))
          << ranks.rank();
    });
    for (const std::string& error : errors) EXPECT_EQ(error, "");
  }
}

// What travels: rows of the halo, and each block once to every member that its sample goes on in.
TEST(RowPart, PlanCountsRowsAndBlocks) {
  const auto errors = testing::run_ranks(4, [](dist::Ranks& ranks) {
    dist::Group group(ranks, {0, 1, 2, 3}, dist::Axis::kContext);
    const model::RowPart part({3, 190, 1, 2, 131, 185}, group);
    EXPECT_EQ(part.begin(), 128 * ranks.rank());
    EXPECT_EQ(part.halo(0), 0);
    EXPECT_EQ(part.halo(1), 125);
    EXPECT_EQ(part.halo(2), 60);
    EXPECT_EQ(part.halo(3), 57);
    EXPECT_EQ(part.shared_blocks(4, 0, 1), 31);
    EXPECT_EQ(part.shared_blocks(4, 0, 2), 0);
    EXPECT_EQ(part.shared_blocks(4, 1, 2), 15);
    EXPECT_EQ(part.shared_blocks(128, 0, 1), 0);
    const model::RowPart one({512}, group);
    EXPECT_EQ(one.halo(3), model::kHaloRows);
    EXPECT_EQ(model::kHaloRows, 128);
    EXPECT_EQ(one.shared_blocks(128, 0, 3), 1);
    EXPECT_EQ(one.shared_blocks(4, 1, 3), 32);
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

TEST(RowPart, NamesTheNumberThatDoesNotFit) {
  const auto said = [](const model::ModelConfig& config, int64_t length, int64_t members) {
    try {
      model::check_context(config, length, members);
    } catch (const InputError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const model::ModelConfig fits = part_config();
  EXPECT_EQ(said(fits, 512, 4), "");
  EXPECT_EQ(said(fits, 1000, 1), "");
  for (const auto& [length, members] :
       std::vector<std::pair<int64_t, int64_t>>{{512, 8}, {1000, 2}, {1536, 4}, {510, 4}}) {
    EXPECT_NE(said(fits, length, members).find("row_length"), std::string::npos) << length;
  }
  model::ModelConfig config = fits;
  config.hc_mult = 2;
  EXPECT_NE(said(config, 512, 4).find("hc_mult"), std::string::npos);
  config = fits;
  config.window_size = 130;
  EXPECT_NE(said(config, 512, 4).find("sliding_window"), std::string::npos);
  config = fits;
  config.compress_ratios = {0, 4, 96, 4, 0};
  EXPECT_NE(said(config, 512, 4).find("compress_ratios"), std::string::npos);
}

// Members that do not agree on what has a gradient would wait without end.
TEST(RowPart, AGradientThatSomeDoNotHaveIsAnError) {
  const auto errors = testing::run_ranks(2, [](dist::Ranks& ranks) {
    dist::Group group(ranks, {0, 1}, dist::Axis::kContext);
    std::vector<PartNode> nodes{{0, ranks.rank() == 0 ? at::ones({4}) : at::Tensor()}};
    const std::vector<CollectedPiece> pieces{{0, 0, 4, 0}};
    collect_whole(group, pieces, nodes);
  });
  for (const std::string& error : errors)
    EXPECT_NE(error.find("gradient of parameter 0"), std::string::npos) << error;
}

}  // namespace
}  // namespace hadal::train
