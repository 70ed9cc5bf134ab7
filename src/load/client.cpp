#include "load/client.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <optional>
#include <sys/resource.h>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "load/connection.h"
#include "server/sse_parser.h"

namespace hadal::load {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using Clock = std::chrono::steady_clock;
using Error = HttpConnection::Error;
template <typename T>
using Awaitable = asio::awaitable<T>;

constexpr auto kTick = std::chrono::milliseconds(100);
// A slow client: 2.5 KB a second at the most, a tenth of what a fast answer streams.
constexpr size_t kReadBytes = 8192, kSlowReadBytes = 256;
constexpr auto kSlowPause = std::chrono::milliseconds(100);
constexpr size_t kMaxErrorBody = size_t{64} << 10;

Clock::duration seconds(double count) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(count));
}

void fail(Outcome& outcome, std::string kind, std::string detail) {
  outcome.end = Outcome::End::kFailed;
  outcome.error = std::move(kind);
  outcome.detail = std::move(detail);
}

/// The kind under which an operation's failure is counted.
void fail(Outcome& outcome, const Error& error, const char* otherwise) {
  static const auto& http_category = Error(http::error::bad_version).category();
  std::string kind = otherwise;
  if (error == beast::error::timeout)
    kind = "timeout";
  else if (error.category() == http_category && error != http::error::end_of_stream &&
           error != http::error::partial_message)
    kind = "bad HTTP";
  fail(outcome, std::move(kind), error.message());
}

/// Thousands of streams need as many descriptors as the system lets us have.
void raise_descriptor_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

class LoadClient::Impl {
 public:
  explicit Impl(ClientOptions options) : options_(std::move(options)) {
    raise_descriptor_limit();
    const server::Url& url = options_.url;
    Error error;
    tcp::resolver resolver(io_);
    for (const auto& found : resolver.resolve(url.host, std::to_string(url.port), error))
      endpoints_.push_back(found.endpoint());
    HADAL_INPUT_CHECK(!error && !endpoints_.empty(), "bench serve: ", url.str(), ": ",
                      error.message());
    if (!url.tls) return;
    tls_.emplace(asio::ssl::context::tls_client);
    tls_->set_default_verify_paths();
    tls_->set_verify_mode(options_.insecure ? asio::ssl::verify_none : asio::ssl::verify_peer);
  }

  std::string first_model() {
    Outcome outcome;
    std::string body;
    const HttpConnection::Request request = make_request(http::verb::get, "/models");
    const PlannedRequest plan;
    start_ = Clock::now();
    asio::co_spawn(
        io_, [&]() -> Awaitable<void> { co_await exchange(request, plan, start_, outcome, &body); },
        [this](const std::exception_ptr& thrown) { keep(thrown); });
    io_.run();
    io_.restart();
    rethrow();
    const std::string where = concat("bench serve: ", options_.url.str(), "/models: ");
    if (!outcome.error.empty())
      throw InputError(
          concat(where, outcome.error, outcome.detail.empty() ? "" : ": ", outcome.detail));
    const auto json = nlohmann::json::parse(body, nullptr, false);
    const auto id = nlohmann::json::json_pointer("/data/0/id");
    HADAL_INPUT_CHECK(json.is_object() && json.contains(id) && json.at(id).is_string(), where,
                      "it lists no model; say --model");
    return json.at(id).get<std::string>();
  }

  ClientState run(const Traffic& traffic,
                  const std::function<void(Outcome)>& ended,
                  const std::function<bool(const ClientState&)>& tick) {
    traffic_ = &traffic;
    ended_ = &ended;
    tick_ = &tick;
    start_ = Clock::now();
    spawn(watch());
    if (options_.concurrency == 0) {
      spawn(open_loop());
    } else {
      for (int64_t i = 0; i < options_.concurrency; ++i) spawn(closed_loop());
    }
    io_.run();
    rethrow();
    state_.seconds = since_start(Clock::now());
    return state_;
  }

 private:
  double since_start(Clock::time_point time) const {
    return std::chrono::duration<double>(time - start_).count();
  }

  void spawn(Awaitable<void> work) {
    asio::co_spawn(io_, std::move(work),
                   [this](const std::exception_ptr& thrown) { keep(thrown); });
  }
  /// A broken contract ends the test.
  void keep(const std::exception_ptr& thrown) {
    if (!thrown) return;
    if (!thrown_) thrown_ = thrown;
    io_.stop();
  }
  void rethrow() const {
    if (thrown_) std::rethrow_exception(thrown_);
  }

  // --- who sends when
  // ------------------------------------------------------------------------------

  bool more(int64_t index) const { return options_.requests == 0 || index < options_.requests; }

