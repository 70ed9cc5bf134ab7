#include "server/sse_parser.h"

#include "base/check.h"

namespace hadal::server {

void SseParser::feed(std::string_view bytes, const Sink& sink) {
  while (!bytes.empty()) {
    if (after_cr_) {
      // CRLF ends one line, also when the pair is split between two pieces.
      after_cr_ = false;
      if (bytes.front() == '\n') bytes.remove_prefix(1);
      continue;
    }
    const size_t end = bytes.find_first_of("\r\n");
    const std::string_view part = bytes.substr(0, end);
    HADAL_INPUT_CHECK(line_.size() + part.size() <= max_bytes_, "event stream: a line of over ",
                      max_bytes_, " bytes");
    line_.append(part);
    if (end == std::string_view::npos) return;
    after_cr_ = bytes[end] == '\r';
    bytes.remove_prefix(end + 1);
    end_line(sink);
  }
}

void SseParser::end_line(const Sink& sink) {
  std::string_view line = line_;
  if (first_line_ && line.starts_with("\xef\xbb\xbf")) line.remove_prefix(3);
  first_line_ = false;
  if (line.empty()) {
    if (has_data_) sink(event_);
    event_ = {};
    has_data_ = false;
  } else if (line.front() != ':') {
    const size_t colon = line.find(':');
    std::string_view value =
        colon == std::string_view::npos ? std::string_view() : line.substr(colon + 1);
    if (value.starts_with(' ')) value.remove_prefix(1);
    field(line.substr(0, colon), value);
  }
  line_.clear();
}

void SseParser::field(std::string_view name, std::string_view value) {
  if (name == "event") {
    event_.type = value;
  } else if (name == "data") {
    HADAL_INPUT_CHECK(event_.data.size() + value.size() < max_bytes_,
                      "event stream: an event of over ", max_bytes_, " bytes");
    if (has_data_) event_.data += '\n';
    event_.data += value;
    has_data_ = true;
  }
}

}  // namespace hadal::server
