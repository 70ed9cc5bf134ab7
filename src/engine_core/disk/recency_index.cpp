#include "engine_core/disk/recency_index.h"

#include <algorithm>

#include "base/check.h"

namespace hadal::engine_core {

bool RecencyIndex::Rank::operator<(const Rank& other) const {
  if (last_used != other.last_used) return last_used < other.last_used;
  if (pos != other.pos) return pos > other.pos;
  if (bytes != other.bytes) return bytes > other.bytes;
  return *key < *other.key;
}

RecencyIndex::Rank RecencyIndex::rank(const std::pair<const std::string, Node>& node) {
  const IndexEntry& entry = node.second.entry;
  return {entry.last_used, entry.pos, entry.bytes, &node.first};
}

RecencyIndex::State RecencyIndex::state(const std::string& key) const {
  const auto found = nodes_.find(key);
  if (found == nodes_.end()) return State::kAbsent;
  return found->second.stored ? State::kStored : State::kQueued;
}

void RecencyIndex::add(const std::string& key, const Node& node) {
  const auto [place, added] = nodes_.emplace(key, node);
  HADAL_CHECK(added, "recency_index: a key twice");
  order_.insert(rank(*place));
  bytes_ += node.entry.bytes;
}

void RecencyIndex::insert(const std::string& key,
                          int64_t pos,
                          int64_t bytes,
                          const std::string& like) {
  const auto kin = nodes_.find(like);
  const uint64_t used = kin == nodes_.end() ? now_ : kin->second.entry.last_used;
  add(key, {.entry = {.pos = pos, .bytes = bytes, .last_used = used}});
}

void RecencyIndex::restore(const std::string& key, const IndexEntry& entry) {
  add(key, {.entry = entry, .stored = true});
  now_ = std::max(now_, entry.last_used);
}

void RecencyIndex::mark_stored(const std::string& key) { nodes_.at(key).stored = true; }

void RecencyIndex::touch(const std::string& key, uint64_t time) {
  const auto found = nodes_.find(key);
  if (found == nodes_.end() || found->second.entry.last_used >= time) return;
  order_.erase(rank(*found));
  found->second.entry.last_used = time;
  order_.insert(rank(*found));
  if (found->second.touched) return;
  found->second.touched = true;
  touched_.push_back(key);
}

void RecencyIndex::erase(const std::string& key) {
  const auto found = nodes_.find(key);
  if (found == nodes_.end()) return;
  order_.erase(rank(*found));
  bytes_ -= found->second.entry.bytes;
  nodes_.erase(found);
}

void RecencyIndex::clear() {
  order_.clear();
  nodes_.clear();
  touched_.clear();
  bytes_ = 0;
}

std::vector<std::pair<std::string, IndexEntry>> RecencyIndex::take_touched(size_t at_most) {
  std::vector<std::pair<std::string, IndexEntry>> taken;
  while (!touched_.empty() && taken.size() < at_most) {
    const auto found = nodes_.find(touched_.back());
    if (found != nodes_.end() && found->second.touched) {
      found->second.touched = false;
      // One that is still queued is written with its time.
      if (found->second.stored) taken.emplace_back(found->first, found->second.entry);
    }
    touched_.pop_back();
  }
  return taken;
}

void RecencyIndex::check_integrity() const {
  int64_t bytes = 0;
  for (const auto& node : nodes_) {
    HADAL_CHECK(order_.contains(rank(node)), "recency_index: a key without its rank");
    HADAL_CHECK(node.second.entry.last_used <= now_, "recency_index: a use in the future");
    bytes += node.second.entry.bytes;
  }
  HADAL_CHECK(order_.size() == nodes_.size(), "recency_index: ", order_.size(), " ranks of ",
              nodes_.size(), " keys");
  HADAL_CHECK(bytes == bytes_, "recency_index: ", bytes_, " bytes counted, ", bytes, " held");
}

}  // namespace hadal::engine_core
