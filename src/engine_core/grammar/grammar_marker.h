// Where a text may hold the marker of tool calls: only where a block of calls begins, so that the
// parser of answers (text/completion_parser.h) finds no markup in the text before it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

namespace hadal::engine_core {

/// What stands before the marker of a block.
inline constexpr std::string_view kBlockBegin = "\n\n<";

/// Follows a text up to its first marker; knows no more behind that.
class MarkerGuard {
 public:
  enum class Watch : uint8_t {
    kNothing,  ///< the marker stands where the grammar says
    kBlocks,   ///< behind kBlockBegin, whatever comes before
    kStart,    ///< behind kBlockBegin at the text's start: an answer is calls or something else
  };
  explicit MarkerGuard(Watch watch) : watch_(watch) {}

  bool allows_marker() const {
    if (watch_ == Watch::kNothing) return true;
    return watch_ == Watch::kStart ? tail_ == kBlockBegin : tail_.ends_with(kBlockBegin);
  }
  void add_marker() { watch_ = Watch::kNothing; }
  void add(std::string_view bytes) {
    if (watch_ == Watch::kNothing) return;
    // One byte more than kBlockBegin, to know whether the text is longer.
    constexpr size_t kKept = kBlockBegin.size() + 1;
    tail_ += bytes.substr(bytes.size() - std::min(bytes.size(), kKept));
    tail_.erase(0, tail_.size() - std::min(tail_.size(), kKept));
  }

 private:
  Watch watch_;
  std::string tail_;
};

}  // namespace hadal::engine_core
