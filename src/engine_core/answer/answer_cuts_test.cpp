#include "engine_core/answer/answer_cuts.h"

#include <random>
#include <string>

#include <gtest/gtest.h>

#include "testing/cache_traffic.h"
#include "text/chat_tokens.h"

namespace hadal::engine_core {
namespace {

using Tokens = std::vector<int64_t>;

class AnswerCutsTest : public ::testing::Test {
 protected:
  Tokens encode(const std::string& text,
                text::SpecialTokens special = text::SpecialTokens::kRecognise) const {
    const std::vector<int32_t> ids = tokenizer.encode(text, special);
    return {ids.begin(), ids.end()};
  }
  // The same text in other tokens: cut wherever it pleases, each piece on its own.
  Tokens cut(const std::string& text) {
    Tokens tokens;
    for (size_t at = 0; at < text.size();) {
      size_t size = std::min<size_t>(1 + random() % 4, text.size() - at);
      while ((text[at + size] & 0xc0) == 0x80) ++size;  // whole characters: bytes alone are no text
      for (const int64_t token : encode(text.substr(at, size), text::SpecialTokens::kAsText))
        tokens.push_back(token);
      at += size;
    }
    return tokens;
  }
  static Tokens joined(Tokens a, const Tokens& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  }
  std::string decode(const Tokens& tokens) const {
    const std::vector<int32_t> ids(tokens.begin(), tokens.end());
    return tokenizer.decode(ids);
  }

  const text::Tokenizer tokenizer = text::Tokenizer::from_file(std::string(HADAL_SOURCE_DIR) +
                                                               "/models/hadal-nano/tokenizer.json");
  const std::string asked = std::string(text::kBos) + std::string(text::kUser) + "What is it?" +
                            std::string(text::kAssistant);
  const std::string answer = "It is a lantern, an old one; the glass of it is broken.";
  const std::string eos = std::string(text::kEos), next = std::string(text::kUser) + "And that?";
  std::mt19937_64 random{5};
  AnswerCuts cuts{tokenizer, 1 << 20};
};

TEST_F(AnswerCutsTest, AnAnswerComesBackInItsOwnTokens) {
  const Tokens written = joined(cut(answer), encode(eos));
  ASSERT_NE(written, encode(answer + eos));
  const Tokens history = encode(asked + answer + eos + next);
  EXPECT_EQ(cuts.recall(history), history) << "nothing is known yet";
  cuts.remember(encode(asked), written);
  EXPECT_EQ(cuts.recall(history), joined(joined(encode(asked), written), encode(next)));
  EXPECT_EQ(cuts.recall(encode("x" + asked + answer)), encode("x" + asked + answer))
      << "another prompt";
}

TEST_F(AnswerCutsTest, WhereTheTextPartsTheRestIsCutAnew) {
  cuts.remember(encode(asked), joined(cut(answer), encode(eos)));
  const std::string other = answer.substr(0, 20) + "bridge." + eos + next;
  const Tokens recalled = cuts.recall(encode(asked + other));
  EXPECT_NE(recalled, encode(asked + other));
  EXPECT_EQ(decode(recalled), asked + other);
}

TEST_F(AnswerCutsTest, ControlTokensAreComparedAsIds) {
  const std::string think(text::kThinkEnd);
  Tokens written = cut("a " + think + " b");  // drawn as text
  cuts.remember(encode(asked), written);
  const Tokens history = encode(asked + "a " + think + " b");  // the token
  const Tokens recalled = cuts.recall(history);
  EXPECT_TRUE(std::ranges::count(recalled, tokenizer.id_of(think)) == 1);
  EXPECT_EQ(decode(recalled), decode(history));
}

TEST_F(AnswerCutsTest, AnyCutsOfAnyTurnsAddUpToTheSameBytes) {
  for (int round = 0; round < 200; ++round) {
    std::string text = asked;
    Tokens exact = encode(asked);
    for (int turn = 0; turn < 4; ++turn) {
      std::string said;
      for (uint64_t words = 1 + random() % 12; words > 0; --words)
        said += std::to_string(random() % 3000) + (random() % 2 == 0 ? " lantern " : "\u00e9\n");
      const Tokens written = joined(cut(said), encode(eos));
      cuts.remember(exact, written);
      text += said + eos + next;
      exact = joined(joined(exact, written), encode(next));
      ASSERT_EQ(cuts.recall(encode(text)), exact);
    }
  }
  EXPECT_LE(cuts.num_bytes(), 1 << 20);
}

TEST_F(AnswerCutsTest, WhatWasRememberedFirstGoesFirst) {
  AnswerCuts small(tokenizer, 1000);
  const Tokens written = joined(cut(answer), encode(eos));
  small.remember(encode(asked), written);
  for (int64_t i = 0; i < 10; ++i) small.remember({{1, 2, i}}, Tokens(20, i));
  EXPECT_LE(small.num_bytes(), 1000);
  EXPECT_EQ(small.recall(encode(asked + answer + eos)), encode(asked + answer + eos));
  small.remember(Tokens{1}, Tokens(1000, 2));
  EXPECT_EQ(small.num_bytes(), 0) << "larger than all there is";
}

// Another cut costs the next turn nothing.
TEST_F(AnswerCutsTest, TheNextTurnComputesNothingTwice) {
  for (const bool recalls : {false, true}) {
    AnswerCuts known(tokenizer, 1 << 20);
    testing::traffic::Served served(testing::traffic::kNano, 100, 2, {}, tokenizer.vocab_size(),
                                    &known);
    const Tokens written = joined(cut(answer), encode(eos));
    served.run({{.prompt = encode(asked), .answer = written}});
    Tokens history = encode(asked + answer + eos + next);
    if (recalls) history = known.recall(history);
    const CacheReport report = served.run({{.prompt = history, .answer = {5}}})[0];
    const int64_t all = std::ssize(encode(asked)) + std::ssize(written) - 1;
    if (recalls) {
      EXPECT_EQ(report.cached_tokens, all) << "but for the EOS, which was never computed";
    } else {
      EXPECT_LT(report.cached_tokens, all);
    }
  }
}

}  // namespace
}  // namespace hadal::engine_core
