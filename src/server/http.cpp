#include "server/http.h"

// Boost's assertions fail the connection, not the server: assertion_failed() below.
#define BOOST_ENABLE_ASSERT_HANDLER

#include <algorithm>
#include <atomic>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/string_body.hpp>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <type_traits>

#include "base/check.h"
#include "base/file.h"
#include "base/log.h"
#include "server/http_text.h"
#include "server/memory_stream.h"

// Setting up and closing sockets that may be gone: what fails there needs no answer.
// NOLINTBEGIN(bugprone-unused-return-value)

namespace boost {

void assertion_failed(const char* expression, const char* function, const char* file, long line) {
  // basic_parser::parse_chunk_header() of 1.74 expects the last chunk's end in one piece ("0",
  // CRLF, CRLF); it may come byte by byte, and the code behind the assertion can do with that.
  if (std::string_view(expression) == "n >= 5") return;
  throw hadal::Error(hadal::concat(expression, " fails in ", function, ", ", file, ":", line));
}
void assertion_failed_msg(const char* expression,
                          const char* message,
                          const char* function,
                          const char* file,
                          long line) {
  throw hadal::Error(
      hadal::concat(expression, " fails in ", function, ", ", file, ":", line, ": ", message));
}

}  // namespace boost

namespace hadal::server {
namespace {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;
using net::ip::tcp;
using Clock = std::chrono::steady_clock;
using RequestParser = http::request_parser<http::string_body>;

constexpr size_t kReadAhead = 64 << 10;  // bytes of further requests read while one is answered
constexpr auto kLastWords = std::chrono::seconds(2);           // for answers that are told to stop
constexpr auto kAcceptPause = std::chrono::milliseconds(100);  // after errors as "too many files"

class ConnectionBase {
 public:
  virtual ~ConnectionBase() = default;
  virtual void close_if_idle() = 0;
  virtual void end_answer() = 0;
  virtual void force_close() = 0;
};

/// What connections share. They own it together with the server, since an engine may hold an
/// answer longer than the server lives.
struct Core {
  Core(const ServerOptions& o, HttpHandler& h) : options(o), handler(h) {}
  const ServerOptions options;
  HttpHandler& handler;
  net::io_context io;
  std::optional<net::ssl::context> tls;
  std::optional<net::thread_pool> handlers;  ///< none: on the connection's thread
  bool dated = true;  ///< answers carry a Date; not in HttpSession, whose answers are compared
  std::atomic<bool> draining{false};
  std::atomic<int64_t> active{0}, accepted{0}, refused{0}, slow_dropped{0}, left{0};
  std::mutex mutex;
  std::condition_variable changed;
  std::set<std::weak_ptr<ConnectionBase>, std::owner_less<>> connections;
  int64_t open = 0;

