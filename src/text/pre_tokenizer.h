// The pre-tokeniser: cuts text into the pieces that byte-pair merging never crosses.
//
// A pre-tokeniser is a list of regular expressions (the Split stages of tokenizer.json, behaviour
// Isolated): each stage cuts every piece of the one before into its matches and the gaps between
// them. The official list has a hand-written path (official_splitter.h); any other runs on PCRE2
// with JIT. Splitting is const and safe from many threads.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace hadal::text {

class PreTokenizer {
 public:
  /// The three expressions of chat_encoding.md 6.
  static const std::vector<std::string>& official_patterns();

  /// Errors: InputError for an expression PCRE2 cannot compile (named with its position).
  /// use_fast_path = false runs the official expressions on PCRE2, too.
  explicit PreTokenizer(const std::vector<std::string>& patterns, bool use_fast_path = true);
  ~PreTokenizer();
  PreTokenizer(PreTokenizer&&) noexcept;
  PreTokenizer& operator=(PreTokenizer&&) noexcept;

  /// Whether OfficialSplitter gives this pre-tokeniser's pieces.
  bool is_official() const { return official_; }

  /// The pieces of valid UTF-8, in order; they cover the text.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  class Regex;
  std::vector<Regex> stages_;
  bool official_ = false;
};

}  // namespace hadal::text
