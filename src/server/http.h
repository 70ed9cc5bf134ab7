// HTTP/1.1 and TLS: sockets on one side, a handler on the other.
//
// I/O threads own the sockets and only move bytes; requests are handled on handler threads; a
// request's answer is made on its connection's strand (Responder::post), so that what belongs to
// one answer needs no locks. An exception in one answer becomes its error, never another's. A
// client that leaves, reads too slowly or stalls is dropped and its answer told (on_close).
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/options.h"

namespace hadal::server {

struct HttpRequest {
  std::string method, path, query;  ///< path and query as sent, without '?'
  /// Names in lower case. Where the target was a whole URI, its authority is the "host".
  std::vector<std::pair<std::string, std::string>> headers;
  std::string body;
  std::string id;  ///< set by the handler: what its answer calls the request
  /// The value of a header (lower-case name), or empty.
  std::string_view header(std::string_view name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};

/// Where the answer to one request goes; thread-safe. Either send(), or begin_stream(), write() any
/// number of times and end_stream(). Nothing happens once the client has left.
class Responder {
 public:
  virtual ~Responder() = default;
  /// Runs `work` in order with all else of this answer; dropped once the client has left.
  virtual void post(std::function<void()> work) = 0;
  virtual void send(HttpResponse response) = 0;
  virtual void begin_stream(HttpResponse head) = 0;  ///< its body is ignored
  virtual void write(std::string bytes) = 0;
  virtual void end_stream() = 0;
  /// In a stream: `work` runs whenever nothing was written for `interval`, until the answer ends.
  virtual void when_silent(std::chrono::milliseconds interval, std::function<void()> work) = 0;
  /// `gone` runs once if the client leaves before the answer's end, at once if it has left.
  virtual void on_close(std::function<void()> gone) = 0;
  /// `stopping` runs once, in order with all else of this answer, if the server stops and cannot
  /// wait for the answer any longer: its last chance to end with a word instead of in silence.
  virtual void on_stop(std::function<void()> /*stopping*/) {}
};

class HttpHandler {
 public:
  virtual ~HttpHandler() = default;
  /// On a handler thread. May throw: the client gets 500.
  virtual void handle(HttpRequest request, std::shared_ptr<Responder> responder) = 0;
  /// The answer to what is no request, too large or failed. `path` may be empty. Must not throw.
  virtual HttpResponse error(int status, std::string_view message, std::string_view path) = 0;
};

struct HttpStats {
  int64_t connections = 0, active = 0;  ///< now; active: with an answer under way
  int64_t accepted = 0, refused = 0, slow_dropped = 0, left = 0;  ///< ever
  int64_t requests = 0;                                           ///< ever
};

class HttpServer {
 public:
  /// Listens, so that clients wait from here on; `handler` must outlive it. Errors: InputError when
  /// the address is taken or wrong, or the TLS files are no good.
  HttpServer(const ServerOptions& options, HttpHandler& handler);
  ~HttpServer();  ///< stop()
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  void start();  ///< serves from here on; once
  uint16_t port() const;
  HttpStats stats() const;
  /// Accepts nobody any more, lets open answers end (at most drain_timeout), tells those that do
  /// not (Responder::on_stop), then closes what is left. May be called again and from any thread
  /// but the server's own.
  void stop();
  bool draining() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// One whole request out of bytes, with the server's limits: 0 and the request, or the status that
/// refuses it (400 also where bytes are missing). For tests and fuzzing: the same parser and
/// checks.
int parse_http_request(std::string_view bytes, const ServerOptions& options, HttpRequest& request);

/// Connections without sockets, for tests and fuzzing: the server's own code on one thread.
/// Timeouts never expire, and handlers run on the caller's thread.
class HttpSession {
 public:
  HttpSession(const ServerOptions& options, HttpHandler& handler);  ///< both outlive it
  ~HttpSession();
  /// One connection's life: its client sends the pieces one after the other, each when all was done
  /// that could be done without it, and ends its side. Returns what the client was sent.
  std::string run(std::span<const std::string_view> pieces);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hadal::server
