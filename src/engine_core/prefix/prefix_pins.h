// Which states of the prefix tree clients asked to keep, by keys of theirs (CacheKey).
//
// A key holds the last state before a prompt's last token, the last end of an answer, and the state
// that its last request began with where that came again (many requests behind one beginning). What
// keys hold is evicted after everything that no key does, so:
//   - keys hold a share of the pages at most; the client that holds the most gives up its least
//     recently used key first, so that no flood of keys takes anything from those without, nor from
//     other clients' keys more than their share;
//   - a key that is not used lets go after its time (CacheKey::retention).
// Pages on the way to several held states count once. One thread.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>

#include "engine_core/request.h"

namespace hadal::engine_core {

struct PrefixNode;

/// What of its last request a key holds.
enum class Pin : uint8_t { kBeginning, kPrompt, kEnd };

class PrefixPins {
 public:
  using Clock = std::chrono::steady_clock;
  explicit PrefixPins(int64_t max_pages) : max_pages_(max_pages) {}

  /// The key holds `node`, which has a state, in place of what it held as `which`; null: nothing.
  void pin(const CacheKey& key, Pin which, PrefixNode* node, Clock::time_point now);
  /// The node's state goes.
  void forget(PrefixNode& node);
  void expire(Clock::time_point now);

  int64_t num_pages() const { return pages_; }
  int64_t num_keys() const { return static_cast<int64_t>(keys_.size()); }
  void check_integrity() const;

 private:
  struct Held {
    std::string client;
    std::array<PrefixNode*, 3> nodes = {};
    int64_t pages = 0;  ///< of the last one, those on the way to it included
    uint64_t last_use = 0;
    Clock::time_point expiry;
  };
  using Keys = std::unordered_map<std::string, Held>;

  int64_t hold(PrefixNode& node);
  void let_go(PrefixNode& node);
  Keys::iterator drop(Keys::iterator key);
  Keys::iterator next_to_go();

  int64_t max_pages_;
  Keys keys_;  ///< by client and name
  int64_t pages_ = 0;
  uint64_t uses_ = 0;
  Clock::time_point earliest_ = Clock::time_point::max();  ///< no key expires before
};

}  // namespace hadal::engine_core
