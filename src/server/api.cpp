#include "server/api.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <openssl/crypto.h>
#include <openssl/sha.h>

#include "base/log.h"
#include "server/anthropic_api.h"
#include "server/openai_api.h"
#include "server/openai_types.h"

namespace hadal::server {
namespace {

using Digest = std::array<uint8_t, SHA256_DIGEST_LENGTH>;

Digest digest(std::string_view text) {
  Digest out{};
  SHA256(reinterpret_cast<const uint8_t*>(text.data()), text.size(), out.data());
  return out;
}

bool is_anthropic(std::string_view path) { return path.starts_with("/v1/messages"); }

/// The routes by name, for metrics: what clients make up has no label of its own.
std::string_view label(std::string_view path) {
  constexpr std::array<std::string_view, 10> kKnown = {"/v1/chat/completions",
                                                       "/v1/completions",
                                                       "/v1/responses",
                                                       "/v1/messages",
                                                       "/v1/messages/count_tokens",
                                                       "/v1/models",
                                                       "/tokenize",
                                                       "/detokenize",
                                                       "/health",
                                                       "/metrics"};
  for (const std::string_view known : kKnown) {
    if (path == known) return known;
  }
  return path.starts_with("/v1/models/") ? "/v1/models" : "other";
}

HttpResponse json_response(const Json& json) {
  HttpResponse response;
  response.body = json.dump();
  return response;
}

/// What a request gets that says nothing, so that a page can show it.
Json defaults_json(const ServerOptions& options) {
  const engine::Sampling& sampling = options.default_sampling;
  const int64_t tokens = options.default_max_tokens;
  return Json::object({{"thinking", js(options.default_thinking)},
                       {"temperature", js(sampling.temperature)},
                       {"top_p", js(sampling.top_p)},
                       {"top_k", js(sampling.top_k)},
                       {"min_p", js(sampling.min_p)},
                       {"repetition_penalty", js(sampling.repetition_penalty)},
                       {"max_tokens", tokens > 0 ? js(tokens) : Json()}});
}

}  // namespace

/// API keys as digests, so that comparing takes the same time for every key, and the count of open
/// generations of each.
struct Api::Keys {
  struct Key {
    Digest digest{};
    std::atomic<int64_t> open{0};
  };
  explicit Keys(const ServerOptions& options)
      : keys(std::max<size_t>(1, options.api_keys.size())),
        needed(!options.api_keys.empty()),
        limit(options.max_concurrent_per_key) {
    for (size_t i = 0; i < options.api_keys.size(); ++i)
      keys[i].digest = digest(options.api_keys[i]);
  }
  /// The index of a request's key, -1 if it is none of ours.
  int find(const HttpRequest& request) const {
    if (!needed) return 0;
    std::string_view given = request.header("x-api-key");
    const std::string_view bearer = request.header("authorization");
    if (given.empty() && bearer.size() > 7 && (bearer[0] == 'B' || bearer[0] == 'b') &&
        bearer.substr(1, 6) == "earer ")
      given = bearer.substr(7);
    const Digest wanted = digest(given);
    int found = -1;
    for (size_t i = 0; i < keys.size(); ++i) {
      const bool same = CRYPTO_memcmp(keys[i].digest.data(), wanted.data(), wanted.size()) == 0;
      found = same ? static_cast<int>(i) : found;
    }
    return found;
  }
  /// Null when the key has too many open.
  static Lease lease(const std::shared_ptr<Keys>& self, int index) {
    Key& key = self->keys[static_cast<size_t>(index)];
    if (key.open.fetch_add(1) >= self->limit) {
      --key.open;
      return nullptr;
    }
    return {static_cast<void*>(&key), [self, &key](void*) { --key.open; }};
  }

