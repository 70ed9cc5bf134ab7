#include "engine_core/grammar/grammar_log.h"

#include <support/logging.h>

#include "base/log.h"

namespace hadal::engine_core {
namespace {
thread_local GrammarWarnings* collector = nullptr;
}  // namespace

GrammarWarnings::GrammarWarnings() : outer_(collector) { collector = this; }
GrammarWarnings::~GrammarWarnings() { collector = outer_; }
void GrammarWarnings::add(const std::string& message) {
  if (first_.empty()) first_ = message;
}

std::string grammar_message(const std::exception& error) {
  const auto* fatal = dynamic_cast<const xgrammar::LogFatalError*>(&error);
  std::string text = fatal == nullptr ? error.what() : fatal->std::runtime_error::what();
  // "Check failed: (condition) is false: message"
  constexpr std::string_view kFalse = " is false: ";
  if (text.starts_with("Check failed: ") || text.starts_with("Internal check failed: ")) {
    const size_t pos = text.find(kFalse);
    if (pos != std::string::npos && pos + kFalse.size() < text.size()) {
      text.erase(0, pos + kFalse.size());
    }
  }
  return text;
}

}  // namespace hadal::engine_core

// Declared by xgrammar's logging.h for whoever sets XGRAMMAR_LOG_CUSTOMIZE.
namespace xgrammar {

[[noreturn]] void LogFatalImpl(const std::string& file, int lineno, const std::string& message) {
  throw LogFatalError(file, lineno, message);
}

void LogMessageImpl(const std::string&, int, int level, const std::string& message) {
  if (hadal::engine_core::collector != nullptr && level == XGRAMMAR_LOG_LEVEL_WARNING) {
    hadal::engine_core::collector->add(message);
  } else {
    hadal::log::debug("grammar", message);
  }
}

}  // namespace xgrammar