  Awaitable<void> open_loop() {
    ++sending_;
    asio::steady_timer timer(io_);
    double at = 0;
    for (int64_t index = 0; more(index); ++index) {
      at += traffic_->gap(index);
      if (options_.duration > 0 && at >= options_.duration) break;
      PlannedRequest request = traffic_->request(index);
      const Clock::time_point planned = start_ + seconds(at);
      timer.expires_at(planned);
      co_await timer.async_wait(asio::use_awaitable);
      spawn(perform(std::move(request), planned));
    }
    --sending_;
    wake_watch();
  }

  Awaitable<void> closed_loop() {
    ++sending_;
    while (more(next_) &&
           (options_.duration == 0 || since_start(Clock::now()) < options_.duration)) {
      PlannedRequest request = traffic_->request(next_++);
      co_await perform(std::move(request), Clock::now());
    }
    --sending_;
    wake_watch();
  }

  /// Shows the state until all is done or nobody wants more.
  Awaitable<void> watch() {
    while (true) {
      Error woken;
      watch_timer_.expires_after(kTick);
      co_await watch_timer_.async_wait(asio::redirect_error(asio::use_awaitable, woken));
      state_.seconds = since_start(Clock::now());
      if (!(*tick_)(state_)) io_.stop();
      if (all_done()) co_return;
    }
  }
  bool all_done() const { return sending_ == 0 && state_.sent == state_.ended; }
  /// Called where something ends, so that the test ends with its last answer.
  void wake_watch() {
    if (all_done()) watch_timer_.cancel();
  }

  // --- one request
  // ---------------------------------------------------------------------------------

  Awaitable<void> perform(PlannedRequest plan, Clock::time_point planned) {
    ++state_.sent;
    Outcome outcome;
    outcome.index = plan.index;
    outcome.hash = plan.hash;
    outcome.slow = plan.slow;
    outcome.planned = since_start(planned);
    HttpConnection::Request request = make_request(
        http::verb::post, traffic_->options().chat ? "/chat/completions" : "/completions");
    request.body() = std::move(plan.body);
    request.prepare_payload();
    outcome.sent = since_start(Clock::now());
    co_await exchange(request, plan, planned, outcome, nullptr);
    outcome.ended = since_start(Clock::now());
    ++state_.ended;
    (*ended_)(std::move(outcome));
    wake_watch();
  }

  HttpConnection::Request make_request(http::verb verb, const std::string& path) const {
    HttpConnection::Request request(verb, options_.url.path + path, 11);
    request.set(http::field::host, options_.url.authority());
    request.set(http::field::user_agent, "hadal-bench");
    request.set(http::field::content_type, "application/json");
    if (!options_.api_key.empty())
      request.set(http::field::authorization, "Bearer " + options_.api_key);
    return request;
  }

  /// Sends and reads; the outcome says how it went. With `body` the answer is no stream but goes
  /// there.
  Awaitable<void> exchange(const HttpConnection::Request& request,
                           const PlannedRequest& plan,
                           Clock::time_point planned,
                           Outcome& outcome,
                           std::string* body) {
    const Clock::time_point deadline = planned + seconds(options_.timeout);
    std::optional<HttpConnection::Parser> parser;
    std::unique_ptr<HttpConnection> connection;
    // A kept connection may have been closed by the server meanwhile: then the next one is tried.
    for (bool reused = true; reused;) {
      reused = !idle_.empty() && !plan.slow;
      Error error;
      if (reused) {
        connection = std::move(idle_.back());
        idle_.pop_back();
        connection->set_deadline(deadline);
      } else {
        error = co_await connect(plan.slow, deadline, connection);
        if (error) {
          fail(outcome, error, "connect");
          co_return;
        }
      }
      parser.emplace();
      // No limit; boost::none would refuse every Content-Length in Boost 1.74.
      parser->body_limit(std::numeric_limits<uint64_t>::max());
      parser->header_limit(uint32_t{32} << 10);
      error = co_await connection->write(request);
      if (!error) error = co_await connection->read_header(*parser);
      if (!error) break;
      if (reused && !parser->got_some() && error != beast::error::timeout) continue;
      fail(outcome, error, "connection lost");
      co_return;
    }
    if (parser->get().result_int() != 200)
      co_await read_error(*connection, *parser, outcome);
    else if (body != nullptr)
      co_await read_body(*connection, *parser, outcome, *body);
    else
      co_await read_stream(*connection, *parser, plan, deadline, outcome);
    const bool whole = parser->is_done() && parser->keep_alive() && !plan.slow;
    if (whole && outcome.end != Outcome::End::kCancelled) idle_.push_back(std::move(connection));
  }

