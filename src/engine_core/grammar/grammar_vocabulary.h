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

namespace hadal::engine_core {

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

/// What stands for the marker's own token in the grammars of tool calls: a character that no JSON
/// string holds and that no other token brings there, so that text which only looks like the marker
/// is text.
inline constexpr std::string_view kMarkerSign = "\x01";

/// What follows from the tokenizer alone.
struct GrammarVocabulary {
  int64_t size = 0;
  int32_t eos = -1;
  std::vector<std::string> bytes;                           ///< empty: never part of a match
  std::vector<uint32_t> thinking_mask;                      ///< ordinary tokens and `</think>`
  int64_t think_end = -1;                                   ///< its own token
  std::optional<xgrammar::TokenizerInfo> plain, with_dsml;  ///< with_dsml: for tool calls

  size_t mask_words() const { return static_cast<size_t>((size + 31) / 32); }
  int64_t dsml = -1;  ///< the marker's own token
  /// By Utf8State: the tokens behind which the text is still UTF-8.
  std::array<std::vector<uint32_t>, kUtf8States> utf8_masks;
};

/// `size` tokens in a row of logits, at least the tokenizer's; 0: as many as it has.
std::shared_ptr<const GrammarVocabulary> make_vocabulary(const text::Tokenizer& tokenizer,
                                                         int64_t size);

}  // namespace hadal::engine_core
