// Answers of a load test written to a file, and compared with those of an earlier one.
//
// The file has a JSON object a line: the request's hash and everything its stream said. A request
// that comes again must be answered the same; what a cancelled or failed request got before its end
// must be the beginning of the recorded answer.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>

#include "load/answer.h"

namespace hadal::load {

class AnswerCheck {
 public:
  /// `expect`: a file of an earlier test; empty: only answers of this one are compared.
  explicit AnswerCheck(const std::string& expect);

  /// Complains on standard error about the first few that are wrong.
  void add(const Outcome& outcome);
  /// Writes all whole answers, the recorded ones included, atomically.
  void write(const std::string& path) const;

  int64_t compared() const { return compared_; }
  int64_t wrong() const { return wrong_; }
  /// Answered requests that the file knows nothing about: another test's.
  int64_t unknown() const { return unknown_; }

 private:
  void complain(const Outcome& outcome, const std::string& got, const std::string& expected) const;

  bool only_known_;
  std::unordered_map<uint64_t, AnswerText> answers_;
  int64_t compared_ = 0, wrong_ = 0, unknown_ = 0;
};

}  // namespace hadal::load
