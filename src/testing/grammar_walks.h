// Walks through grammars with a vocabulary that is hard on strings: what tests of grammars share.
// Included by tests only.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "engine_core/grammar/grammar.h"
#include "testing/tiny_tokenizer.h"
#include "text/chat_tokens.h"
#include "text/tokenizer.h"

namespace hadal::testing::walks {

using Words = std::vector<uint32_t>;

/// Beside the bytes, tokens that begin and end within a string, an escape, a character.
inline text::Tokenizer rare_tokens() {
  const std::vector<std::string> pieces = {
      "a",  "b",  "c",    "ab",   "x",    "hello",    "1",        "0",    "00e9", "-",         " ",
      "\"", "\"", "\"",   "\\",   "\\n",  "\\\"",     "\\u",      "\\ud", ",",    "}",         "]",
      ":",  "<",  "\xc3", "\xa9", "\xe4", "\xbd\xa0", "\xf0\x9f", "\x98", "\x80", "\U0001F600"};
  std::mt19937_64 engine(1);
  std::vector<std::string> tokens;
  for (int count = 0; count < 8000; ++count) {
    std::string& token = tokens.emplace_back();
    for (uint64_t size = 2 + engine() % 4; size > 0; --size)
      token += pieces[engine() % pieces.size()];
  }
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  const auto is_byte = [](const std::string& token) { return token.size() == 1; };
  tokens.erase(std::remove_if(tokens.begin(), tokens.end(), is_byte), tokens.end());
  return text::Tokenizer::from_json(testing::byte_tokenizer_json(tokens), "rare tokens");
}

inline const text::Tokenizer& tokenizer() {
  static const text::Tokenizer rare = rare_tokens();
  return rare;
}
inline engine_core::GrammarCompiler& compiler() {
  static engine_core::GrammarCompiler rare(tokenizer(), 0, {.time = std::chrono::minutes(2)});
  return rare;
}
inline int32_t eos() { return static_cast<int32_t>(tokenizer().id_of(text::kEos)); }

inline engine_core::GrammarSession start(engine_core::Grammar::Kind kind, const std::string& text) {
  return {compiler().compile({kind, text}), false};
}

inline bool bit(const Words& words, int64_t token) {
  const auto place = static_cast<size_t>(token);
  return (words[place / 32] >> place % 32 & 1u) != 0;
}
inline Words mask_of(engine_core::GrammarSession& session) {
  Words words(compiler().mask_words());
  session.mask(words);
  return words;
}
inline std::string bytes_of(int64_t token) {
  if (token == eos()) return {};
  return std::string(tokenizer().token_bytes(static_cast<int32_t>(token)));
}

class Random {
 public:
  /// --gtest_random_seed=N brings other draws.
  explicit Random(uint64_t seed)
      : engine_(seed + 1000 * static_cast<uint64_t>(GTEST_FLAG_GET(random_seed))) {}
  int64_t below(int64_t count) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count));
  }
  bool chance(double share) { return static_cast<double>(below(1'000'000)) < share * 1e6; }
  template <typename T>
  const T& of(const std::vector<T>& values) {
    return values[static_cast<size_t>(below(std::ssize(values)))];
  }

 private:
  std::mt19937_64 engine_;
};

/// One of the allowed tokens; often one whose bytes matter.
inline int64_t pick(const Words& words, Random& random) {
  static const std::vector<int64_t> special = [] {
    std::vector<int64_t> tokens;
    for (int64_t token = 0; token < tokenizer().vocab_size(); ++token) {
      const std::string bytes = bytes_of(token);
      const bool rare = std::any_of(bytes.begin(), bytes.end(), [](char c) {
        return (c & 0x80) != 0 || std::string_view("\"\\}],<:").find(c) != std::string_view::npos;
      });
      if (rare) tokens.push_back(token);
    }
    return tokens;
  }();
  for (int tries = 0; tries < 40; ++tries) {
    const int64_t token =
        random.chance(0.6) ? random.of(special) : random.below(tokenizer().vocab_size());
    if (bit(words, token)) return token;
  }
  std::vector<int64_t> allowed;
  for (int64_t token = 0; token < tokenizer().vocab_size(); ++token) {
    if (bit(words, token)) allowed.push_back(token);
  }
  return allowed.empty() ? -1 : random.of(allowed);
}

