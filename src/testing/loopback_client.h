// A plain HTTP client on a loopback socket, for tests: it sends what it is told, well-formed or
// not.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace hadal::testing {

struct Reply {
  int status = 0;                              ///< 0: the connection ended first
  std::map<std::string, std::string> headers;  ///< names in lower case
  std::string body;                            ///< chunks joined
  /// The data of SSE events, "[DONE]" included.
  std::vector<std::string> events() const;
};

class LoopbackClient {
 public:
  explicit LoopbackClient(uint16_t port, int receive_bytes = 0);
  ~LoopbackClient();
  LoopbackClient(LoopbackClient&& other) noexcept;
  LoopbackClient(const LoopbackClient&) = delete;

  bool send(std::string_view bytes);
  /// One whole answer; reading gives up after ten seconds.
  Reply receive();
  /// Bytes until `text` was seen or the connection ended.
  std::string receive_until(std::string_view text);
  bool at_end();  ///< whether the server has closed
  void close();
  int fd() const { return fd_; }

  Reply post(std::string_view path, std::string_view json, std::string_view headers = "");
  Reply get(std::string_view path, std::string_view headers = "");

 private:
  bool fill();
  int fd_ = -1;
  std::string buffer_;
};

std::string post_bytes(std::string_view path, std::string_view json, std::string_view headers = "");

}  // namespace hadal::testing
