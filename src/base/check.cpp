#include "base/check.h"

#include <cstring>

namespace hadal {
namespace {

std::string with_location(const std::string& message, std::source_location where) {
  const char* file = where.file_name();
  if (const char* src = std::strstr(file, "src/")) file = src;
  return concat(message, " (", file, ":", where.line(), ")");
}

}  // namespace

Error::Error(const std::string& message, std::source_location where)
    : std::runtime_error(with_location(message, where)) {}

}  // namespace hadal
