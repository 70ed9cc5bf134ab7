#include "load/check.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <string_view>

#include <fmt/format.h>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"

namespace hadal::load {
namespace {

constexpr int64_t kMaxComplaints = 5;
constexpr char kSeparator = '\x1f';

std::string hex(uint64_t hash) { return fmt::format("{:016x}", hash); }

/// The parts in the order they are streamed. A partial one ends with the last part that began, so
/// that it is a prefix of the whole.
std::string joined(const AnswerText& answer, bool whole) {
  std::string text = answer.reasoning + kSeparator + answer.text + kSeparator + answer.tool_calls +
                     kSeparator + answer.finish_reason;
  if (whole) return text;
  while (text.ends_with(kSeparator)) text.pop_back();
  return text;
}

std::string excerpt(const std::string& text, size_t at) {
  return json_quote(std::string_view(text).substr(std::min(at, text.size()), 40));
}

}  // namespace

AnswerCheck::AnswerCheck(const std::string& expect) : only_known_(!expect.empty()) {
  if (expect.empty()) return;
  const std::string file = read_file(expect);
  std::string_view rest = file;
  for (int64_t number = 1; !rest.empty(); ++number) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.empty()) continue;
    const JsonObject object = JsonObject::parse(line, concat(expect, " line ", number));
    const std::string name = object.string("request");
    char* stop = nullptr;
    const uint64_t hash = std::strtoull(name.c_str(), &stop, 16);
    HADAL_INPUT_CHECK(name.size() == 16 && *stop == '\0', object.where("request"),
                      ": expected 16 hexadecimal digits, found ", name);
    answers_[hash] = {.reasoning = object.string_or("reasoning", ""),
                      .text = object.string("text"),
                      .tool_calls = object.string_or("tool_calls", ""),
                      .finish_reason = object.string_or("finish_reason", "")};
  }
}

void AnswerCheck::add(const Outcome& outcome) {
  const bool whole = outcome.end == Outcome::End::kDone;
  if (!whole && outcome.pieces == 0) return;
  const auto known = answers_.find(outcome.hash);
  if (known == answers_.end()) {
    if (only_known_)
      ++unknown_;
    else if (whole)
      answers_.emplace(outcome.hash, outcome.answer);
    return;
  }
  ++compared_;
  const std::string expected = joined(known->second, true), got = joined(outcome.answer, whole);
  if (whole ? got == expected : expected.starts_with(got)) return;
  ++wrong_;
  if (wrong_ <= kMaxComplaints) complain(outcome, got, expected);
}

void AnswerCheck::complain(const Outcome& outcome,
                           const std::string& got,
                           const std::string& expected) const {
  const auto differ = std::mismatch(got.begin(), got.end(), expected.begin(), expected.end());
  const auto at = static_cast<size_t>(differ.first - got.begin());
  std::fputs(
      fmt::format("bench serve: wrong answer to request {} ({}), byte {}: expected {}, "
                  "found {}\n",
                  outcome.index, hex(outcome.hash), at, excerpt(expected, at), excerpt(got, at))
          .c_str(),
      stderr);
}

void AnswerCheck::write(const std::string& path) const {
  const std::map<uint64_t, AnswerText> sorted(answers_.begin(), answers_.end());
  std::string text;
  for (const auto& [hash, answer] : sorted) {
    text += fmt::format("{{\"request\": \"{}\"", hex(hash));
    const auto add_field = [&](const char* name, const std::string& value) {
      text += fmt::format(", \"{}\": {}", name, json_quote(value));
    };
    if (!answer.reasoning.empty()) add_field("reasoning", answer.reasoning);
    add_field("text", answer.text);
    if (!answer.tool_calls.empty()) add_field("tool_calls", answer.tool_calls);
    add_field("finish_reason", answer.finish_reason);
    text += "}\n";
  }
  write_file_atomic(path, text);
}

}  // namespace hadal::load
