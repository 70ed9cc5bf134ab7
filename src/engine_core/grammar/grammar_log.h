// What xgrammar says while it reads a grammar: internal to grammar.cpp.
//
// Its warnings name what it would leave out of a grammar (an unsupported keyword, an assertion of a
// regular expression). An answer that is promised to match must not rest on less than was asked, so
// the compiler collects them and refuses. Outside a collector they are debug records.
#pragma once

#include <exception>
#include <string>

namespace hadal::engine_core {

/// Collects the warnings of this thread while it lives.
class GrammarWarnings {
 public:
  GrammarWarnings();
  ~GrammarWarnings();
  GrammarWarnings(const GrammarWarnings&) = delete;
  GrammarWarnings& operator=(const GrammarWarnings&) = delete;

  const std::string& first() const { return first_; }
  void add(const std::string& message);

 private:
  GrammarWarnings* outer_;
  std::string first_;
};

/// The message without the place in xgrammar's source where it arose.
std::string grammar_message(const std::exception& error);

}  // namespace hadal::engine_core
