// What happens to a document before it becomes tokens: fill in the middle, and splitting of tokens
// (training.md "data pipeline"; both inherited from DeepSeek-V3). Functions of a seed, the
// document's number in its source and its text, so that a source's tokens are the same wherever and
// however often they are made.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace hadal::data {

struct TextTransforms {
  /// Share of the documents that are rearranged: prefix, suffix, middle, cut at two random
  /// characters, as BOS <fim_begin> prefix <fim_hole> suffix <fim_end> middle EOS.
  double fim_rate = 0.0;
  /// Share of the tokens which fuse punctuation with the line breaks behind it that become the
  /// tokens of the two, so that a model knows text that ends in between.
  double split_rate = 0.0;
  uint64_t seed = 1;

  bool any() const { return fim_rate > 0.0 || split_rate > 0.0; }
};

/// The official names of FIM's marks.
inline constexpr std::string_view kFimBegin = "<｜fim▁begin｜>", kFimHole = "<｜fim▁hole｜>",
                                  kFimEnd = "<｜fim▁end｜>";

/// Where the middle of a document begins and ends, in bytes, at borders of characters; the whole
/// text twice where it stays as it is.
struct Middle {
  size_t begin = 0, end = 0;
  bool chosen = false;
};

class DocumentEncoder {
 public:
  /// `tokenizer` must outlive it. Errors: InputError where it has no BOS, EOS or, with a fim_rate,
  /// no marks of FIM.
  DocumentEncoder(const text::Tokenizer& tokenizer, const TextTransforms& transforms);

  /// BOS, the text's tokens, EOS; `text` is UTF-8, `number` counts the source's documents.
  std::vector<int32_t> encode(std::string_view text, int64_t number) const;

  /// What encode() does to document `number`; texts of fewer than three bytes stay as they are.
  Middle middle_of(std::string_view text, int64_t number) const;
  /// Ids that may be split, ascending: bytes that end in ASCII punctuation, then line breaks.
  std::vector<int32_t> fused_tokens() const;

 private:
  void add(std::string_view text, int64_t number, std::vector<int32_t>& ids) const;

  const text::Tokenizer& tokenizer_;
  TextTransforms transforms_;
  int32_t bos_ = 0, eos_ = 0, fim_begin_ = 0, fim_hole_ = 0, fim_end_ = 0;
  /// By id: tokens of its two halves; empty for all others.
  std::vector<std::vector<int32_t>> halves_;
};

}  // namespace hadal::data
