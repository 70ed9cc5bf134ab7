// Names of prefixes: a chain of SHA-256 digests, one per page of token ids.
//
//   digest 0      = SHA-256("hadal prefix 1", page_tokens, identity)
//   digest i + 1  = SHA-256(digest i, token ids of page i as 64-bit little-endian integers)
//
// The digest behind a page so names the model and every token up to the page's end. The hash is a
// cryptographic one because clients choose the tokens: nobody can make two prefixes share a name.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <span>
#include <string_view>
#include <vector>

namespace hadal::engine_core {

using PrefixDigest = std::array<std::byte, 32>;

/// Of a text's name: no prefix has it.
PrefixDigest text_digest(std::string_view name);

/// Thread-safe. Remembers recent chains: a prompt that grows page by page is hashed once, not once
/// per page (each call compares the tokens, which is a hundred times cheaper).
class PrefixKeys {
 public:
  /// `identity`: all that must be equal for stored bytes to mean the same: the digest of the
  /// weights, the versions of numerics and layout.
  PrefixKeys(std::string_view identity, int64_t page_tokens);
  void set_identity(std::string_view identity);

  /// The digests behind every whole page of `tokens`.
  std::vector<PrefixDigest> chain(std::span<const int64_t> tokens);
  /// The last of them; `tokens` hold at least one page. `before`, if given, gets the one before
  /// (of the first page: that of no tokens).
  PrefixDigest last(std::span<const int64_t> tokens, PrefixDigest* before = nullptr);

  int64_t hashed_pages() const;  ///< so far

 private:
  struct Chain {
    std::vector<int64_t> tokens;  ///< whole pages
    std::vector<PrefixDigest> digests;
  };
  const Chain& extend(std::span<const int64_t> tokens);
  void forget_old();

  const int64_t page_tokens_;
  mutable std::mutex mutex_;
  PrefixDigest root_;
  std::list<Chain> recent_;  ///< last used first
  int64_t hashed_pages_ = 0;
};

}  // namespace hadal::engine_core