  /// Addresses are tried in the resolver's order, the one that worked last first.
  Awaitable<Error> connect(bool slow,
                           Clock::time_point deadline,
                           std::unique_ptr<HttpConnection>& connection) {
    Error error;
    for (size_t i = 0; i < endpoints_.size(); ++i) {
      const size_t choice = (good_ + i) % endpoints_.size();
      connection = HttpConnection::make(io_, tls_ ? &*tls_ : nullptr, options_.url.host, slow);
      connection->set_deadline(deadline);
      error = co_await connection->connect(endpoints_[choice]);
      if (error) continue;
      good_ = choice;
      break;
    }
    co_return error;
  }

  /// Reads the next bytes of the body into `into`, shortened to what came.
  static Awaitable<Error> read_piece(HttpConnection& connection,
                                     HttpConnection::Parser& parser,
                                     std::string& into,
                                     size_t size) {
    into.resize(size);
    auto& buffer = parser.get().body();
    buffer.data = into.data();
    buffer.size = size;
    const Error error = co_await connection.read_some(parser);
    into.resize(size - parser.get().body().size);
    co_return error;
  }

  Awaitable<void> read_body(HttpConnection& connection,
                            HttpConnection::Parser& parser,
                            Outcome& outcome,
                            std::string& body) {
    std::string piece;
    while (!parser.is_done() && body.size() < kMaxErrorBody) {
      const Error error = co_await read_piece(connection, parser, piece, kReadBytes);
      body += piece;
      if (!error) continue;
      fail(outcome, error, "connection lost");
      co_return;
    }
    outcome.end = Outcome::End::kDone;
  }

  /// An HTTP status but 200: counted by the status and the type in its body.
  Awaitable<void> read_error(HttpConnection& connection,
                             HttpConnection::Parser& parser,
                             Outcome& outcome) {
    std::string body;
    const unsigned status = parser.get().result_int();
    co_await read_body(connection, parser, outcome, body);
    const ApiError error = parse_api_error(body);
    fail(outcome, concat("HTTP ", status, error.type.empty() ? "" : " ", error.type),
         error.message);
  }

  Awaitable<void> read_stream(HttpConnection& connection,
                              HttpConnection::Parser& parser,
                              const PlannedRequest& plan,
                              Clock::time_point deadline,
                              Outcome& outcome) {
    server::SseParser events;
    AnswerReader reader(outcome);
    asio::steady_timer timer(io_);
    std::string piece;
    bool good = true;
    double now = 0;
    const auto cancelled = [&] {
      return plan.cancel_after > 0 && outcome.pieces >= plan.cancel_after;
    };
    const server::SseParser::Sink sink = [&](const server::SseEvent& event) {
      if (!good || cancelled()) return;
      const int64_t before = outcome.pieces;
      good = reader.event(event.data, now);
      state_.pieces += outcome.pieces - before;
    };
    while (!parser.is_done()) {
      const Error error =
          co_await read_piece(connection, parser, piece, plan.slow ? kSlowReadBytes : kReadBytes);
      now = since_start(Clock::now());
      try {
        events.feed(piece, sink);
      } catch (const InputError& refused) {
        fail(outcome, "bad stream", refused.what());
        co_return;
      }
      if (!good) co_return;
      if (cancelled()) {
        outcome.end = Outcome::End::kCancelled;
        co_return;
      }
      if (error) {
        fail(outcome, error, "connection lost");
        co_return;
      }
      if (!plan.slow || parser.is_done()) continue;
      if (Clock::now() >= deadline) {
        fail(outcome, "timeout", "a slow reader's");
        co_return;
      }
      timer.expires_after(kSlowPause);
      co_await timer.async_wait(asio::use_awaitable);
    }
    if (reader.complete() && !events.in_event())
      outcome.end = Outcome::End::kDone;
    else
      fail(outcome, "incomplete stream", "it ended without [DONE] or a finish_reason");
  }

  ClientOptions options_;
  const Traffic* traffic_ = nullptr;
  const std::function<void(Outcome)>* ended_ = nullptr;
  const std::function<bool(const ClientState&)>* tick_ = nullptr;
  std::vector<tcp::endpoint> endpoints_;
  size_t good_ = 0;  ///< of endpoints_
  std::optional<asio::ssl::context> tls_;
  asio::io_context io_{1};  ///< its coroutines hold connections, which need tls_
  asio::steady_timer watch_timer_{io_};
  std::vector<std::unique_ptr<HttpConnection>> idle_;
  std::exception_ptr thrown_;
  Clock::time_point start_;
  ClientState state_;
  int64_t next_ = 0;
  int sending_ = 0;  ///< loops that may still send
};

LoadClient::LoadClient(ClientOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
LoadClient::~LoadClient() = default;

std::string LoadClient::first_model() { return impl_->first_model(); }

ClientState LoadClient::run(const Traffic& traffic,
                            const std::function<void(Outcome)>& ended,
                            const std::function<bool(const ClientState&)>& tick) {
  return impl_->run(traffic, ended, tick);
}

}  // namespace hadal::load
