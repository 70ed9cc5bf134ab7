#include "server/server.h"

#include <utility>

#include "base/check.h"

namespace hadal::server {

Server::Server(engine_core::Engine& engine, const text::Tokenizer& tokenizer, ServerOptions options)
    : options_(std::move(options)) {
  for (const std::string& key : options_.api_keys)
    HADAL_INPUT_CHECK(!key.empty(), "an API key is empty");
  HADAL_INPUT_CHECK(options_.tls_certificate.empty() == options_.tls_key.empty(),
                    "TLS needs a certificate and a key");
  api_ = std::make_unique<Api>(engine, tokenizer, options_);
  http_ = std::make_unique<HttpServer>(options_, *api_);
  api_->watch([this] { return http_->stats(); }, [this] { return http_->draining(); });
}
Server::~Server() { http_->stop(); }

}  // namespace hadal::server
