#include "server/api.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <ctime>
#include <openssl/crypto.h>
#include <openssl/sha.h>

#include "base/log.h"
#include "server/answer_headers.h"
#include "server/anthropic_api.h"
#include "server/content_coding.h"
#include "server/http_text.h"
#include "server/openai_api.h"
#include "server/openai_types.h"
#include "server/response_store.h"
#include "text/chat_tokens.h"
#include "text/utf8.h"

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
  constexpr std::array<std::string_view, 13> kKnown = {"/v1/chat/completions",
                                                       "/v1/completions",
                                                       "/v1/responses",
                                                       "/v1/messages",
                                                       "/v1/messages/count_tokens",
                                                       "/v1/models",
                                                       "/tokenize",
                                                       "/detokenize",
                                                       "/health",
                                                       "/ping",
                                                       "/version",
                                                       "/tokenizer_info",
                                                       "/metrics"};
  for (const std::string_view known : kKnown) {
    if (path == known) return known;
  }
  if (path.starts_with("/v1/responses/")) return "/v1/responses";
  return path.starts_with("/v1/models/") ? "/v1/models" : "other";
}

/// What other servers have and a model that writes text has not: said at once, since clients that
/// get a bare 404 look for a wrong address.
constexpr std::array<std::pair<std::string_view, std::string_view>, 8> kAbsent = {
    {{"/v1/embeddings", "makes no embeddings"},
     {"/v1/moderations", "moderates nothing"},
     {"/v1/images", "makes no images"},
     {"/v1/audio", "neither hears nor speaks"},
     {"/v1/rerank", "ranks nothing"},
     {"/v1/score", "scores nothing; /v1/completions gives log-probabilities"},
     {"/v1/batches", "takes no batches"},
     {"/v1/files", "keeps no files"}}};

/// As in "2026-01-31T12:00:00Z".
std::string iso_time(int64_t seconds) {
  const std::time_t time = seconds;
  std::tm parts{};
  gmtime_r(&time, &parts);
  std::array<char, 32> buffer{};
  const size_t size = std::strftime(buffer.data(), buffer.size(), "%FT%TZ", &parts);
  return {buffer.data(), size};
}

/// The id that a client gave its request, if it is fit for a header and a log, else a new one.
std::string request_id(const HttpRequest& request) {
  constexpr size_t kMaxSize = 128;
  for (const char* name : {"x-request-id", "request-id", "x-client-request-id"}) {
    const std::string_view given = request.header(name);
    if (!given.empty() && given.size() <= kMaxSize &&
        std::ranges::all_of(given, [](char c) { return c > ' ' && c < 0x7f; }))
      return std::string(given);
  }
  return random_id("req_");
}

HttpResponse json_response(const Json& json) {
  HttpResponse response;
  response.body = json.dump();
  return response;
}

