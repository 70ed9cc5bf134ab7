// Levelled log on standard error: one line a record, UTC time, level, unit, text.
//
//   log::info("checkpoint", "loaded ", count, " tensors in ", ms, " ms");
//
// For people. Numbers meant for machines go to the metrics files, results to standard output.
#pragma once

#include <string>
#include <string_view>

#include "base/check.h"

namespace hadal::log {

enum class Level { kDebug, kInfo, kWarn, kError };

/// Records below this level are dropped (default kInfo).
void set_level(Level level);
void write(Level level, std::string_view unit, const std::string& text);

template <typename... Parts>
void debug(std::string_view unit, const Parts&... parts) {
  write(Level::kDebug, unit, concat(parts...));
}
template <typename... Parts>
void info(std::string_view unit, const Parts&... parts) {
  write(Level::kInfo, unit, concat(parts...));
}
template <typename... Parts>
void warn(std::string_view unit, const Parts&... parts) {
  write(Level::kWarn, unit, concat(parts...));
}
template <typename... Parts>
void error(std::string_view unit, const Parts&... parts) {
  write(Level::kError, unit, concat(parts...));
}

}  // namespace hadal::log
