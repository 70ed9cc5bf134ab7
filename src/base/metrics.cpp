#include "base/metrics.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <unistd.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/event_file.h"
#include "base/file.h"
#include "base/json.h"

namespace hadal {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

/// What a metrics.jsonl holds up to a step: the complete lines, and the same as event records.
struct Kept {
  std::string lines, events;
};

/// The scalars of a line; null is what JSON has for numbers that are not finite.
Scalars scalars_of(const nlohmann::ordered_json& line) {
  Scalars scalars;
  for (const auto& [name, value] : line.items()) {
    if (name == "step" || name == "time") continue;
    if (value.is_number()) scalars.emplace_back(name, value.get<double>());
    if (value.is_null()) scalars.emplace_back(name, std::nan(""));
  }
  return scalars;
}

Kept kept_of(const std::string& text, int64_t last_step) {
  Kept kept;
  size_t begin = 0;
  for (size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const std::string line = text.substr(begin, end - begin);
    const auto json = nlohmann::ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (json.is_discarded() || !json.is_object() || !json.contains("step")) continue;
    if (!json["step"].is_number_integer() || json["step"].get<int64_t>() > last_step) continue;
    kept.lines += line;
    kept.lines += '\n';
    const auto time = json.find("time");
    kept.events += scalar_event(time != json.end() && time->is_number() ? time->get<double>() : 0.0,
                                json["step"].get<int64_t>(), scalars_of(json));
  }
  return kept;
}

int open_for_appending(const std::string& path) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  HADAL_INPUT_CHECK(fd >= 0, path, ": ", std::strerror(errno));
  return fd;
}

/// A name later than those of the files that are there.
std::string next_event_file(const std::vector<std::string>& present, double time) {
  auto seconds = static_cast<int64_t>(time);
  while (!present.empty() && event_file_name(seconds) <= present.back()) ++seconds;
  return event_file_name(seconds);
}

}  // namespace

MetricsWriter::MetricsWriter(const std::string& folder, int64_t resume_step)
    : lines_{.path = folder + "/metrics.jsonl"} {
  std::filesystem::create_directories(folder);
  Kept kept;
  if (std::filesystem::exists(lines_.path)) {
    kept = kept_of(read_file(lines_.path), resume_step);
    write_file_atomic(lines_.path, kept.lines);
  }
  const std::vector<std::string> earlier = event_files(folder);
  for (const std::string& name : earlier) {
    // Cut, not replaced: a running TensorBoard goes on to the next file only from one that is
    // there.
    const std::string path = concat(folder, "/", name);
    std::filesystem::resize_file(path, kept_event_bytes(read_file(path), resume_step));
  }
  const double time = now();
  events_.path = folder + "/" + next_event_file(earlier, time);
  write_file_atomic(events_.path, event_file_head(time, resume_step + 1) +
                                      (earlier.empty() ? kept.events : std::string()));
  lines_.fd = open_for_appending(lines_.path);
  events_.fd = open_for_appending(events_.path);
}

MetricsWriter::~MetricsWriter() {
  if (lines_.fd >= 0) close(lines_.fd);
  if (events_.fd >= 0) close(events_.fd);
}

void MetricsWriter::add(int64_t, const std::string& name, double value) {
  pending_.emplace_back(name, value);
}

void MetricsWriter::flush(int64_t step, int64_t tokens) {
  if (pending_.empty()) return;
  const double time = now();
  std::string line = fmt::format(R"({{"step": {}, "tokens": {}, "time": {})", step, tokens,
                                 static_cast<int64_t>(time));
  for (const auto& [name, value] : pending_) {
    line += fmt::format(", {}: ", json_quote(name));
    line += std::isfinite(value) ? fmt::format("{}", value) : "null";
  }
  line += "}\n";
  Scalars scalars = {{"tokens", static_cast<double>(tokens)}};
  scalars.insert(scalars.end(), pending_.begin(), pending_.end());
  pending_.clear();
  append(lines_, line);
  append(events_, scalar_event(time, step, scalars));
}

// One write: a record is there or not, whatever happens next.
void MetricsWriter::append(const File& file, const std::string& bytes) {
  const ssize_t written = write(file.fd, bytes.data(), bytes.size());
  HADAL_INPUT_CHECK(written == static_cast<ssize_t>(bytes.size()), file.path, ": ",
                    written < 0 ? std::strerror(errno) : "the disk is full");
}

}  // namespace hadal
