// One connection: its requests one after the other, each answered by an exchange. Private to
// http.cpp.
#pragma once

// Boost's assertions fail the connection, not the server: assertion_failed() in http_message.cpp.
#ifndef BOOST_ENABLE_ASSERT_HANDLER
#define BOOST_ENABLE_ASSERT_HANDLER
#endif

#include <atomic>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/read.hpp>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <type_traits>

#include "base/check.h"
#include "base/log.h"
#include "server/http_message.h"
#include "server/http_text.h"

// Setting up and closing sockets that may be gone: what fails there needs no answer.
// NOLINTBEGIN(bugprone-unused-return-value)

namespace hadal::server::connection {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;
using net::ip::tcp;
using Clock = std::chrono::steady_clock;

constexpr size_t kReadAhead = 64 << 10;  // bytes of further requests read while one is answered

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
  std::atomic<int64_t> active{0}, accepted{0}, refused{0}, slow_dropped{0}, left{0}, requests{0};
  std::mutex mutex;
  std::condition_variable changed;
  std::set<std::weak_ptr<ConnectionBase>, std::owner_less<>> connections;
  int64_t open = 0;

  void notify() {
    const std::lock_guard lock(mutex);
    changed.notify_all();
  }
};

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
    request_ = head_of_request(*parser_);
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
    ++core_->requests;
    watch();
    request_.body = std::move(parser_->get().body());
    auto handle = [core = core_, exchange, request = std::move(request_)]() mutable {
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
  HttpRequest request_;  ///< its header, while its body is read
  std::string path_;
  std::shared_ptr<Exchange> exchange_;
  std::string out_, writing_;  ///< waiting, and in the kernel's hands
  bool http11_ = true, keep_alive_ = true, is_head_ = false;
  bool watching_ = false, ending_ = false, goodbye_ = false, resuming_ = false;
  bool closed_ = false;
};

using PlainConnection = Connection<beast::tcp_stream>;
using TlsConnection = Connection<net::ssl::stream<beast::tcp_stream>>;

}  // namespace hadal::server::connection
// NOLINTEND(bugprone-unused-return-value)
