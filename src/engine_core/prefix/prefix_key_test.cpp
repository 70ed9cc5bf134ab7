#include "engine_core/prefix/prefix_key.h"

#include <random>
#include <set>

#include <gtest/gtest.h>

namespace hadal::engine_core {
namespace {

std::vector<int64_t> random_tokens(std::mt19937_64& random, size_t count) {
  std::vector<int64_t> tokens(count);
  for (int64_t& token : tokens) token = static_cast<int64_t>(random() % 5);
  return tokens;
}

TEST(PrefixKeys, RememberedChainsAreThoseOfAFreshStart) {
  std::mt19937_64 random(1);
  PrefixKeys remembering("model", 4);
  std::vector<std::vector<int64_t>> prompts;
  for (int round = 0; round < 500; ++round) {
    // Continue, branch off, cut or begin.
    std::vector<int64_t> tokens;
    if (!prompts.empty()) tokens = prompts[random() % prompts.size()];
    if (!tokens.empty()) tokens.resize(random() % (tokens.size() + 1));
    const std::vector<int64_t> more = random_tokens(random, random() % 12);
    tokens.insert(tokens.end(), more.begin(), more.end());
    PrefixKeys fresh("model", 4);
    const std::vector<PrefixDigest> chain = fresh.chain(tokens);
    ASSERT_EQ(chain.size(), tokens.size() / 4);
    ASSERT_EQ(remembering.chain(tokens), chain);
    if (!chain.empty()) {
      ASSERT_EQ(remembering.last(tokens), chain.back());
    }
    prompts.push_back(std::move(tokens));
  }
}

TEST(PrefixKeys, EveryTokenAndTheModelAreInTheName) {
  std::vector<int64_t> tokens(16);
  std::set<PrefixDigest> names = {PrefixKeys("a", 4).last(tokens), PrefixKeys("b", 4).last(tokens),
                                  PrefixKeys("a", 8).last(tokens),
                                  PrefixKeys("a", 4).last(std::span(tokens).first(12))};
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::vector<int64_t> other = tokens;
    other[i] = int64_t{1} << 31;
    names.insert(PrefixKeys("a", 4).last(other));
  }
  EXPECT_EQ(names.size(), 4 + tokens.size());
}

TEST(PrefixKeys, AGrowingPromptIsHashedOnce) {
  std::mt19937_64 random(2);
  PrefixKeys keys("model", 4);
  const std::vector<int64_t> one = random_tokens(random, 400), two = random_tokens(random, 400);
  for (size_t size = 4; size <= 400; size += 4) {
    keys.last(std::span(one).first(size));
    keys.last(std::span(two).first(size));
  }
  EXPECT_EQ(keys.hashed_pages(), 200);
}

}  // namespace
}  // namespace hadal::engine_core
