#include "engine_core/answer/stop.h"

#include <algorithm>

#include "base/check.h"

namespace hadal::engine_core {

StopSet::StopSet(std::span<const std::string> stops) : nodes_(1) {
  for (const std::string& stop : stops) {
    HADAL_INPUT_CHECK(!stop.empty(), "stop: an empty stop string");
    std::string repaired = text::repair_utf8(stop);
    if (std::find(stops_.begin(), stops_.end(), repaired) == stops_.end()) {
      stops_.push_back(std::move(repaired));
    }
  }
  for (size_t index = 0; index < stops_.size(); ++index) {
    int32_t node = 0;
    for (const char c : stops_[index]) {
      const auto byte = static_cast<uint8_t>(c);
      int32_t child = find_child(node, byte);
      if (child < 0) {
        child = static_cast<int32_t>(nodes_.size());
        Node& parent = nodes_[static_cast<size_t>(node)];
        Node added{.sibling = parent.child, .depth = parent.depth + 1, .byte = byte};
        parent.child = child;
        nodes_.push_back(added);
      }
      node = child;
    }
    nodes_[static_cast<size_t>(node)].longest = static_cast<int32_t>(index);
  }
  // Breadth first: the suffix a node falls back to is shorter, so it is done already.
  std::vector<int32_t> order = {0};
  for (size_t next = 0; next < order.size(); ++next) {
    const int32_t parent = order[next];
    for (int32_t child = nodes_[static_cast<size_t>(parent)].child; child >= 0;
         child = nodes_[static_cast<size_t>(child)].sibling) {
      Node& node = nodes_[static_cast<size_t>(child)];
      node.fail = parent == 0 ? 0 : step(nodes_[static_cast<size_t>(parent)].fail, node.byte);
      if (node.longest < 0) node.longest = nodes_[static_cast<size_t>(node.fail)].longest;
      order.push_back(child);
    }
  }
}

int32_t StopSet::find_child(int32_t node, uint8_t byte) const {
  int32_t child = nodes_[static_cast<size_t>(node)].child;
  while (child >= 0 && nodes_[static_cast<size_t>(child)].byte != byte) {
    child = nodes_[static_cast<size_t>(child)].sibling;
  }
  return child;
}

int32_t StopSet::step(int32_t node, uint8_t byte) const {
  for (;;) {
    const int32_t child = find_child(node, byte);
    if (child >= 0) return child;
    if (node == 0) return 0;
    node = nodes_[static_cast<size_t>(node)].fail;
  }
}

std::string StopStream::push(std::string_view bytes) {
  if (stopped()) return {};
  return take(utf8_.push(bytes));
}

std::string StopStream::finish() { return flush(); }

std::string StopStream::flush() {
  if (stopped()) return {};
  std::string out = take(utf8_.flush());
  if (!stopped()) out += held_;
  held_.clear();
  node_ = 0;
  return out;
}

std::string StopStream::take(std::string text) {
  if (stops_ == nullptr || stops_->empty()) return text;
  held_ += text;
  const size_t fresh = held_.size() - text.size();
  for (size_t pos = fresh; pos < held_.size(); ++pos) {
    node_ = stops_->step(node_, static_cast<uint8_t>(held_[pos]));
    const int32_t found = stops_->nodes_[static_cast<size_t>(node_)].longest;
    if (found < 0) continue;
    matched_ = stops_->stops_[static_cast<size_t>(found)];
    std::string out = held_.substr(0, pos + 1 - matched_->size());
    held_.clear();
    return out;
  }
  const auto keep = static_cast<size_t>(stops_->nodes_[static_cast<size_t>(node_)].depth);
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, out.size());
  return out;
}

}  // namespace hadal::engine_core
