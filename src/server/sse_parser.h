// Server-sent events as a client reads them: bytes in pieces of any size, whole events out.
//
// Follows the HTML standard's "event stream interpretation": lines end with LF, CR or CRLF, a byte
// order mark at the start and comments are skipped, several data lines are joined by LF, and an
// event without data or without its blank line is none. Not thread-safe.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

namespace hadal::server {

struct SseEvent {
  std::string type;  ///< empty: "message"
  std::string data;
};

class SseParser {
 public:
  using Sink = std::function<void(const SseEvent&)>;

  /// `max_bytes`: of one line and of one event's data.
  explicit SseParser(size_t max_bytes = size_t{16} << 20) : max_bytes_(max_bytes) {}

  /// Calls `sink` for every event that these bytes complete, in order. An InputError when an event
  /// is larger than allowed; the parser is of no use afterwards.
  void feed(std::string_view bytes, const Sink& sink);

  /// An event has begun that no blank line has ended.
  bool in_event() const { return !line_.empty() || has_data_; }

 private:
  void end_line(const Sink& sink);
  void field(std::string_view name, std::string_view value);

  size_t max_bytes_;
  std::string line_;
  SseEvent event_;
  bool has_data_ = false, first_line_ = true, after_cr_ = false;
};

}  // namespace hadal::server
