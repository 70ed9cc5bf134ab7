// The text of one answer as its tokens arrive, up to the first stop string.
//
// StopStream takes the bytes of each token and hands out text that is certain not to belong to a
// stop string: whatever could still become one is held back, across token borders and inside
// characters. It hands out whole UTF-8 characters only; bytes that form none become U+FFFD, and
// stop strings are looked for in the repaired text. The stop string that is whole first ends the
// answer (of several that end together, the longest) and is cut off. All pieces concatenated are
// the same for every way of cutting the bytes. One stream belongs to one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/utf8.h"

namespace hadal::engine_core {

/// The stop strings of a request, compiled once and shared by its choices: an Aho-Corasick
/// automaton over bytes. Immutable, safe from many threads.
class StopSet {
 public:
  /// Repairs invalid UTF-8, as the text is repaired; repeated strings count once. Errors:
  /// InputError for an empty string.
  explicit StopSet(std::span<const std::string> stops);

  bool empty() const { return stops_.empty(); }

 private:
  friend class StopStream;
  struct Node {
    int32_t child = -1;    ///< first of the nodes one byte longer
    int32_t sibling = -1;  ///< next with the same parent
    int32_t fail = 0;      ///< longest proper suffix that is a node
    int32_t depth = 0;
    int32_t longest = -1;  ///< longest stop string that is a suffix of the node's text, or -1
    uint8_t byte = 0;
  };
  int32_t step(int32_t node, uint8_t byte) const;
  int32_t find_child(int32_t node, uint8_t byte) const;

  std::vector<std::string> stops_;
  // Stop strings begin and end with whole characters, and the text comes in whole characters: so
  // do the text held back and what a match leaves of it.
  std::vector<Node> nodes_;  ///< the root first
};

class StopStream {
 public:
  /// `stops` may be null: no stop strings.
  explicit StopStream(std::shared_ptr<const StopSet> stops) : stops_(std::move(stops)) {}

  /// Adds the bytes of one token; returns what is certain now. Nothing once stopped().
  std::string push(std::string_view bytes);
  /// Ends a stretch in which stop strings may lie, like finish(), but more may follow.
  std::string flush();
  /// Ends the answer, perhaps with a stop string that an unfinished character completes as U+FFFD;
  /// returns what was held back. Call it once.
  std::string finish();

  /// The stop string that ended the answer, as the request had it (repaired).
  const std::optional<std::string>& matched() const { return matched_; }
  bool watches() const { return stops_ != nullptr && !stops_->empty(); }
  bool stopped() const { return matched_.has_value(); }
  /// Bytes held back, those of an unfinished character included.
  size_t pending() const { return held_.size() + utf8_.pending(); }

 private:
  std::string take(std::string text);

  std::shared_ptr<const StopSet> stops_;
  text::Utf8Stream utf8_;
  std::string held_;  ///< text that may begin a stop string
  int32_t node_ = 0;  ///< the longest suffix of the text that begins a stop string
  std::optional<std::string> matched_;
};

}  // namespace hadal::engine_core
