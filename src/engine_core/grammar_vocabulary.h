// What grammars need to know of a tokenizer, once for all of them: masks and borders that follow
// from the bytes of its tokens, and where a text stands between UTF-8 characters.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>
#include <xgrammar/xgrammar.h>

#include "text/chat_tokens.h"
#include "text/tokenizer.h"

namespace hadal::engine {

/// A token that, with so much of `</think>` before it, ends the thinking and brings more.
struct Border {
  int32_t token;
  size_t rest;  ///< where its bytes behind it begin
};

/// Where a text stands between two characters (kWhole) or inside one: what may follow is UTF-8 or
/// it is not (Unicode 16, table 3-7). -1: it cannot be.
enum Utf8State : int8_t {
  kBroken = -1,
  kWhole,
  kOne,
  kTwo,
  kThree,
  kAfterE0,
  kAfterEd,
  kAfterF0,
  kAfterF4
};
inline constexpr int kUtf8States = 8;

/// The state behind `bytes`; a token without bytes (an added one) stands between characters only.
int8_t step_utf8(int8_t state, std::string_view bytes);

/// What follows from the tokenizer alone.
struct GrammarVocabulary {
  int64_t size = 0;
  int32_t eos = -1;
  std::vector<std::string> bytes;       ///< empty: never part of a match
  std::vector<uint32_t> thinking_mask;  ///< ordinary tokens and `</think>`
  std::array<std::vector<Border>, text::kThinkEnd.size()> borders;
  std::optional<xgrammar::TokenizerInfo> plain, with_dsml;

  size_t mask_words() const { return static_cast<size_t>((size + 31) / 32); }
  std::string_view bytes_with_dsml(size_t place) const {
    if (static_cast<int64_t>(place) == dsml) return text::kDsml;
    return place < bytes.size() ? std::string_view(bytes[place]) : std::string_view();
  }
  int64_t dsml = -1;  ///< the marker's own token
  /// The tokens that complete the marker, by how much of it the text ends with.
  std::array<std::vector<int32_t>, text::kDsml.size()> marker_ends;
  /// By Utf8State: the tokens behind which the text is still UTF-8.
  std::array<std::vector<uint32_t>, kUtf8States> utf8_masks;
};

/// `size` tokens in a row of logits, at least the tokenizer's; 0: as many as it has.
std::shared_ptr<const GrammarVocabulary> make_vocabulary(const text::Tokenizer& tokenizer,
                                                         int64_t size);

}  // namespace hadal::engine