  void notify() {
    const std::lock_guard lock(mutex);
    changed.notify_all();
  }
};

HttpRequest take_request(RequestParser& parser) {
  http::request<http::string_body> message = parser.release();
  HttpRequest request;
  const auto copy = [](auto view) { return std::string(view.data(), view.size()); };
  request.method = copy(message.method_string());
  HttpTarget target = split_target(copy(message.target()));
  request.path = std::move(target.path);
  request.query = std::move(target.query);
  // What a whole URI says goes before the Host header (RFC 9112, 3.2.2).
  if (!target.authority.empty()) message.set(http::field::host, target.authority);
  for (const auto& field : message) {
    std::string name = copy(field.name_string());
    for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
    request.headers.emplace_back(std::move(name), copy(field.value()));
  }
  request.body = std::move(message.body());
  return request;
}

void set_limits(RequestParser& parser, const ServerOptions& options) {
  parser.header_limit(static_cast<uint32_t>(options.max_header_bytes));
  parser.body_limit(options.max_body_bytes);
}

int status_of(const error_code& error) {
  if (error == http::error::header_limit || error == http::error::buffer_overflow) return 431;
  if (error == http::error::body_limit) return 413;
  return 400;
}

const char* reason_of(int status) {
  if (status == 413) return "the request's body is too large";
  if (status == 431) return "the request's header is too large";
  return "this is no HTTP request";
}

/// Why nothing behind this header is read, or null: its framing is ambiguous, or whom it asks.
const char* suspicion(const RequestParser& parser) {
  const auto& message = parser.get();
  if (message.count(http::field::content_length) > 1 ||
      (message.count(http::field::content_length) == 1 &&
       message.count(http::field::transfer_encoding) > 0))
    return "Content-Length contradicts the request";
  if (message.count(http::field::host) > 1) return "the request has more than one Host";
  if (message.version() >= 11 && message.count(http::field::host) == 0)
    return "a request of HTTP/1.1 needs a Host header";
  return nullptr;
}

std::string head_of(const HttpResponse& response,
                    bool keep_alive,
                    std::string_view framing,
                    bool dated) {
  const auto status = static_cast<http::status>(response.status);
  const auto reason = http::obsolete_reason(status);
  std::string out = concat("HTTP/1.1 ", response.status, ' ',
                           std::string_view(reason.data(), reason.size()), "\r\nServer: hadal\r\n");
  if (dated) out += "Date: " + http_date(std::time(nullptr)) + "\r\n";
  if (!response.content_type.empty()) out += "Content-Type: " + response.content_type + "\r\n";
  // NOLINTNEXTLINE(performance-inefficient-string-concatenation)
  for (const auto& [name, value] : response.headers) out += name + ": " + value + "\r\n";
  out += framing;
  out += keep_alive ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n";
  return out;
}

template <typename Stream>
class Connection final : public ConnectionBase,
                         public std::enable_shared_from_this<Connection<Stream>> {
  static constexpr bool kTls = std::is_same_v<Stream, net::ssl::stream<beast::tcp_stream>>;

 public:
  /// The answer to one request. The connection forgets it when it ends, so that a late word never
  /// reaches the next answer.
  class Exchange final : public Responder, public std::enable_shared_from_this<Exchange> {
   public:
    explicit Exchange(std::shared_ptr<Connection> connection)
        : connection_(std::move(connection)), executor_(connection_->stream_.get_executor()) {}

    void post(std::function<void()> work) override {
      submit([this, work = std::move(work)] {
        try {
          work();
        } catch (const std::exception& error) {
          log::error("server", "an answer failed: ", error.what());
          fail();
        } catch (...) {
          log::error("server", "an answer failed");
          fail();
        }
      });
    }
    void send(HttpResponse response) override {
      submit([this, response = std::move(response)] { do_send(response); });
    }
    void begin_stream(HttpResponse head) override {
      submit([this, head = std::move(head)] {
        if (began_) return;
        began_ = true;
        chunked_ = connection_->http11_;
        if (!chunked_) connection_->keep_alive_ = false;
        connection_->enqueue(
            head_of(head, connection_->keeps_alive(),
                    chunked_ ? "Transfer-Encoding: chunked\r\n" : "", connection_->core_->dated),
            false);
      });
    }
    void write(std::string bytes) override {
      submit([this, bytes = std::move(bytes)] {
        if (!began_ || bytes.empty()) return;
        written_ = Clock::now();
        if (!chunked_) return connection_->enqueue(bytes, true);
        char size[24];
        const int digits = std::snprintf(size, sizeof(size), "%zx\r\n", bytes.size());
        connection_->enqueue(std::string(size, static_cast<size_t>(digits)) + bytes + "\r\n", true);
      });
    }
    void end_stream() override {
      submit([this] {
        if (!began_) return;
        if (chunked_) connection_->enqueue("0\r\n\r\n", false);
        finish();
      });
    }
    void when_silent(std::chrono::milliseconds interval, std::function<void()> work) override {
      submit([this, interval, work = std::move(work)]() mutable {
        written_ = Clock::now();
        silence_.emplace(executor_);
        watch_silence(interval, std::move(work));
      });
    }
    void on_close(std::function<void()> gone) override {
      {
        const std::lock_guard lock(mutex_);
        if (!over_) {
          gone_ = std::move(gone);
          return;
        }
        if (!left_) return;
      }
      gone();
    }
    void on_stop(std::function<void()> stopping) override {
      submit([this, stopping = std::move(stopping)]() mutable { stopping_ = std::move(stopping); });
    }

    /// On the strand: the server waits no longer.
    void stop() {
      if (stopping_) {
        post(std::exchange(stopping_, {}));
      } else if (!began_) {
        do_send(
            connection_->core_->handler.error(503, "the server is stopping", connection_->path_));
      }
    }
    /// On the strand: the client has left.
    void leave() {
      std::function<void()> gone = end(true);
      if (!gone) return;
      try {
        gone();
      } catch (const std::exception& error) {
        log::error("server", "an answer's end failed: ", error.what());
      }
    }
    void do_send(const HttpResponse& response) {
      if (began_) return fail();
      began_ = true;
      const std::string length = concat("Content-Length: ", response.body.size(), "\r\n");
      std::string bytes =
          head_of(response, connection_->keeps_alive(), length, connection_->core_->dated);
      if (!connection_->is_head_) bytes += response.body;
      connection_->enqueue(std::move(bytes), false);
      finish();
    }

   private:
    /// Runs on the strand, unless the answer is over then; at once where the caller runs there.
    template <typename Work>
    void submit(Work work) {
      if (runner_.load() == std::this_thread::get_id()) {
        if (!over_) work();
        return;
      }
      // post() never runs the work itself, so nothing of others is called under the lock.
      const std::lock_guard lock(mutex_);
      if (!over_) net::post(executor_, Deferred<Work>{this->shared_from_this(), std::move(work)});
    }
    template <typename Work>
    struct Deferred {
      std::shared_ptr<Exchange> self;
      Work work;
      void operator()() {
        if (self->over_) return;
        self->runner_ = std::this_thread::get_id();
        const std::shared_ptr<void> reset(nullptr,
                                          [this](void*) { self->runner_ = std::thread::id(); });
        work();
      }
    };

    /// On the strand. One timer a stream, which looks at the latest write when it expires.
    void watch_silence(std::chrono::milliseconds interval, std::function<void()> work) {
      silence_->expires_at(written_ + interval);
      silence_->async_wait([self = this->shared_from_this(), interval,
                            work = std::move(work)](error_code error) mutable {
        if (error || self->over_) return;
        if (Clock::now() >= self->written_ + interval) self->post(work);
        // Running work of this answer may have written or ended it.
        self->post([self, interval, work = std::move(work)]() mutable {
          self->watch_silence(interval, std::move(work));
        });
      });
    }
    void finish() {
      end(false);
      connection_->answer_ended();
    }
    void fail() {
      if (!began_) {
        do_send(connection_->core_->handler.error(500, "internal error", connection_->path_));
      } else {
        connection_->shut();
      }
    }
    std::function<void()> end(bool left) {
      const std::function<void()> forgotten = std::exchange(stopping_, {});  // outlives the lock
      const std::lock_guard lock(mutex_);
      if (over_) return {};
      over_ = true;
      left_ = left;
      if (silence_) silence_->cancel();
      return std::exchange(gone_, {});
    }

    const std::shared_ptr<Connection> connection_;
    const typename Stream::executor_type executor_;
    std::mutex mutex_;                       // orders posting and the end
    std::atomic<bool> over_{false};          // set on the strand
    std::atomic<std::thread::id> runner_{};  // who runs work of this answer now
    bool left_ = false;
    std::function<void()> gone_;
    // On the strand:
    bool began_ = false, chunked_ = false;
    std::function<void()> stopping_;
    Clock::time_point written_;  // the latest write
    std::optional<net::steady_timer> silence_;
  };

  Connection(std::shared_ptr<Core> core, tcp::socket socket)
      : core_(std::move(core)),
        stream_(make_stream(*core_, std::move(socket))),
        idle_timer_(stream_.get_executor()) {}
  /// Without a socket.
  Connection(std::shared_ptr<Core> core, Stream stream)
      : core_(std::move(core)), stream_(std::move(stream)), idle_timer_(stream_.get_executor()) {}
  ~Connection() override {
    if (!closed_) count_closed();
  }

  void start() {
    {
      const std::lock_guard lock(core_->mutex);
      // Owners that are gone are swept now and then.
      if (core_->connections.size() > 64 &&
          static_cast<int64_t>(core_->connections.size()) > 2 * core_->open)
        std::erase_if(core_->connections, [](const auto& weak) { return weak.expired(); });
      core_->connections.insert(this->weak_from_this());
    }
    net::dispatch(stream_.get_executor(), [self = this->shared_from_this()] { self->open(); });
  }
  void close_if_idle() override {
    net::post(stream_.get_executor(), [self = this->shared_from_this()] {
      if (self->exchange_ == nullptr && self->out_.empty() && self->writing_.empty()) self->shut();
    });
  }
  void end_answer() override {
    net::post(stream_.get_executor(), [self = this->shared_from_this()] {
      if (const auto exchange = self->exchange_) exchange->stop();
    });
  }
  void force_close() override {
    net::post(stream_.get_executor(), [self = this->shared_from_this()] { self->shut(); });
  }
  Stream& stream() { return stream_; }

 private:
  static Stream make_stream(Core& core, tcp::socket socket) {
    if constexpr (kTls) {
      return Stream(beast::tcp_stream(std::move(socket)), *core.tls);
    } else {
      return Stream(std::move(socket));
    }
  }
  auto& lowest() { return beast::get_lowest_layer(stream_); }
  bool keeps_alive() const { return keep_alive_ && !core_->draining; }

  void open() {
    if constexpr (kTls) {
      lowest().expires_after(core_->options.idle_timeout);
      stream_.async_handshake(net::ssl::stream_base::server,
                              [self = this->shared_from_this()](error_code error) {
                                error ? self->shut() : self->read_request();
                              });
    } else {
      read_request();
    }
  }

  void read_request() {
    if (closed_) return;
    if (core_->draining && buffer_.size() == 0) return shut();
    parser_.emplace();
    set_limits(*parser_, core_->options);
    lowest().expires_after(core_->options.idle_timeout);
    http::async_read_header(
        stream_, buffer_, *parser_,
        [self = this->shared_from_this()](error_code error, size_t) { self->on_header(error); });
  }
  void on_header(error_code error) {
    if (closed_) return;
    if (error) return on_read_error(error);
    const auto& message = parser_->get();
    path_ = split_target({message.target().data(), message.target().size()}).path;
    http11_ = message.version() >= 11;
    keep_alive_ = message.keep_alive();
    is_head_ = message.method() == http::verb::head;
    if (const char* problem = suspicion(*parser_)) return refuse(400, problem);
    if (http11_ && !parser_->is_done()) {
      const auto expect = message[http::field::expect];
      if (beast::iequals(expect, "100-continue")) enqueue("HTTP/1.1 100 Continue\r\n\r\n", false);
    }
    if (writing_.empty()) lowest().expires_after(core_->options.body_timeout);
    http::async_read(stream_, buffer_, *parser_,
                     [self = this->shared_from_this()](error_code read_error, size_t) {
                       self->on_body(read_error);
                     });
  }
  void on_body(error_code error) {
    if (closed_) return;
    if (error) return on_read_error(error);
    auto exchange = std::make_shared<Exchange>(this->shared_from_this());
    exchange_ = exchange;
    ++core_->active;
    watch();
    auto handle = [core = core_, exchange, request = take_request(*parser_)]() mutable {
      try {
        core->handler.handle(std::move(request), exchange);
      } catch (const std::exception& failure) {
        log::error("server", "a request failed: ", failure.what());
        exchange->post([] { throw Error("the handler failed"); });
      }
    };
    if (core_->handlers) {
      net::post(*core_->handlers, std::move(handle));
    } else {
      net::post(core_->io, std::move(handle));  // without sockets
    }
  }
  void on_read_error(error_code error) {
    if (error.category() == http::make_error_code(http::error::end_of_stream).category() &&
        error != http::error::end_of_stream && error != http::error::partial_message)
      return refuse(status_of(error), reason_of(status_of(error)));
    shut();
  }
  void refuse(int status, const char* message) {
    keep_alive_ = false;
    auto exchange = std::make_shared<Exchange>(this->shared_from_this());
    exchange_ = exchange;
    ++core_->active;
    exchange->do_send(core_->handler.error(status, message, path_));
  }

  /// Reads while an answer is under way, to notice that the client leaves; what comes is kept for
  /// the next request.
  void watch() {
    if (watching_ || closed_ || buffer_.size() >= kReadAhead) return;
    watching_ = true;
    lowest().expires_never();
    stream_.async_read_some(
        buffer_.prepare(4096), [self = this->shared_from_this()](error_code error, size_t count) {
          self->watching_ = false;
          if (self->closed_) return;
          if (std::exchange(self->resuming_, false) && error == net::error::operation_aborted)
            return self->read_request();
          if (error) return self->shut();
          if (self->goodbye_) return self->drain_input();
          self->buffer_.commit(count);
          if (self->exchange_ != nullptr) return self->watch();
          self->idle_timer_.cancel();
          if (self->out_.empty() && self->writing_.empty()) self->read_request();
        });
  }

  void enqueue(std::string bytes, bool bounded) {
    if (closed_) return;
    if (bounded && out_.size() + writing_.size() + bytes.size() > core_->options.max_output_bytes) {
      ++core_->slow_dropped;
      log::info("server", "a client that does not read is dropped");
      return shut();
    }
    if (out_.empty()) {
      out_ = std::move(bytes);
    } else {
      out_ += bytes;
    }
    if (writing_.empty()) write_out();
  }
  void write_out() {
    writing_.swap(out_);
    out_.clear();
    lowest().expires_after(core_->options.write_timeout);
    net::async_write(stream_, net::buffer(writing_),
                     [self = this->shared_from_this()](error_code error, size_t) {
                       self->writing_.clear();
                       // The timeout has closed the socket, so reading may have noticed first.
                       if (error == beast::error::timeout) ++self->core_->slow_dropped;
                       if (self->closed_) return;
                       if (error) return self->shut();
                       if (!self->out_.empty()) return self->write_out();
                       if (self->ending_) self->next();
                     });
  }

  void answer_ended() {
    exchange_.reset();
    --core_->active;
    core_->notify();
    ending_ = true;
    if (out_.empty() && writing_.empty() && !closed_) next();
  }
  /// The answer is written.
  void next() {
    ending_ = false;
    if (!keeps_alive()) return say_goodbye();
    if (!watching_) return read_request();
    if (buffer_.size() > 0) {
      // The next request is here already, maybe whole: reading starts over with it.
      resuming_ = true;
      return lowest().cancel();
    }
    idle_timer_.expires_after(core_->options.idle_timeout);
    idle_timer_.async_wait([self = this->shared_from_this()](error_code error) {
      if (!error && self->exchange_ == nullptr && self->watching_) self->shut();
    });
  }
  /// Ends our side; what the client still sends is read for a moment, so that a reset does not
  /// overtake the answer.
  void say_goodbye() {
    goodbye_ = true;
    error_code ignored;
    if constexpr (!kTls) {
      lowest().socket().shutdown(tcp::socket::shutdown_send, ignored);
      idle_timer_.expires_after(std::chrono::milliseconds(500));
      idle_timer_.async_wait([self = this->shared_from_this()](error_code) { self->shut(); });
      if (!watching_) drain_input();
    } else {
      lowest().expires_after(std::chrono::milliseconds(500));
      stream_.async_shutdown([self = this->shared_from_this()](error_code) { self->shut(); });
    }
  }
  void drain_input() {
    buffer_.clear();
    lowest().expires_after(std::chrono::milliseconds(500));
    stream_.async_read_some(buffer_.prepare(kReadAhead),
                            [self = this->shared_from_this()](error_code error, size_t) {
                              error ? self->shut() : self->drain_input();
                            });
  }

  /// An engine may hold the object longer than the connection lasts.
  void count_closed() {
    const std::lock_guard lock(core_->mutex);
    --core_->open;
    core_->changed.notify_all();
  }
  void shut() {
    if (closed_) return;
    closed_ = true;
    count_closed();
    idle_timer_.cancel();
    error_code ignored;
    lowest().socket().close(ignored);
    if (exchange_ != nullptr) {
      const auto exchange = std::exchange(exchange_, nullptr);
      ++core_->left;
      exchange->leave();
      --core_->active;
      core_->notify();
    }
  }

  const std::shared_ptr<Core> core_;  // first: the last owner destroys it after the socket
  Stream stream_;
  net::steady_timer idle_timer_;
  beast::flat_buffer buffer_;
  std::optional<RequestParser> parser_;
  std::string path_;
  std::shared_ptr<Exchange> exchange_;
  std::string out_, writing_;  ///< waiting, and in the kernel's hands
  bool http11_ = true, keep_alive_ = true, is_head_ = false;
  bool watching_ = false, ending_ = false, goodbye_ = false, resuming_ = false;
  bool closed_ = false;
};

using PlainConnection = Connection<beast::tcp_stream>;
using TlsConnection = Connection<net::ssl::stream<beast::tcp_stream>>;

}  // namespace

std::string_view HttpRequest::header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return {};
}

