// Calls as a model wrote them, by their ids: a client that sends one back gets the bytes of then
// into the next prompt, which the caches know, not the form in which we would have written it.
//
// Kept are those that differ from our form, the newest, within a bound of bytes. Thread-safe.
#pragma once

#include <cstddef>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "text/tool_calls.h"

namespace hadal::server {

class CallMemory {
 public:
  explicit CallMemory(size_t max_bytes = size_t{4} << 20) : max_bytes_(max_bytes) {}

  void remember(const std::string& id, const text::ToolCall& call);
  /// The markup of a call that has this id, if name and arguments are still the same (as JSON).
  std::optional<text::RawMarkup> recall(std::string_view id, const text::ToolCall& call) const;
  size_t bytes() const;

 private:
  struct Entry {
    text::ToolCall call;
    size_t bytes = 0;
  };
  const size_t max_bytes_;
  mutable std::mutex mutex_;
  std::map<std::string, Entry, std::less<>> entries_;
  std::list<std::string> ages_;  ///< oldest first
  size_t bytes_ = 0;
};

}  // namespace hadal::server
