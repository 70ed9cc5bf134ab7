// One HTTP/1.1 connection of the load test's client, plain or TLS, as coroutines.
//
// Every operation ends by the deadline set last, with boost::beast::error::timeout. One thread.
//
// Includes Asio's coroutines for its users, too: their headers need what stands above them here.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <utility>  // std::exchange, which awaitable.hpp of Boost 1.74 does not ask for

// clang 19 speaks the coroutines that Boost 1.74 looks for under their old name.
#if defined(__clang__) && !defined(BOOST_ASIO_HAS_CO_AWAIT)
#define BOOST_ASIO_HAS_CO_AWAIT 1
#endif
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core/error.hpp>
#include <boost/beast/http/buffer_body.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/message.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>

namespace hadal::load {

class HttpConnection {
 public:
  using Error = boost::beast::error_code;
  using Request = boost::beast::http::request<boost::beast::http::string_body>;
  using Parser = boost::beast::http::response_parser<boost::beast::http::buffer_body>;
  template <typename T>
  using Awaitable = boost::asio::awaitable<T>;

  /// `tls`: null for plain HTTP; else it lives longer than the connection. A slow connection keeps
  /// its buffers small, so that the server notices.
  static std::unique_ptr<HttpConnection> make(boost::asio::io_context& io,
                                              boost::asio::ssl::context* tls,
                                              const std::string& host,
                                              bool slow);

  virtual ~HttpConnection() = default;

  virtual void set_deadline(std::chrono::steady_clock::time_point deadline) = 0;
  virtual Awaitable<Error> connect(const boost::asio::ip::tcp::endpoint& to) = 0;
  virtual Awaitable<Error> write(const Request& request) = 0;
  virtual Awaitable<Error> read_header(Parser& parser) = 0;
  /// Reads at least one byte of the body into the buffer that the parser's message names.
  virtual Awaitable<Error> read_some(Parser& parser) = 0;

 protected:
  HttpConnection() = default;
};

}  // namespace hadal::load
