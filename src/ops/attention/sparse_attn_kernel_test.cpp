// Sparse attention on a card against its twin on the CPU, bit for bit.
#include <algorithm>
#include <bit>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "ops/attention/sparse_attn_sm90.h"
#include "testing/attention_data.h"
#include "testing/on_device.h"

namespace hadal::ops {
namespace {

using testing::attention_twin;
using testing::OnDevice;
using Shape = testing::AttentionShape;
using World = testing::AttentionWorld;
using Results = testing::AttentionResults;

/// Latents widened on the card.
std::vector<uint16_t> widen(const std::vector<uint8_t>& latents) {
  const auto rows = latents.size() / static_cast<size_t>(kLatentRowBytes);
  const OnDevice<uint8_t> there(latents);
  const OnDevice<uint16_t> wide(rows * kLatentDim);
  widen_latents_sm90({there.get(), nullptr, wide.get(), static_cast<int64_t>(rows)}, nullptr);
  return wide.read();
}

/// Tokens [first, first + count) alone; wide: over rows that were widened before.
Results run(
    const World& w, SparseAttnKernel kernel, int64_t first, int64_t count, bool wide = false) {
  const Shape& s = w.shape;
  const OnDevice<uint8_t> window(w.window), blocks(w.blocks);
  const OnDevice<uint16_t> wide_window(wide ? widen(w.window) : std::vector<uint16_t>(1)),
      wide_blocks(wide ? widen(w.blocks) : std::vector<uint16_t>(1));
  const OnDevice<uint16_t> q(w.q);
  const OnDevice<float> sink(w.sink);
  // No list is empty memory.
  auto window_row = w.window_row, block_row = w.block_row;
  window_row.push_back(-1);
  block_row.push_back(-1);
  const OnDevice<int32_t> window_there(window_row), block_there(block_row), num_there(w.num_blocks);
  const auto rows = static_cast<size_t>(count * s.heads);
  const OnDevice<uint16_t> out(rows * static_cast<size_t>(s.width));
  const OnDevice<float> stats(rows * 2);
  SparseAttnSm90Params p = {.q = q.get() + first * s.heads * s.width,
                            .sink = sink.get(),
                            .window = window.get(),
                            .blocks = blocks.get(),
                            .window_row = window_there.get() + first * s.window_places,
                            .block_row = block_there.get() + first * s.block_places,
                            .num_blocks = num_there.get() + first,
                            .tokens = count,
                            .heads = s.heads,
                            .window_places = s.window_places,
                            .block_places = s.block_places,
                            .scale = World::kScale,
                            .out = out.get(),
                            .stats = stats.get(),
                            .scratch = nullptr,
                            .wide_window = wide ? wide_window.get() : nullptr,
                            .wide_blocks = wide ? wide_blocks.get() : nullptr,
                            .width = s.width,
                            .format = s.format};
  const OnDevice<float> scratch(static_cast<size_t>(sparse_attn_scratch_floats(p, kernel)) + 1);
  p.scratch = scratch.get();
  sparse_attn_sm90(p, nullptr, kernel);
  return {out.read(), stats.read()};
}

/// What differs between some heads of a token and the twin: counted by stage, the first told.
void expect_twin(const World& w,
                 const Results& found,
                 const Results& expected,
                 int64_t token,
                 int64_t first_head,
                 int64_t heads,
                 const std::string& what) {
  const auto width = static_cast<size_t>(w.shape.width);
  int64_t max = 0, sum = 0, out = 0, by_slab[8] = {};
  std::string first;
  for (int64_t h = 0; h < heads; ++h) {
    const auto row = static_cast<size_t>(token * w.shape.heads + first_head + h);
    const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
    const auto at = static_cast<size_t>(h) * 2;
    max += bits(found.stats[row * 2]) != bits(expected.stats[at]);
    sum += bits(found.stats[row * 2 + 1]) != bits(expected.stats[at + 1]);
    for (size_t d = 0; d < width; ++d) {
      const uint16_t a = found.out[row * width + d],
                     b = expected.out[static_cast<size_t>(h) * width + d];
      if (a == b) continue;
      ++by_slab[d / 64];
      if (out++ == 0) {
        const auto value = [](uint16_t v) {
          return std::to_string(std::bit_cast<float>(static_cast<uint32_t>(v) << 16));
        };
        first = "head " + std::to_string(first_head + h) + " channel " + std::to_string(d) + ": " +
                value(a) + ", twin " + value(b) + "; max " + std::to_string(found.stats[row * 2]) +
                ", twin " + std::to_string(expected.stats[at]) + "; sum " +
                std::to_string(found.stats[row * 2 + 1]) + ", twin " +
                std::to_string(expected.stats[at + 1]);
      }
    }
  }
  EXPECT_EQ(max + sum + out, 0) << what << " token " << token << " heads " << first_head << " + "
                                << heads << ": " << max << " maxima, " << sum << " sums, " << out
                                << " values of " << heads * w.shape.width << " differ (by slab "
                                << by_slab[0] << " " << by_slab[1] << " " << by_slab[2] << " "
                                << by_slab[3] << " " << by_slab[4] << " " << by_slab[5] << " "
                                << by_slab[6] << " " << by_slab[7] << "), first " << first;
}

int64_t differences(const Results& a, const Results& b) {
  int64_t count = 0;
  for (size_t i = 0; i < a.out.size(); ++i) count += a.out[i] != b.out[i];
  for (size_t i = 0; i < a.stats.size(); ++i)
    count += std::bit_cast<uint32_t>(a.stats[i]) != std::bit_cast<uint32_t>(b.stats[i]);
  return count;
}

class SparseAttnSm90 : public ::testing::TestWithParam<Shape> {};

TEST_P(SparseAttnSm90, GivesTheTwinsBits) {
  const World w(GetParam());
  const int64_t tokens = w.shape.tokens, heads = w.shape.heads;
  const Results few = run(w, SparseAttnKernel::kFew, 0, tokens);
  const Results many = run(w, SparseAttnKernel::kMany, 0, tokens);
  for (int64_t t = 0; t < tokens; t += std::max<int64_t>(tokens / 3, 1)) {
    const int64_t first = t * 24 % heads;
    const Results expected = attention_twin(w, t, first, 4);
    expect_twin(w, few, expected, t, first, 4, "few");
    expect_twin(w, many, expected, t, first, 4, "many");
  }
  EXPECT_EQ(differences(few, many), 0);
  EXPECT_EQ(differences(run(w, SparseAttnKernel::kFewWide, 0, tokens), many), 0) << "few, wide";
  EXPECT_EQ(differences(run(w, SparseAttnKernel::kMany, 0, tokens, true), many), 0) << "wide";
}

TEST(SparseAttnSm90, LatentsAreWidenedByNumber) {
  const World w({1, 64, 64, 0});
  const auto all = widen(w.window);
  const std::vector<int32_t> row = {7, 0, 499, 7, 123};
  const OnDevice<uint8_t> there(w.window);
  const OnDevice<int32_t> row_there(row);
  const OnDevice<uint16_t> wide(row.size() * kLatentDim);
  widen_latents_sm90({there.get(), row_there.get(), wide.get(), 5}, nullptr);
  std::vector<uint16_t> expected;
  for (const int32_t r : row)
    expected.insert(expected.end(), all.begin() + r * kLatentDim,
                    all.begin() + (r + 1) * kLatentDim);
  EXPECT_EQ(wide.read(), expected);
}

INSTANTIATE_TEST_SUITE_P(Shapes,
                         SparseAttnSm90,
                         ::testing::Values(Shape{1, 64, 0, 0},
                                           Shape{1, 64, 0, 1},
                                           Shape{1, 64, 0, 64},
                                           Shape{2, 64, 0, 127},
                                           Shape{3, 64, 128, 0},
                                           Shape{1, 64, 128, 512},
                                           Shape{8, 64, 128, 512},
                                           Shape{5, 128, 128, 1024},
                                           Shape{64, 64, 128, 517},
                                           Shape{300, 64, 64, 65},
                                           Shape{140, 128, 128, 512},
                                           Shape{7, 64, 128, 4205},
                                           Shape{2, 128, 0, 1537}),
                         [](const auto& of) {
                           return std::to_string(of.param.tokens) + "Tokens" +
                                  std::to_string(of.param.heads) + "Heads" +
                                  std::to_string(of.param.window_places) + "And" +
                                  std::to_string(of.param.block_places);
                         });

TEST(SparseAttnSm90, EveryHeadHasTheTwinsBits) {
  const World w({1, 64, 128, 330}, 11);
  const Results many = run(w, SparseAttnKernel::kMany, 0, 1);
  const Results few = run(w, SparseAttnKernel::kFew, 0, 1);
  const Results expected = attention_twin(w, 0, 0, 64);
  expect_twin(w, many, expected, 0, 0, 64, "many");
  expect_twin(w, few, expected, 0, 0, 64, "few");
  expect_twin(w, run(w, SparseAttnKernel::kFewWide, 0, 1), expected, 0, 0, 64, "few, wide");
}

TEST(SparseAttnSm90, ScalesThatAreNoBf16FactorAreExact) {
  World w({3, 64, 64, 130}, 41);
  for (size_t row = 0; row < 500; row += 3)
    w.blocks[row * kLatentRowBytes + 576 + row % 7] = static_cast<uint8_t>(134 + row % 6);
  const Results many = run(w, SparseAttnKernel::kMany, 0, 3);
  EXPECT_EQ(differences(run(w, SparseAttnKernel::kFew, 0, 3), many), 0);
  EXPECT_EQ(differences(run(w, SparseAttnKernel::kFewWide, 0, 3), many), 0);
  EXPECT_EQ(differences(run(w, SparseAttnKernel::kMany, 0, 3, true), many), 0);
  for (int64_t t = 0; t < 3; ++t)
    expect_twin(w, many, attention_twin(w, t, 8, 4), t, 8, 4, "large scales");
}

TEST(SparseAttnSm90, HasTheBitsThatTheTwinIsHeldTo) {
  for (const testing::GoldenAttention& g : testing::kGoldenAttention) {
    const World w(g.shape, g.seed);
    for (const SparseAttnKernel kernel :
         {SparseAttnKernel::kFew, SparseAttnKernel::kFewWide, SparseAttnKernel::kMany})
      EXPECT_EQ(digest(run(w, kernel, 0, g.shape.tokens)), g.digest) << "seed " << g.seed;
  }
}

TEST(SparseAttnSm90, ATokenKeepsItsBitsInAnyCompany) {
  const World w({290, 64, 128, 512}, 21);
  const Results all = run(w, SparseAttnKernel::kByShape, 0, 290);
  for (const auto& [first, count] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {7, 1}, {5, 12}, {100, 64}, {133, 157}}) {
    const Results part = run(w, SparseAttnKernel::kByShape, first, count);
    const auto rows = static_cast<size_t>(first * 64);
    Results same{
        {all.out.begin() + static_cast<int64_t>(rows * kLatentDim),
         all.out.begin() + static_cast<int64_t>(rows * kLatentDim) + count * 64 * kLatentDim},
        {all.stats.begin() + static_cast<int64_t>(rows * 2),
         all.stats.begin() + static_cast<int64_t>(rows * 2) + count * 128}};
    EXPECT_EQ(differences(part, same), 0) << count << " tokens from " << first;
  }
}

/// Every width, format and kind of head count; lists of no place, of some, of several segments.
class SparseAttnAnySm90 : public ::testing::TestWithParam<std::tuple<int64_t, AttnRows>> {};

TEST_P(SparseAttnAnySm90, GivesTheTwinsBits) {
  const auto [width, format] = GetParam();
  for (const Shape& s :
       {Shape{3, 6, 128, 100}, Shape{1, 1, 0, 1}, Shape{2, 17, 64, 0}, Shape{70, 4, 64, 65},
        Shape{1, 128, 64, 63}, Shape{3, 5, 128, 1700}, Shape{1, 16, 0, 0}}) {
    Shape shape = s;
    shape.width = width, shape.format = format;
    const World w(shape, 3);
    const Results all = run(w, SparseAttnKernel::kAny, 0, s.tokens);
    const int64_t heads = std::min<int64_t>(s.heads, 6);
    for (int64_t t = 0; t < s.tokens; t += std::max<int64_t>(s.tokens / 3, 1)) {
      const int64_t first = s.heads - heads;
      expect_twin(w, all, attention_twin(w, t, first, heads), t, first, heads, "any");
    }
    const Results last = run(w, SparseAttnKernel::kAny, s.tokens - 1, 1);
    Results same{{all.out.end() - s.heads * width, all.out.end()},
                 {all.stats.end() - s.heads * 2, all.stats.end()}};
    EXPECT_EQ(differences(last, same), 0) << "the last token alone, of " << s.tokens;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Widths,
    SparseAttnAnySm90,
    ::testing::Combine(::testing::Values(64, 128, 192, 256, 320, 384, 448, 512),
                       ::testing::Values(AttnRows::kPacked, AttnRows::kBf16)),
    [](const auto& of) {
      return std::to_string(std::get<0>(of.param)) +
             (std::get<1>(of.param) == AttnRows::kPacked ? "Packed" : "Bf16");
    });

TEST(SparseAttnAnySm90, HasTheBitsOfTheKernelsOfWholeTiles) {
  for (const Shape& s : {Shape{9, 64, 128, 517}, Shape{2, 128, 64, 1700},
                         Shape{30, 64, 128, 100, kLatentDim, AttnRows::kBf16}}) {
    const World w(s, 12);
    EXPECT_EQ(differences(run(w, SparseAttnKernel::kAny, 0, s.tokens),
                          run(w, SparseAttnKernel::kMany, 0, s.tokens)),
              0);
  }
}

}  // namespace
}  // namespace hadal::ops
