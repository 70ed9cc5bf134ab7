// Finds added tokens in a text: leftmost, then longest.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace hadal::text {

/// A byte trie of token contents; immutable once filled.
class AddedTokenMatcher {
 public:
  struct Match {
    size_t pos = 0;
    size_t length = 0;  ///< 0: nothing found
    int32_t id = 0;
  };

  void add(std::string_view content, int32_t id);
  /// The first token at or after `from`.
  Match find(std::string_view text, size_t from) const;

 private:
  struct Node {
    std::vector<std::pair<uint8_t, uint32_t>> children;  ///< byte, node; in order of insertion
    int32_t id = -1;                                     ///< of the token that ends here
  };
  static uint32_t child(const Node& node, uint8_t byte) {
    for (const auto& [key, target] : node.children) {
      if (key == byte) return target;
    }
    return 0;  // the root is nobody's child
  }

  std::vector<Node> nodes_ = std::vector<Node>(1);
  std::array<bool, 256> starts_ = {};  ///< bytes that begin a token
};

inline void AddedTokenMatcher::add(std::string_view content, int32_t id) {
  starts_[static_cast<uint8_t>(content.front())] = true;
  uint32_t at = 0;
  for (const char c : content) {
    uint32_t next = child(nodes_[at], static_cast<uint8_t>(c));
    if (next == 0) {
      next = static_cast<uint32_t>(nodes_.size());
      nodes_[at].children.emplace_back(static_cast<uint8_t>(c), next);
      nodes_.emplace_back();
    }
    at = next;
  }
  nodes_[at].id = id;
}

inline AddedTokenMatcher::Match AddedTokenMatcher::find(std::string_view text, size_t from) const {
  for (size_t pos = from; pos < text.size(); ++pos) {
    if (!starts_[static_cast<uint8_t>(text[pos])]) continue;
    Match best;
    uint32_t at = 0;
    for (size_t end = pos; end < text.size(); ++end) {
      at = child(nodes_[at], static_cast<uint8_t>(text[end]));
      if (at == 0) break;
      if (nodes_[at].id >= 0) best = {pos, end + 1 - pos, nodes_[at].id};
    }
    if (best.length != 0) return best;
  }
  return {text.size(), 0, 0};
}

}  // namespace hadal::text
