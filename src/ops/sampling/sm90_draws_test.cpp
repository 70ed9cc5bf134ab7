#include "ops/sampling/sm90_draws.h"

#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/draw_data.h"

namespace hadal::ops {
namespace {

// What is sent to the card says the same as the rows that the CPU draws from.
TEST(DrawTables, GiveTheTokensOfTheCpu) {
  for (const int64_t vocab : {61, 3000}) {
    const testing::DrawWorld w(vocab, 20, 300, static_cast<unsigned>(vocab));
    const auto host = w.host_rows();
    std::vector<Drawn> drawn(host.size());
    draw_rows(host, drawn);
    const auto rows = w.device_rows();
    const DrawTables tables = draw_tables(vocab, rows);
    std::vector<float> logits;
    for (const DeviceDrawRow& row : rows)
      logits.insert(logits.end(), w.logits.begin() + row.row * w.stride,
                    w.logits.begin() + (row.row + 1) * w.stride);
    std::vector<int32_t> tokens(rows.size());
    sample_twin({.logits = logits.data(),
                 .rows = tables.rows.data(),
                 .changes = tables.changes.data(),
                 .masks = tables.masks.data(),
                 .avoided = tables.avoided.data(),
                 .tokens = tokens.data(),
                 .num_rows = std::ssize(rows),
                 .vocab = vocab,
                 .stride = w.stride,
                 .mask_words = tables.mask_words});
    for (size_t i = 0; i < tokens.size(); ++i) EXPECT_EQ(tokens[i], drawn[i].token) << i;
  }
}

TEST(DrawTables, RefuseTokensOutsideTheRow) {
  const Sampling biased{.logit_bias = {{7, 1.0}}}, plain;
  const std::vector<int64_t> avoided = {7};
  const DeviceDrawRow a{.row = 0, .adjustment = {.sampling = biased}};
  const DeviceDrawRow b{.row = 0, .adjustment = {.sampling = plain, .avoided = avoided}};
  EXPECT_NO_THROW(draw_tables(8, std::span(&a, 1)));
  EXPECT_THROW(draw_tables(7, std::span(&a, 1)), Error);
  EXPECT_THROW(draw_tables(7, std::span(&b, 1)), Error);
}

TEST(ServesDraw, LeavesToTheHostWhatNoKernelSays) {
  const Sampling plain, greedy{.temperature = 0.0}, twice{.logit_bias = {{1, 1.0}, {1, 2.0}}};
  EXPECT_TRUE(serves_draw_sm90({.sampling = plain, .vocab = 100, .stride = 128}));
  EXPECT_FALSE(serves_draw_sm90({.sampling = plain, .vocab = 100, .stride = 101}));
  EXPECT_FALSE(serves_draw_sm90({.sampling = twice, .vocab = 100, .stride = 128}));
  EXPECT_FALSE(
      serves_draw_sm90({.sampling = plain, .num_avoided = 600, .vocab = 100, .stride = 128}));
  EXPECT_FALSE(
      serves_draw_sm90({.sampling = plain, .top_logprobs = 40, .vocab = 100, .stride = 128}));
  EXPECT_FALSE(
      serves_draw_sm90({.sampling = plain, .sampled_logprob = true, .vocab = 100, .stride = 128}));
  EXPECT_TRUE(
      serves_draw_sm90({.sampling = greedy, .sampled_logprob = true, .vocab = 100, .stride = 128}));
}

}  // namespace
}  // namespace hadal::ops
