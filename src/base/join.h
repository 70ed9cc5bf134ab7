// Lists in messages.
#pragma once

#include <sstream>
#include <string>

namespace hadal {

/// The items one after another with `separator` between them.
template <typename Items>
std::string join(const Items& items, const char* separator = ", ") {
  std::ostringstream out;
  const char* before = "";
  for (const auto& item : items) {
    out << before << item;
    before = separator;
  }
  return out.str();
}

}  // namespace hadal