class HttpServer::Impl {
 public:
  Impl(const ServerOptions& options, HttpHandler& handler)
      : core_(std::make_shared<Core>(options, handler)),
        acceptor_(core_->io),
        pause_(core_->io),
        work_(core_->io.get_executor()) {
    if (!options.tls_certificate.empty()) load_tls();
    listen();
    core_->handlers.emplace(static_cast<size_t>(std::max(1, options.handler_threads)));
  }
  ~Impl() { stop(); }

  void start() {
    HADAL_CHECK(threads_.empty(), "server: started twice");
    accept();
    for (int i = 0; i < std::max(1, core_->options.io_threads); ++i)
      threads_.emplace_back([this] { run(); });
  }

  uint16_t port() const { return port_; }
  const Core& core() const { return *core_; }
  HttpStats stats() const {
    HttpStats stats;
    stats.active = core_->active;
    stats.accepted = core_->accepted;
    stats.refused = core_->refused;
    stats.slow_dropped = core_->slow_dropped;
    stats.left = core_->left;
    const std::lock_guard lock(core_->mutex);
    stats.connections = core_->open;
    return stats;
  }

  void stop() {
    const std::lock_guard only_one(stopping_);
    if (stopped_) return;
    stopped_ = true;
    core_->draining = true;
    net::post(core_->io, [this] {
      error_code ignored;
      acceptor_.close(ignored);
      pause_.cancel();
    });
    each([](ConnectionBase& connection) { connection.close_if_idle(); });
    {
      std::unique_lock lock(core_->mutex);
      const auto all_ended = [&] { return core_->active == 0; };
      if (!core_->changed.wait_for(lock, core_->options.drain_timeout, all_ended)) {
        lock.unlock();
        each([](ConnectionBase& connection) { connection.end_answer(); });
        lock.lock();
        core_->changed.wait_for(lock, kLastWords, all_ended);
      }
      // What is written last still leaves.
      core_->changed.wait_for(lock, std::chrono::seconds(1), [&] { return core_->open == 0; });
    }
    each([](ConnectionBase& connection) { connection.force_close(); });
    core_->handlers->join();
    work_.reset();
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void load_tls() {
    const ServerOptions& options = core_->options;
    core_->tls.emplace(net::ssl::context::tls_server);
    core_->tls->set_options(net::ssl::context::default_workarounds | net::ssl::context::no_sslv2 |
                            net::ssl::context::no_sslv3 | net::ssl::context::no_tlsv1 |
                            net::ssl::context::no_tlsv1_1);
    // OpenSSL's own words for a file that is not there say little.
    for (const std::string& file : {options.tls_certificate, options.tls_key}) read_file(file);
    error_code error;
    core_->tls->use_certificate_chain_file(options.tls_certificate, error);
    HADAL_INPUT_CHECK(!error, "TLS certificate ", options.tls_certificate,
                      " holds no certificate in PEM form (", error.message(), ")");
    core_->tls->use_private_key_file(options.tls_key, net::ssl::context::pem, error);
    HADAL_INPUT_CHECK(!error, "TLS key ", options.tls_key, " holds no private key in PEM form (",
                      error.message(), ")");
  }
  void listen() {
    const ServerOptions& options = core_->options;
    error_code error;
    const auto address =
        net::ip::make_address(options.host == "localhost" ? "127.0.0.1" : options.host, error);
    HADAL_INPUT_CHECK(!error, "host '", options.host, "' is no IP address");
    const tcp::endpoint endpoint(address, options.port);
    acceptor_.open(endpoint.protocol(), error);
    if (!error) acceptor_.set_option(net::socket_base::reuse_address(true), error);
    if (!error) acceptor_.bind(endpoint, error);
    if (!error) acceptor_.listen(4096, error);
    HADAL_INPUT_CHECK(!error, "cannot listen on ", options.host, ":", options.port, ": ",
                      error.message());
    port_ = acceptor_.local_endpoint().port();
    if (!address.is_loopback() && options.api_keys.empty())
      log::warn("server", "open to the network without an API key: ", options.host, ":", port_);
  }
  void accept() {
    acceptor_.async_accept(net::make_strand(core_->io),
                           [this](error_code error, tcp::socket socket) {
                             if (core_->draining) return;
                             if (error) {
                               log::warn("server", "accept: ", error.message());
                               pause_.expires_after(kAcceptPause);
                               pause_.async_wait([this](error_code cancelled) {
                                 if (!cancelled && !core_->draining) accept();
                               });
                               return;
                             }
                             adopt(std::move(socket));
                             accept();
                           });
  }
  void adopt(tcp::socket socket) {
    ++core_->accepted;
    {
      const std::lock_guard lock(core_->mutex);
      if (core_->open >= static_cast<int64_t>(core_->options.max_connections)) {
        ++core_->refused;
        return;
      }
      ++core_->open;
    }
    error_code ignored;
    socket.set_option(tcp::no_delay(true), ignored);
    if (core_->options.socket_send_bytes > 0)
      socket.set_option(net::socket_base::send_buffer_size(core_->options.socket_send_bytes),
                        ignored);
    if (core_->tls) {
      std::make_shared<TlsConnection>(core_, std::move(socket))->start();
    } else {
      std::make_shared<PlainConnection>(core_, std::move(socket))->start();
    }
  }
  void run() {
    while (true) {
      try {
        core_->io.run();
        return;
      } catch (const std::exception& error) {
        log::error("server", "a connection failed: ", error.what());
      }
    }
  }
  template <typename Action>
  void each(Action action) {
    std::vector<std::shared_ptr<ConnectionBase>> all;
    {
      const std::lock_guard lock(core_->mutex);
      for (const auto& weak : core_->connections) {
        if (auto connection = weak.lock()) all.push_back(std::move(connection));
      }
    }
    for (const auto& connection : all) action(*connection);
  }

  std::shared_ptr<Core> core_;
  tcp::acceptor acceptor_;
  net::steady_timer pause_;
  net::executor_work_guard<net::io_context::executor_type> work_;
  std::vector<std::thread> threads_;
  uint16_t port_ = 0;
  std::mutex stopping_;
  bool stopped_ = false;
};

HttpServer::HttpServer(const ServerOptions& options, HttpHandler& handler)
    : impl_(std::make_unique<Impl>(options, handler)) {}
HttpServer::~HttpServer() = default;
void HttpServer::start() { impl_->start(); }
uint16_t HttpServer::port() const { return impl_->port(); }
HttpStats HttpServer::stats() const { return impl_->stats(); }
void HttpServer::stop() { impl_->stop(); }
bool HttpServer::draining() const { return impl_->core().draining; }

int parse_http_request(std::string_view bytes, const ServerOptions& options, HttpRequest& request) {
  RequestParser parser;
  set_limits(parser, options);
  parser.eager(true);
  error_code error;
  parser.put(net::buffer(bytes.data(), bytes.size()), error);
  if (error && error != http::error::need_more) return status_of(error);
  if (!parser.is_done() || suspicion(parser) != nullptr) return 400;
  request = take_request(parser);
  return 0;
}

struct HttpSession::Impl {
  Impl(const ServerOptions& options, HttpHandler& handler)
      : core(std::make_shared<Core>(options, handler)) {
    core->dated = false;
  }
  /// Everything that can be done without more input.
  void poll() {
    core->io.restart();
    core->io.poll();
  }
  std::shared_ptr<Core> core;
};

HttpSession::HttpSession(const ServerOptions& options, HttpHandler& handler)
    : impl_(std::make_unique<Impl>(options, handler)) {}
HttpSession::~HttpSession() = default;

std::string HttpSession::run(std::span<const std::string_view> pieces) {
  Core& core = *impl_->core;
  {
    const std::lock_guard lock(core.mutex);
    ++core.open;
    core.connections.clear();
  }
  const auto connection =
      std::make_shared<Connection<MemoryStream>>(impl_->core, MemoryStream(core.io));
  MemoryStream& stream = connection->stream();
  connection->start();
  impl_->poll();
  for (const std::string_view piece : pieces) {
    stream.feed(piece);
    impl_->poll();
  }
  stream.end_input();
  impl_->poll();
  connection->force_close();
  impl_->poll();
  HADAL_CHECK(core.open == 0 && core.active == 0, "http: ", core.open, " connections and ",
              core.active.load(), " answers are left");
  return stream.output();
}

}  // namespace hadal::server
// NOLINTEND(bugprone-unused-return-value)