/// What a request gets that says nothing, so that a page can show it.
Json defaults_json(const ServerOptions& options) {
  const Sampling& sampling = options.default_sampling;
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
    // Clients that were told a token and a key send both.
    int found = std::max(find(request.header("x-api-key")), find(request.header("api-key")));
    constexpr std::string_view kBearer = "bearer ";  // the scheme in any case (RFC 9110, 11.1)
    std::string_view authorization = request.header("authorization");
    if (same_letters(authorization.substr(0, kBearer.size()), kBearer)) {
      authorization.remove_prefix(kBearer.size());
      authorization.remove_prefix(
          std::min(authorization.find_first_not_of(' '), authorization.size()));
      found = std::max(found, find(authorization));
    }
    return found;
  }
  /// The same for one value.
  int find(std::string_view given) const {
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

namespace {
/// A folder that was asked for, else the engine's store, else nothing.
std::shared_ptr<ResponseStore> responses_of(const ServerOptions& options) {
  if (!options.response_folder.empty())
    return std::make_shared<ResponseFolder>(options.response_folder, options.response_bytes);
  if (options.texts != nullptr) return std::make_shared<ResponseTexts>(*options.texts);
  return nullptr;
}
}  // namespace

Api::Api(engine_core::Engine& engine,
         const text::Tokenizer& tokenizer,
         const ServerOptions& options)
    : context_{engine, tokenizer, options, std::make_shared<CallMemory>(), responses_of(options)},
      access_(options),
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

HttpResponse Api::refuse(const RequestError& error, std::string_view path, std::string id) const {
  // A wrong method's error says which is right; its code is one that clients know.
  const bool wrong_method = error.status() == 405;
  const RequestError shown(error.status(), error.what(), error.param(),
                           wrong_method ? "method_not_allowed" : error.code());
  if (id.empty()) id = random_id("req_");
  HttpResponse response = is_anthropic(path) ? anthropic_error(shown, id) : openai_error(shown);
  if (error.status() == 429 || error.status() == 503)
    response.headers.emplace_back("Retry-After", concat(context_.options.retry_after.count()));
  if (error.status() == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  if (error.status() == 415)
    response.headers.emplace_back("Accept-Encoding", "gzip, deflate, zstd");
  if (wrong_method) response.headers.emplace_back("Allow", error.code());
  return response;
}

HttpResponse Api::error(int status, std::string_view message, std::string_view path) {
  metrics_.count_response(label(path), status);
  const std::string id = random_id("req_");
  HttpResponse response = refuse(RequestError(status, std::string(message)), path, id);
  response.headers.emplace_back(is_anthropic(path) ? "request-id" : "x-request-id", id);
  return response;
}

void Api::handle(HttpRequest request, std::shared_ptr<Responder> responder) {
  // Every answer names its request, and says to browsers who may read it.
  std::string id = request_id(request);
  auto headers = access_.headers(request);
  headers.emplace_back("x-request-id", id);
  if (is_anthropic(request.path)) headers.emplace_back("request-id", id);
  const std::shared_ptr<Responder> named = with_headers(std::move(responder), std::move(headers));
  request.id = std::move(id);
  guarded(request, *named, [&] {
    if (std::optional<HttpResponse> answer = access_.preflight(request)) {
      metrics_.count_response(label(request.path), answer->status);
      return named->send(*std::move(answer));
    }
    access_.check(request);
    if (const std::string_view coding = request.header("content-encoding"); !coding.empty())
      request.body = decoded_body(coding, std::move(request.body), context_.options.max_body_bytes);
    route(request, named);
  });
}

void Api::guarded(const HttpRequest& request,
                  Responder& responder,
                  const std::function<void()>& work) {
  try {
    work();
  } catch (const RequestError& error) {
    metrics_.count_response(label(request.path), error.status());
    responder.send(refuse(error, request.path, request.id));
  } catch (const std::exception& error) {
    log::error("server", request.path, ": ", error.what());
    metrics_.count_response(label(request.path), 500);
    responder.send(refuse(RequestError(500, "internal error"), request.path, request.id));
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
    return answer(health(request));
  }
  if (path == "/ping") {  // asked by whoever starts containers, either way
    if (request.method != "POST") check_method(request, "GET");
    return answer(health(request));
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
  constexpr std::string_view kResponse = "/v1/responses/";
  if (path.starts_with(kResponse))
    return answer(stored_response(request, path.substr(kResponse.size())));
  struct Plain {
    std::string_view path, method;
    HttpResponse (Api::*answer)(const HttpRequest&) const;
  };
  constexpr std::array<Plain, 8> kPlain = {
      {{"/v1/messages/count_tokens", "POST", &Api::count_tokens},
       {"/tokenize", "POST", &Api::tokenize},
       {"/detokenize", "POST", &Api::detokenize},
       {"/v1/models", "GET", &Api::models},
       {"/v1/hadal/context", "GET", &Api::context_view},
       {"/version", "GET", &Api::version},
       {"/tokenizer_info", "GET", &Api::tokenizer_info},
       {"/metrics", "GET", &Api::metrics_page}}};
  for (const Plain& plain : kPlain) {
    if (path != plain.path && !(plain.path == "/v1/models" && path.starts_with("/v1/models/")))
      continue;
    check_method(request, plain.method);
    return answer((this->*plain.answer)(request));
  }
  for (const auto& [absent, what] : kAbsent) {
    if (path == absent || (path.starts_with(absent) && path[absent.size()] == '/'))
      throw RequestError(404, concat(absent, ": this server writes text and ", what), "",
                         "unsupported_endpoint");
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
  for (engine_core::Request& part : job.requests) part.client = concat("key", key);
  job.format->name_request(request.id);
  if (job.chat) {
    job.requests.front().context_view = true;
    job.on_view = [views = views_, id = job.id](const engine_core::ContextView& view) {
      views->put(id, view);
    };
  }
  const bool has_grammar = std::ranges::any_of(job.requests, [](const engine_core::Request& part) {
    return part.grammar.kind != engine_core::Grammar::Kind::kNone;
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
  HttpRequest named;  // what refusing it takes
  named.path = request.path;
  named.id = request.id;
  boost::asio::post(waiting_->threads, [this, start, left, responder, named = std::move(named)] {
    if (*left) return metrics_.cancelled.add();
    guarded(named, *responder, start);
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

/// GET and DELETE of a response, GET of what went into it.
HttpResponse Api::stored_response(const HttpRequest& request, std::string id) const {
  constexpr std::string_view kItems = "/input_items";
  const bool items = id.ends_with(kItems);
  if (items) id.resize(id.size() - kItems.size());
  const RequestError missing(404, concat("Response with id '", id.substr(0, 64), "' not found."),
                             "", "response_not_found");
  if (context_.responses == nullptr) throw RequestError(missing);
  if (request.method == "DELETE" && !items) {
    if (!context_.responses->erase(id)) throw RequestError(missing);
    return json_response(
        Json::object({{"id", js(id)}, {"object", js("response.deleted")}, {"deleted", js(true)}}));
  }
  check_method(request, "GET");
  auto stored = context_.responses->find(id);
  if (!stored) throw RequestError(missing);
  if (!items) return json_response(stored->response);
  // The conversation without what this response added.
  std::vector<Json>& list = stored->items.items();
  const Json* output = stored->response.find("output");
  if (output != nullptr) list.resize(list.size() - std::min(list.size(), output->items().size()));
  return json_response(
      Json::object({{"object", js("list")}, {"data", stored->items}, {"has_more", js(false)}}));
}

/// The list and its members have the fields of OpenAI's and of Anthropic's API.
HttpResponse Api::models(const HttpRequest& request) const {
  const std::string& own = context_.engine.info().model_name;
  const auto model = [&](const std::string& name) {
    return Json::object({{"id", js(name)},
                         {"object", js("model")},
                         {"created", js(created_)},
                         {"owned_by", js("hadal")},
                         {"root", js(own)},
                         {"max_model_len", js(context_.max_context())},
                         {"type", js("model")},
                         {"display_name", js(name)},
                         {"created_at", js(iso_time(created_))},
                         {"defaults", defaults_json(context_.options)}});
  };
  std::vector<std::string> names = {own};
  for (const std::string& alias : context_.options.model_aliases) {
    if (std::ranges::find(names, alias) == names.end()) names.push_back(alias);
  }
  constexpr std::string_view kList = "/v1/models";
  if (request.path == kList) {
    Json list = Json::array();
    for (const std::string& name : names) list.items().push_back(model(name));
    return json_response(Json::object({{"object", js("list")},
                                       {"data", std::move(list)},
                                       {"has_more", js(false)},
                                       {"first_id", js(names.front())},
                                       {"last_id", js(names.back())}}));
  }
  // Names such as org/model come with their slash escaped.
  const std::string name =
      text::repair_utf8(percent_decoded(std::string_view(request.path).substr(kList.size() + 1)));
  if (name.empty() ||
      (!context_.options.any_model && std::ranges::find(names, name) == names.end()))
    throw RequestError(404, concat("there is no model '", name.substr(0, 100), "'"), "model",
                       "model_not_found");
  return json_response(model(name));
}

HttpResponse Api::count_tokens(const HttpRequest& request) const {
  const Json body = parse_body(request.body, context_.options);
  return json_response(Json::object({{"input_tokens", js(count_message_tokens(context_, body))}}));
}

HttpResponse Api::version(const HttpRequest&) const {
  return json_response(Json::object({{"version", js(HADAL_VERSION)}}));
}

/// What programs that tokenise through /tokenize and /detokenize ask first.
HttpResponse Api::tokenizer_info(const HttpRequest&) const {
  const auto known = [&](std::string_view token) {
    return context_.tokenizer.find(token) ? js(token) : Json();
  };
  return json_response(Json::object({{"tokenizer_class", js("PreTrainedTokenizerFast")},
                                     {"bos_token", known(text::kBos)},
                                     {"eos_token", known(text::kEos)},
                                     {"pad_token", known(text::kPad)},
                                     {"add_bos_token", js(true)},
                                     {"add_eos_token", js(false)},
                                     {"vocab_size", js(int64_t{context_.tokenizer.vocab_size()})},
                                     {"model_max_length", js(context_.max_context())}}));
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

HttpResponse Api::health(const HttpRequest&) const {
  const bool draining = draining_ && draining_();
  HttpResponse response =
      json_response(Json::object({{"status", js(draining ? "stopping" : "ok")}}));
  if (draining) response.status = 503;
  return response;
}

HttpResponse Api::metrics_page(const HttpRequest&) const {
  HttpResponse response;
  response.content_type = "text/plain; version=0.0.4; charset=utf-8";
  response.body = metrics_.text(context_.engine.stats(), stats_ ? stats_() : HttpStats{});
  return response;
}

}  // namespace hadal::server
