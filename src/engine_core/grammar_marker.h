// Where a text may hold the marker of tool calls, `|DSML|`: only where a block of calls begins, so
// that the parser of answers (text/completion_parser.h) finds no markup in the text before it.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "text/chat_tokens.h"

namespace hadal::engine {

/// How much of `pattern` a text ends with, one byte later, for a pattern of which a failed match
/// leaves its first byte at most (`</think>`, the marker). `matched` is less than its length.
constexpr size_t step_match(std::string_view pattern, size_t matched, char byte) {
  if (byte == pattern[matched]) return matched + 1;
  return byte == pattern[0] ? 1 : 0;
}

/// What every block of calls begins with, and nothing else may: an empty line, `<` and the marker.
inline constexpr std::string_view kBlockMarker = "\n\n<\uff5cDSML\uff5c";
static_assert(kBlockMarker.ends_with(text::kDsml));

/// Follows a text, however its tokens cut it, up to its first marker; knows no more behind that.
class MarkerGuard {
 public:
  explicit MarkerGuard(bool watches) : watches_(watches) {}

  bool watches() const { return watches_; }
  /// Whether `bytes` may come next: they complete no marker, or one where it may stand.
  bool allows(std::string_view bytes) const {
    if (!watches_) return true;
    const std::string seen = tail_ + std::string(bytes);
    const size_t pos = seen.find(text::kDsml);
    return pos == std::string::npos ||
           std::string_view(seen).substr(0, pos + text::kDsml.size()).ends_with(kBlockMarker);
  }
  /// Adds what may come next.
  void add(std::string_view bytes) {
    if (!watches_) return;
    tail_ += bytes;
    watches_ = tail_.find(text::kDsml) == std::string::npos;
    const size_t kept = watches_ ? std::min(tail_.size(), kBlockMarker.size() - 1) : 0;
    tail_.erase(0, tail_.size() - kept);
  }
  /// How much of the marker the text ends with.
  size_t matched() const {
    size_t now = 0;
    for (const char byte : tail_) now = step_match(text::kDsml, now, byte);
    return now;
  }

 private:
  bool watches_;
  std::string tail_;  ///< the last bytes of the text; no marker in them
};

}  // namespace hadal::engine
