#include "engine_core/prefix/prefix_pins.h"

#include <algorithm>

#include "base/check.h"
#include "engine_core/prefix/prefix_node.h"

namespace hadal::engine_core {
namespace {

/// However few pages they hold: fewer than the states among which the tree looks for the least
/// worth, so that it always finds one that no key holds.
constexpr size_t kMostKeys = 1024;

}  // namespace

void PrefixPins::pin(const CacheKey& key, Pin which, PrefixNode* node, Clock::time_point now) {
  expire(now);
  const std::string name = concat(key.client, std::string_view("\0", 1), key.name);
  auto found = keys_.find(name);
  if (found == keys_.end()) {
    if (node == nullptr) return;
    found = keys_.emplace(name, Held{.client = key.client, .expiry = now}).first;
  }
  Held& held = found->second;
  held.last_use = ++uses_;
  held.expiry = now + key.retention;
  earliest_ = std::min(earliest_, held.expiry);
  PrefixNode*& place = held.nodes[static_cast<size_t>(which)];
  if (place == node) return;
  if (node != nullptr) held.pages = hold(*node);
  if (place != nullptr) let_go(*place);
  place = node;
  while (pages_ > max_pages_ || keys_.size() > kMostKeys) drop(next_to_go());
}

// The pages that it needs, whoever else needs them.
int64_t PrefixPins::hold(PrefixNode& node) {
  int64_t needed = std::ssize(node.snapshot);
  if (node.pins++ == 0) pages_ += needed;
  for (PrefixNode* at = &node; at->parent != nullptr; at = at->parent, ++needed)
    if (at->pins_below++ == 0) ++pages_;
  return needed;
}

void PrefixPins::let_go(PrefixNode& node) {
  if (--node.pins == 0) pages_ -= std::ssize(node.snapshot);
  for (PrefixNode* at = &node; at->parent != nullptr; at = at->parent)
    if (--at->pins_below == 0) --pages_;
}

PrefixPins::Keys::iterator PrefixPins::drop(Keys::iterator key) {
  for (PrefixNode* node : key->second.nodes)
    if (node != nullptr) let_go(*node);
  return keys_.erase(key);
}

// The least recently used of the client whose keys hold the most.
PrefixPins::Keys::iterator PrefixPins::next_to_go() {
  std::unordered_map<std::string_view, int64_t> clients;
  for (const auto& [name, held] : keys_) clients[held.client] += held.pages;
  const auto most =
      std::ranges::max_element(clients, {}, [](const auto& client) { return client.second; });
  auto oldest = keys_.end();
  for (auto key = keys_.begin(); key != keys_.end(); ++key) {
    if (key->second.client != most->first) continue;
    if (oldest == keys_.end() || key->second.last_use < oldest->second.last_use) oldest = key;
  }
  return oldest;
}

void PrefixPins::forget(PrefixNode& node) {
  for (auto key = keys_.begin(); key != keys_.end() && node.pins > 0;) {
    bool empty = true;
    for (PrefixNode*& held : key->second.nodes) {
      if (held == &node) {
        held = nullptr;
        let_go(node);
      }
      empty = empty && held == nullptr;
    }
    key = empty ? keys_.erase(key) : std::next(key);
  }
}

void PrefixPins::expire(Clock::time_point now) {
  if (now < earliest_) return;
  earliest_ = Clock::time_point::max();
  for (auto key = keys_.begin(); key != keys_.end();) {
    if (key->second.expiry <= now) {
      key = drop(key);
    } else {
      earliest_ = std::min(earliest_, key->second.expiry);
      ++key;
    }
  }
}

void PrefixPins::check_integrity() const {
  HADAL_CHECK(pages_ <= max_pages_ && keys_.size() <= kMostKeys, "prefix_pins: ", keys_.size(),
              " keys hold ", pages_, " pages, at most ", max_pages_);
  for (const auto& [name, held] : keys_) {
    for (const PrefixNode* node : held.nodes)
      HADAL_CHECK(node == nullptr || (node->has_state() && node->pins > 0),
                  "prefix_pins: a key holds what is not kept");
  }
}

}  // namespace hadal::engine_core
