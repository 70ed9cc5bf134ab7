// The server's routes: who may ask, what they ask for, and every refusal in the right API's words.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine_core/engine.h"
#include "server/access.h"
#include "server/chat_job.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/view_store.h"

namespace hadal::server {

class Api final : public HttpHandler {
 public:
  /// All arguments outlive it. Errors: InputError for options that make no sense.
  Api(engine_core::Engine& engine, const text::Tokenizer& tokenizer, const ServerOptions& options);
  ~Api() override;

  /// Where /metrics and /health learn about connections.
  void watch(std::function<HttpStats()> stats, std::function<bool()> draining);
  /// Serves a constant under GET `path`, without a key.
  void add_page(std::string path,
                std::string content_type,
                std::string body,
                std::vector<std::pair<std::string, std::string>> headers = {});

  void handle(HttpRequest request, std::shared_ptr<Responder> responder) override;
  HttpResponse error(int status, std::string_view message, std::string_view path) override;

 private:
  struct Keys;
  using Reader = Job (*)(const Context&, const Json&);

  /// Runs `work`; what it throws becomes the answer.
  void guarded(const HttpRequest& request, Responder& responder, const std::function<void()>& work);
  void route(const HttpRequest& request, const std::shared_ptr<Responder>& responder);
  void generate(const HttpRequest& request,
                const std::shared_ptr<Responder>& responder,
                Reader read,
                int key);
  void check_method(const HttpRequest& request, std::string_view allowed) const;
  /// `id` names the request in headers and body; empty: a new one.
  HttpResponse refuse(const RequestError& error, std::string_view path, std::string id) const;
  HttpResponse models(const HttpRequest& request) const;
  HttpResponse count_tokens(const HttpRequest& request) const;
  HttpResponse tokenize(const HttpRequest& request) const;
  HttpResponse detokenize(const HttpRequest& request) const;
  HttpResponse stored_response(const HttpRequest& request, std::string id) const;
  HttpResponse context_view(const HttpRequest& request) const;
  HttpResponse health(const HttpRequest& request) const;
  HttpResponse version(const HttpRequest& request) const;
  HttpResponse tokenizer_info(const HttpRequest& request) const;
  HttpResponse metrics_page(const HttpRequest& request) const;

  const Context context_;
  const Access access_;
  std::shared_ptr<Keys> keys_;
  ApiMetrics metrics_;
  std::shared_ptr<ViewStore> views_;
  std::function<HttpStats()> stats_;
  std::function<bool()> draining_;
  std::map<std::string, HttpResponse, std::less<>> pages_;
  const int64_t created_;
  struct Waiting;
  std::unique_ptr<Waiting> waiting_;  ///< last: its threads use the rest
};

}  // namespace hadal::server
