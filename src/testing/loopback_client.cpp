#include "testing/loopback_client.h"

#include <arpa/inet.h>
#include <cerrno>
#include <cstdlib>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>
#include <utility>

#include "base/check.h"

namespace hadal::testing {

std::vector<std::string> Reply::events() const {
  std::vector<std::string> events;
  size_t from = 0;
  while (from < body.size()) {
    const size_t end = body.find('\n', from);
    const std::string line = body.substr(from, end - from);
    if (line.starts_with("data: ")) events.push_back(line.substr(6));
    if (end == std::string::npos) break;
    from = end + 1;
  }
  return events;
}

LoopbackClient::LoopbackClient(uint16_t port, int receive_bytes) {
  fd_ = ::socket(AF_INET, SOCK_STREAM, 0);
  HADAL_CHECK(fd_ >= 0, "socket");
  if (receive_bytes > 0)
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_bytes, sizeof(receive_bytes));
  const timeval limit{10, 0};
  ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  HADAL_CHECK(::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0,
              "connect to port ", port);
}
LoopbackClient::~LoopbackClient() { close(); }
LoopbackClient::LoopbackClient(LoopbackClient&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), buffer_(std::move(other.buffer_)) {}

void LoopbackClient::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

bool LoopbackClient::send(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

bool LoopbackClient::fill() {
  char bytes[16384];
  errno = 0;
  const ssize_t count = ::recv(fd_, bytes, sizeof(bytes), 0);
  if (count <= 0) return false;
  buffer_.append(bytes, static_cast<size_t>(count));
  return true;
}

bool LoopbackClient::at_end() {
  while (fill()) {
  }
  return errno != EAGAIN && errno != EWOULDBLOCK;
}

std::string LoopbackClient::receive_until(std::string_view text) {
  while (buffer_.find(text) == std::string::npos && fill()) {
  }
  return std::exchange(buffer_, {});
}

Reply LoopbackClient::receive() {
  Reply reply;
  size_t end = 0;
  while ((end = buffer_.find("\r\n\r\n")) == std::string::npos) {
    if (!fill()) return reply;
  }
  std::string head = buffer_.substr(0, end + 2);
  buffer_.erase(0, end + 4);
  const int status = std::atoi(head.c_str() + head.find(' '));
  if (status == 100) return receive();
  size_t line = head.find("\r\n") + 2;
  while (line < head.size()) {
    const size_t stop = head.find("\r\n", line), colon = head.find(':', line);
    std::string name = head.substr(line, colon - line);
    for (char& c : name) c = static_cast<char>(std::tolower(c));
    reply.headers[name] = head.substr(colon + 2, stop - colon - 2);
    line = stop + 2;
  }
  if (reply.headers.count("transfer-encoding") != 0) {
    while (true) {
      size_t size_end = 0;
      while ((size_end = buffer_.find("\r\n")) == std::string::npos) {
        if (!fill()) return reply;
      }
      const size_t size = std::strtoul(buffer_.c_str(), nullptr, 16);
      while (buffer_.size() < size_end + 2 + size + 2) {
        if (!fill()) return reply;
      }
      reply.body += buffer_.substr(size_end + 2, size);
      buffer_.erase(0, size_end + 2 + size + 2);
      if (size == 0) break;
    }
  } else if (reply.headers.count("content-length") != 0) {
    const size_t size = std::strtoul(reply.headers["content-length"].c_str(), nullptr, 10);
    while (buffer_.size() < size) {
      if (!fill()) return reply;
    }
    reply.body = buffer_.substr(0, size);
    buffer_.erase(0, size);
  } else {
    while (fill()) {
    }
    reply.body = std::exchange(buffer_, {});
  }
  reply.status = status;
  return reply;
}

std::string post_bytes(std::string_view path, std::string_view json, std::string_view headers) {
  return concat("POST ", path, " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n",
                headers, "Content-Length: ", json.size(), "\r\n\r\n", json);
}

Reply LoopbackClient::post(std::string_view path, std::string_view json, std::string_view headers) {
  send(post_bytes(path, json, headers));
  return receive();
}
Reply LoopbackClient::get(std::string_view path, std::string_view headers) {
  send(concat("GET ", path, " HTTP/1.1\r\nHost: localhost\r\n", headers, "\r\n"));
  return receive();
}

}  // namespace hadal::testing
