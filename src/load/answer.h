// One request of a load test as it went: what its stream said, when, and how it ended.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace hadal::load {

struct AnswerText {
  std::string reasoning, text, tool_calls, finish_reason;
  bool operator==(const AnswerText&) const = default;
};

struct Outcome {
  enum class End {
    kDone,
    kCancelled,  ///< by the client, as planned
    kFailed,
  };

  int64_t index = 0;
  uint64_t hash = 0;
  bool slow = false;
  End end = End::kFailed;
  std::string error;   ///< of a failed one: its kind, by which errors are counted
  std::string detail;  ///< the rest of the message
  // Seconds since the start of the test.
  double planned = 0, sent = 0, ended = 0;
  double first = -1;  ///< the first piece of the answer; -1: none came
  double last = -1;
  std::vector<double> gaps;  ///< seconds between pieces of the answer
  int64_t pieces = 0;
  int64_t answer_tokens = -1, prompt_tokens = -1, cached_tokens = -1;  ///< as reported; -1: not
  AnswerText answer;

  /// As reported by the server, else the pieces that came: servers send a piece a token unless they
  /// speculate.
  int64_t tokens() const { return answer_tokens >= 0 ? answer_tokens : pieces; }
};

/// Reads the events of an OpenAI stream (chat or plain completions) into an outcome.
class AnswerReader {
 public:
  explicit AnswerReader(Outcome& outcome) : outcome_(outcome) {}

  /// The data of an event that came `now`. False: it ended the answer in an error that the outcome
  /// names.
  bool event(std::string_view data, double now);
  /// The stream said [DONE] or why it finished.
  bool complete() const { return done_ || !outcome_.answer.finish_reason.empty(); }

 private:
  bool done_ = false;
  Outcome& outcome_;
};

/// The type and message of an API's error object ({"error": {"type", "message"}}); empty where the
/// text is none.
struct ApiError {
  std::string type, message;
};
ApiError parse_api_error(std::string_view body);

}  // namespace hadal::load
