#include "server/http.h"

// Boost's assertions fail the connection, not the server: assertion_failed() in http_message.cpp.
#ifndef BOOST_ENABLE_ASSERT_HANDLER
#define BOOST_ENABLE_ASSERT_HANDLER
#endif

#include <algorithm>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/strand.hpp>

#include "base/file.h"
#include "server/http_connection.h"
#include "server/memory_stream.h"

// Setting up and closing sockets that may be gone: what fails there needs no answer.
// NOLINTBEGIN(bugprone-unused-return-value)

namespace hadal::server {

namespace net = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using connection::Connection;
using connection::ConnectionBase;
using connection::Core;
using connection::PlainConnection;
using connection::TlsConnection;
using net::ip::tcp;

namespace {

constexpr auto kLastWords = std::chrono::seconds(2);           // for answers that are told to stop
constexpr auto kAcceptPause = std::chrono::milliseconds(100);  // after errors as "too many files"

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
    stats.requests = core_->requests;
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
  error_code error;
  const auto refused = [&] { return error && error != http::error::need_more; };
  const size_t header = parser.put(net::buffer(bytes.data(), bytes.size()), error);
  if (refused()) return status_of(error);
  if (!parser.is_header_done() || suspicion(parser) != nullptr) return 400;
  HttpRequest found = head_of_request(parser);
  if (!parser.is_done()) {
    bytes.remove_prefix(header);
    parser.eager(true);
    parser.put(net::buffer(bytes.data(), bytes.size()), error);
    if (refused()) return status_of(error);
    if (!parser.is_done()) return 400;
  }
  found.body = std::move(parser.get().body());
  request = std::move(found);
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