  std::vector<Key> keys;
  const bool needed;
  const int64_t limit;
};

/// Where requests wait for their grammars. What has not begun when it ends never begins.
struct Api::Waiting {
  explicit Waiting(int num_threads) : threads(static_cast<size_t>(num_threads)) {}
  boost::asio::thread_pool threads;
};

Api::Api(engine::Engine& engine, const text::Tokenizer& tokenizer, const ServerOptions& options)
    : context_{engine, tokenizer, options, std::make_shared<CallMemory>()},
      keys_(std::make_shared<Keys>(options)),
      views_(std::make_shared<ViewStore>()),
      created_(std::chrono::duration_cast<std::chrono::seconds>(
                   std::chrono::system_clock::now().time_since_epoch())
                   .count()) {
  if (options.grammar_threads > 0) waiting_ = std::make_unique<Waiting>(options.grammar_threads);
}
Api::~Api() = default;

void Api::watch(std::function<HttpStats()> stats, std::function<bool()> draining) {
  stats_ = std::move(stats);
  draining_ = std::move(draining);
}

void Api::add_page(std::string path,
                   std::string content_type,
                   std::string body,
                   std::vector<std::pair<std::string, std::string>> headers) {
  HttpResponse page;
  page.content_type = std::move(content_type);
  page.body = std::move(body);
  page.headers = std::move(headers);
  pages_[std::move(path)] = std::move(page);
}

HttpResponse Api::refuse(const RequestError& error, std::string_view path) const {
  HttpResponse response = is_anthropic(path) ? anthropic_error(error) : openai_error(error);
  if (error.status() == 429 || error.status() == 503)
    response.headers.emplace_back("Retry-After", concat(context_.options.retry_after.count()));
  if (error.status() == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  if (error.status() == 405) response.headers.emplace_back("Allow", error.code());
  return response;
}

HttpResponse Api::error(int status, std::string_view message, std::string_view path) {
  metrics_.count_response(label(path), status);
  return refuse(RequestError(status, std::string(message)), path);
}

void Api::handle(HttpRequest request, std::shared_ptr<Responder> responder) {
  guarded(request.path, *responder, [&] { route(request, responder); });
}

void Api::guarded(std::string_view path, Responder& responder, const std::function<void()>& work) {
  try {
    work();
  } catch (const RequestError& error) {
    metrics_.count_response(label(path), error.status());
    responder.send(refuse(error, path));
  } catch (const std::exception& error) {
    log::error("server", path, ": ", error.what());
    metrics_.count_response(label(path), 500);
    responder.send(refuse(RequestError(500, "internal error"), path));
  }
}

void Api::check_method(const HttpRequest& request, std::string_view allowed) const {
  if (request.method == allowed || (allowed == "GET" && request.method == "HEAD")) return;
  throw RequestError(405, concat(request.path, " takes ", allowed, " only"), "",
                     std::string(allowed));
}

void Api::route(const HttpRequest& request, const std::shared_ptr<Responder>& responder) {
  const std::string& path = request.path;
  const auto answer = [&](HttpResponse response) {
    metrics_.count_response(label(path), response.status);
    responder->send(std::move(response));
  };
  if (path == "/health") {
    check_method(request, "GET");
    return answer(health());
  }
  if (const auto page = pages_.find(path); page != pages_.end()) {
    check_method(request, "GET");
    return answer(page->second);
  }
  const int key = keys_->find(request);
  if (key < 0) {
    metrics_.unauthorised.add();
    throw RequestError(401, "this server needs an API key: Authorization: Bearer KEY or x-api-key",
                       "", "invalid_api_key");
  }
  struct Post {
    std::string_view path;
    Reader read;
  };
  constexpr std::array<Post, 4> kPosts = {{{"/v1/chat/completions", chat_completion_job},
                                           {"/v1/completions", text_completion_job},
                                           {"/v1/responses", response_job},
                                           {"/v1/messages", message_job}}};
  for (const Post& post : kPosts) {
    if (path != post.path) continue;
    check_method(request, "POST");
    return generate(request, responder, post.read, key);
  }
  if (path == "/v1/messages/count_tokens") {
    check_method(request, "POST");
    const Json body = parse_body(request.body, context_.options);
    return answer(
        json_response(Json::object({{"input_tokens", js(count_message_tokens(context_, body))}})));
  }
  if (path == "/tokenize" || path == "/detokenize") {
    check_method(request, "POST");
    return answer(path == "/tokenize" ? tokenize(request) : detokenize(request));
  }
  if (path == "/v1/models" || path.starts_with("/v1/models/")) {
    check_method(request, "GET");
    return answer(models(path));
  }
  if (path == "/v1/hadal/context") {
    check_method(request, "GET");
    return answer(context_view(request));
  }
  if (path == "/metrics") {
    check_method(request, "GET");
    return answer(metrics_page());
  }
  throw RequestError(404, concat("nothing is at ", path.substr(0, 200)), "", "not_found");
}

void Api::generate(const HttpRequest& request,
                   const std::shared_ptr<Responder>& responder,
                   Reader read,
                   int key) {
  if (draining_ && draining_()) throw RequestError(503, "the server is stopping");
  Lease lease = Keys::lease(keys_, key);
  if (lease == nullptr) {
    metrics_.over_limit.add();
    throw RequestError(429, concat("more than ", keys_->limit, " requests of this key at a time"),
                       "", "concurrency_exceeded");
  }
  Job job = read(context_, parse_body(request.body, context_.options));
  for (engine::Request& part : job.requests) part.client = concat("key", key);
  if (job.chat) {
    job.requests.front().context_view = true;
    job.on_view = [views = views_, id = job.id](const engine::ContextView& view) {
      views->put(id, view);
    };
  }
  const bool has_grammar = std::ranges::any_of(job.requests, [](const engine::Request& part) {
    return part.grammar.kind != engine::Grammar::Kind::kNone;
  });
  const auto generation = std::make_shared<Generation>(
      context_.engine, context_.tokenizer, metrics_, responder, std::move(job), std::move(lease),
      context_.options.ping_interval);
  const auto start = [this, generation, path = request.path] {
    generation->start();
    metrics_.count_response(label(path), 200);
  };
  if (!has_grammar || waiting_ == nullptr) return start();
  const auto left = std::make_shared<std::atomic<bool>>(false);
  responder->on_close([left] { *left = true; });
  boost::asio::post(waiting_->threads, [this, start, left, responder, path = request.path] {
    if (*left) return metrics_.cancelled.add();
    guarded(path, *responder, start);
  });
}

HttpResponse Api::context_view(const HttpRequest& request) const {
  constexpr std::string_view kId = "id=";
  const std::string id =
      request.query.starts_with(kId) ? request.query.substr(kId.size()) : std::string();
  std::optional<std::string> view = views_->find(id);
  if (!view) throw RequestError(404, concat("no context view of '", id.substr(0, 100), "'"), "id");
  HttpResponse response;
  response.body = std::move(*view);
  return response;
}

HttpResponse Api::models(std::string_view path) const {
  const engine::EngineInfo& info = context_.engine.info();
  const Json model = Json::object({{"id", js(info.model_name)},
                                   {"object", js("model")},
                                   {"created", js(created_)},
                                   {"owned_by", js("hadal")},
                                   {"max_model_len", js(context_.max_context())},
                                   {"defaults", defaults_json(context_.options)}});
  if (path == "/v1/models")
    return json_response(Json::object({{"object", js("list")}, {"data", Json::array({model})}}));
  const std::string_view name = path.substr(std::string_view("/v1/models/").size());
  if (name != info.model_name)
    throw RequestError(404, concat("there is no model '", name.substr(0, 100), "'"), "model",
                       "model_not_found");
  return json_response(model);
}

HttpResponse Api::tokenize(const HttpRequest& request) const {
  const Json json = parse_body(request.body, context_.options);
  const Fields body(json, "");
  const std::vector<int64_t> tokens =
      body.has("messages") ? chat_prompt_tokens(context_, read_chat_completion(context_, body))
                           : plain_prompt_tokens(context_, body, body.string("prompt"));
  Json list = Json::array();
  for (const int64_t token : tokens) list.items().push_back(js(token));
  return json_response(Json::object({{"count", js(std::ssize(tokens))},
                                     {"max_model_len", js(context_.max_context())},
                                     {"tokens", std::move(list)}}));
}

HttpResponse Api::detokenize(const HttpRequest& request) const {
  const Json json = parse_body(request.body, context_.options);
  const Fields body(json, "");
  const Json* tokens = body.array_or_null("tokens");
  if (tokens == nullptr) body.fail("tokens", "expected a list of token ids, found nothing");
  std::vector<int32_t> ids;
  for (const Json& item : tokens->items()) {
    const auto id = integer_of(item);
    if (!id || *id < 0 || *id >= context_.tokenizer.vocab_size())
      body.fail("tokens", "expected token ids of the vocabulary");
    ids.push_back(static_cast<int32_t>(*id));
  }
  return json_response(Json::object({{"prompt", js(context_.tokenizer.decode(ids))}}));
}

HttpResponse Api::health() const {
  const bool draining = draining_ && draining_();
  HttpResponse response =
      json_response(Json::object({{"status", js(draining ? "stopping" : "ok")}}));
  if (draining) response.status = 503;
  return response;
}

HttpResponse Api::metrics_page() const {
  HttpResponse response;
  response.content_type = "text/plain; version=0.0.4; charset=utf-8";
  response.body = metrics_.text(context_.engine.stats(), stats_ ? stats_() : HttpStats{});
  return response;
}

}  // namespace hadal::server
