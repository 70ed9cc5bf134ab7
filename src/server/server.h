// `hadal serve` in one object: the APIs over HTTP in front of an engine.
#pragma once

#include "server/api.h"
#include "server/http.h"

namespace hadal::server {

class Server {
 public:
  /// Listens. The engine and the tokenizer outlive it; sinks that the engine calls later than that
  /// do nothing.
  Server(engine_core::Engine& engine, const text::Tokenizer& tokenizer, ServerOptions options);
  ~Server();
  void start() { http_->start(); }  ///< serves from here on; once
  /// Pages to serve beside the APIs are named before start().
  Api& api() { return *api_; }
  uint16_t port() const { return http_->port(); }
  HttpStats stats() const { return http_->stats(); }
  /// Lets open answers end (drain_timeout at the most) and closes.
  void stop() { http_->stop(); }

 private:
  const ServerOptions options_;
  std::unique_ptr<Api> api_;
  std::unique_ptr<HttpServer> http_;
};

}  // namespace hadal::server
