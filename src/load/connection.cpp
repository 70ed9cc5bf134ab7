#include "load/connection.h"

#include <boost/asio/ssl/host_name_verification.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/stream_traits.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/write.hpp>
#include <boost/beast/ssl.hpp>
#include <type_traits>

namespace hadal::load {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using TlsStream = beast::ssl_stream<beast::tcp_stream>;

constexpr size_t kBuffer = size_t{64} << 10, kSlowBuffer = size_t{8} << 10;
constexpr int kSlowReceiveBuffer = 4 << 10;

template <typename Stream>
class StreamConnection : public HttpConnection {
 public:
  template <typename... Arguments>
  StreamConnection(const std::string& host, bool slow, Arguments&... arguments)
      : host_(host), slow_(slow), stream_(arguments...), buffer_(slow ? kSlowBuffer : kBuffer) {}

  void set_deadline(std::chrono::steady_clock::time_point deadline) override {
    beast::get_lowest_layer(stream_).expires_at(deadline);
  }

  Awaitable<Error> connect(const tcp::endpoint& to) override {
    Error error;
    tcp::socket& socket = beast::get_lowest_layer(stream_).socket();
    error = socket.open(to.protocol(), error);
    if (error) co_return error;
    if (slow_)
      error = socket.set_option(asio::socket_base::receive_buffer_size(kSlowReceiveBuffer), error);
    co_await beast::get_lowest_layer(stream_).async_connect(
        to, asio::redirect_error(asio::use_awaitable, error));
    if (error) co_return error;
    error = socket.set_option(tcp::no_delay(true), error);
    if constexpr (std::is_same_v<Stream, TlsStream>) {
      if (SSL_set_tlsext_host_name(stream_.native_handle(), host_.c_str()) != 1)
        co_return Error(asio::error::invalid_argument);
      stream_.set_verify_callback(asio::ssl::host_name_verification(host_), error);
      if (error) co_return error;
      co_await stream_.async_handshake(asio::ssl::stream_base::client,
                                       asio::redirect_error(asio::use_awaitable, error));
    }
    co_return error;
  }

  Awaitable<Error> write(const Request& request) override {
    Error error;
    co_await http::async_write(stream_, request, asio::redirect_error(asio::use_awaitable, error));
    co_return error;
  }
  Awaitable<Error> read_header(Parser& parser) override {
    Error error;
    co_await http::async_read_header(stream_, buffer_, parser,
                                     asio::redirect_error(asio::use_awaitable, error));
    co_return error;
  }
  Awaitable<Error> read_some(Parser& parser) override {
    Error error;
    co_await http::async_read_some(stream_, buffer_, parser,
                                   asio::redirect_error(asio::use_awaitable, error));
    // The message's buffer is full: its owner empties it and goes on.
    if (error == http::error::need_buffer) error = {};
    co_return error;
  }

 private:
  std::string host_;
  bool slow_;
  Stream stream_;
  beast::flat_buffer buffer_;
};

}  // namespace

std::unique_ptr<HttpConnection> HttpConnection::make(asio::io_context& io,
                                                     asio::ssl::context* tls,
                                                     const std::string& host,
                                                     bool slow) {
  if (tls != nullptr) return std::make_unique<StreamConnection<TlsStream>>(host, slow, io, *tls);
  return std::make_unique<StreamConnection<beast::tcp_stream>>(host, slow, io);
}

}  // namespace hadal::load