/// Every token is taken or refused as the mask says, and taking it back leaves no trace.
inline void expect_mask_is_acceptance(engine_core::GrammarSession& session,
                                      const std::string& text) {
  const Words words = mask_of(session);
  for (int64_t token = 0; token < tokenizer().vocab_size(); ++token) {
    const bool taken = session.accept(token);
    ASSERT_EQ(taken, bit(words, token)) << text << " then " << bytes_of(token);
    if (taken) session.rollback(1);
  }
  ASSERT_EQ(mask_of(session), words) << text;
}

/// A walk to the end; "" if it takes too long. Masks are what accept() does, drafts leave no trace.
inline std::string walk(engine_core::GrammarSession& session,
                        Random& random,
                        double all_tokens = 0.05) {
  std::string text;
  for (int step = 0; step < 300 && !::testing::Test::HasFailure(); ++step) {
    if (random.chance(all_tokens)) expect_mask_is_acceptance(session, text);
    const Words words = mask_of(session);
    if (random.chance(0.1)) {
      const int64_t before = session.length();
      for (int64_t count = random.below(5); count >= 0; --count)
        EXPECT_TRUE(session.accept(pick(mask_of(session), random))) << text;
      session.rollback(session.length() - before);
      EXPECT_EQ(mask_of(session), words) << text;
    }
    const int64_t token =
        bit(words, eos()) && random.chance(0.5) ? int64_t{eos()} : pick(words, random);
    EXPECT_GE(token, 0) << "nothing may follow " << text;
    if (token < 0 || !session.accept(token)) {
      ADD_FAILURE() << text;
      return "";
    }
    if (token == eos()) return text;
    text += bytes_of(token);
  }
  return "";
}

/// Text cut into tokens at random places.
inline std::vector<int64_t> cut(const std::string& text, Random& random) {
  using Tokens = std::vector<std::pair<std::string, int64_t>>;
  static const std::vector<Tokens> by_first = [] {
    std::vector<Tokens> tokens(256);
    for (int64_t token = 0; token < tokenizer().vocab_size(); ++token) {
      const std::string bytes = bytes_of(token);
      const bool added = bytes.starts_with("<") && bytes.ends_with(">") && bytes.size() > 3;
      if (!bytes.empty() && !added)
        tokens[static_cast<uint8_t>(bytes[0])].emplace_back(bytes, token);
    }
    return tokens;
  }();
  std::vector<int64_t> out;
  for (size_t pos = 0; pos < text.size();) {
    const Tokens& tokens = by_first[static_cast<uint8_t>(text[pos])];
    std::vector<size_t> fitting;
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (text.compare(pos, tokens[i].first.size(), tokens[i].first) == 0) fitting.push_back(i);
    }
    const auto& [bytes, token] = tokens[random.of(fitting)];
    out.push_back(token);
    pos += bytes.size();
  }
  return out;
}

inline bool takes(engine_core::GrammarSession session, const std::string& text, Random& random) {
  Words words(compiler().mask_words());
  const std::vector<int64_t> tokens = cut(text, random);
  for (int64_t i = 0; i < std::ssize(tokens); ++i) {
    const int64_t token = tokens[static_cast<size_t>(i)];
    const bool looks = i > std::ssize(tokens) - 50 || random.chance(0.1);
    if (looks) session.mask(words);
    const bool taken = session.accept(token);
    if (looks) {
      EXPECT_EQ(bit(words, token), taken) << text << " at " << bytes_of(token);
    }
    if (!taken) return false;
  }
  return session.completed();
}

inline double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace hadal::testing::walks
