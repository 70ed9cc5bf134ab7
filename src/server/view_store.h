// The context views of the latest answers, as the page asks for them.
#pragma once

#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "engine_core/request.h"

namespace hadal::server {

/// Thread-safe. Keeps the latest `capacity` views.
class ViewStore {
 public:
  explicit ViewStore(size_t capacity = 64) : capacity_(capacity) {}
  void put(const std::string& id, const engine_core::ContextView& view);
  /// JSON: {"id", "tokens", "window", "index_topk", "layers": [{"layer", "kind", "ratio", "blocks",
  /// "selected"}]}.
  std::optional<std::string> find(const std::string& id) const;

 private:
  const size_t capacity_;
  mutable std::mutex mutex_;
  std::deque<std::pair<std::string, std::string>> views_;
};

}  // namespace hadal::server
