#include "server/call_memory.h"

#include <utility>
#include <vector>

#include "base/check.h"

namespace hadal::server {
namespace {

constexpr size_t kOverhead = 256;  ///< of an entry, beside its texts

bool same_json(const std::string& a, const std::string& b) {
  if (a == b) return true;
  try {
    return text::PyJson::parse(a, "arguments").dump() == text::PyJson::parse(b, "arguments").dump();
  } catch (const InputError&) {
    return false;
  }
}

bool is_as_we_write(const text::ToolCall& call) {
  text::ToolCall ours = call;
  ours.raw = {};
  return text::write_tool_calls(std::vector{call}) == text::write_tool_calls(std::vector{ours});
}

}  // namespace

void CallMemory::remember(const std::string& id, const text::ToolCall& call) {
  if (call.raw.text.empty() || is_as_we_write(call)) return;
  const size_t bytes = kOverhead + 2 * id.size() + call.name.size() + call.arguments.size() +
                       call.raw.text.size() + call.raw.special.size() * sizeof(text::TextRange);
  if (bytes > max_bytes_) return;
  const std::lock_guard lock(mutex_);
  if (entries_.contains(id)) return;
  ages_.push_back(id);
  entries_.emplace(id, Entry{call, bytes});
  bytes_ += bytes;
  while (bytes_ > max_bytes_) {
    const auto oldest = entries_.find(ages_.front());
    bytes_ -= oldest->second.bytes;
    entries_.erase(oldest);
    ages_.pop_front();
  }
}

std::optional<text::RawMarkup> CallMemory::recall(std::string_view id,
                                                  const text::ToolCall& call) const {
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find(id);
  if (found == entries_.end() || found->second.call.name != call.name ||
      !same_json(found->second.call.arguments, call.arguments))
    return std::nullopt;
  return found->second.call.raw;
}

size_t CallMemory::bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

}  // namespace hadal::server
