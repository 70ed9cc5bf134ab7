#include "base/metrics.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <filesystem>
#include <unistd.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"

namespace hadal {
namespace {

/// The complete lines of the file up to and with `last_step`.
std::string kept_lines(const std::string& text, int64_t last_step) {
  std::string kept;
  size_t begin = 0;
  for (size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const std::string line = text.substr(begin, end - begin);
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (json.is_discarded() || !json.is_object() || !json.contains("step")) continue;
    if (json["step"].is_number_integer() && json["step"].get<int64_t>() <= last_step) {
      kept += line;
      kept += '\n';
    }
  }
  return kept;
}

}  // namespace

MetricsWriter::MetricsWriter(const std::string& folder, int64_t resume_step)
    : path_(folder + "/metrics.jsonl") {
  std::filesystem::create_directories(folder);
  if (std::filesystem::exists(path_)) {
    write_file_atomic(path_, kept_lines(read_file(path_), resume_step));
  }
  fd_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  HADAL_INPUT_CHECK(fd_ >= 0, path_, ": ", std::strerror(errno));
}

MetricsWriter::~MetricsWriter() { close(fd_); }

void MetricsWriter::add(int64_t, const std::string& name, double value) {
  pending_.emplace_back(name, value);
}

void MetricsWriter::flush(int64_t step, int64_t tokens) {
  if (pending_.empty()) return;
  std::string line = fmt::format(R"({{"step": {}, "tokens": {}, "time": {})", step, tokens,
                                 static_cast<int64_t>(std::time(nullptr)));
  for (const auto& [name, value] : pending_) {
    line += fmt::format(", {}: ", json_quote(name));
    line += std::isfinite(value) ? fmt::format("{}", value) : "null";
  }
  line += "}\n";
  pending_.clear();
  // One write: a line is there or not, whatever happens next.
  const ssize_t written = write(fd_, line.data(), line.size());
  HADAL_INPUT_CHECK(written == static_cast<ssize_t>(line.size()), path_, ": ",
                    written < 0 ? std::strerror(errno) : "the disk is full");
}

}  // namespace hadal
