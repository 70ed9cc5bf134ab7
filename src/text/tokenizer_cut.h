// Makes a small tokenizer out of a large one: the first merges, in the order of the source, that a
// training text uses.
//
// "Uses" is counted over derivations, not over final tokens: a merge occurs each time it is applied
// while the text is encoded (added tokens as plain text). Every application of a merge consumes one
// result of each of the merges that made its parts, so the parts of a kept merge occur at least as
// often as it does and are kept, too; rare merges can be left out without orphaning others. When
// all merges that occur are kept, the small tokenizer cuts the training text exactly as its source
// does.
//
// Ids of the result: the source's added tokens below the first byte (BOS, EOS, pad) and the 256
// bytes keep theirs, then the merges in order, then the chosen added tokens. Pre-tokeniser and
// decoder are those of the source.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace hadal::text {

struct TokenizerCutOptions {
  int64_t vocab_size = 8192;
  int64_t min_count = 5;  ///< a merge must occur this often
  /// Added tokens that get the last ids, in this order; chat_token_names() unless the caller knows
  /// better.
  std::vector<std::string> added_tokens;
};

/// The added tokens the chat encoding uses (chat_encoding.md 1), without ids 0 to 2.
std::vector<std::string> chat_token_names();

/// Counts merges over texts, then writes a tokenizer. Texts may come in any order and number; equal
/// pieces cost nothing.
class TokenizerCutter {
 public:
  /// The source's tokenizer.json; `name` begins messages about it.
  TokenizerCutter(std::string_view json, std::string_view name);
  ~TokenizerCutter();
  TokenizerCutter(const TokenizerCutter&) = delete;
  TokenizerCutter& operator=(const TokenizerCutter&) = delete;

  void add(std::string_view text);

  /// How often each merge of the source occurred, by rank.
  std::vector<int64_t> merge_counts() const;

  /// The text of the new tokenizer.json. Errors: InputError if fewer merges qualify than the
  /// vocabulary has room for, if the vocabulary is too small for bytes and added tokens, or if the
  /// source lacks an added token.
  std::string cut(const TokenizerCutOptions& options) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// All in one: `next_text` fills its argument and returns true until there are no more texts.
std::string cut_tokenizer(std::string_view json,
                          std::string_view name,
                          const TokenizerCutOptions& options,
                          const std::function<bool(std::string& text)>& next_text);

}  // namespace hadal::text
