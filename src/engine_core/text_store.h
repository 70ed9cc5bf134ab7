// Texts by name in a store that outlives the process: what servers keep beside prefixes, within the
// same budget.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace hadal::engine_core {

/// Thread-safe. What cannot be written or read is a text that is not there: logged, never thrown.
class TextStore {
 public:
  virtual ~TextStore() = default;
  /// Under a name that has no text yet. It is there at once for get_text(), on disk soon after.
  /// False: it is not kept.
  virtual bool put_text(const std::string& name, const std::string& text) = 0;
  /// What was put there; the longer a text is not read, the sooner it makes room.
  virtual std::optional<std::string> get_text(const std::string& name) = 0;
  /// Whether it was there.
  virtual bool erase_text(const std::string& name) = 0;
};

}  // namespace hadal::engine_core
