// A connection's stream without a socket: bytes are put in and taken out, for tests and fuzzing.
//
// What http.cpp asks of a beast::tcp_stream and of its socket; timeouts never expire. One thread.
#pragma once

#include <boost/asio/async_result.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <memory>
#include <string>
#include <utility>

namespace hadal::server {

class MemoryStream {
 public:
  // Asio asks for these names.
  // NOLINTBEGIN(readability-identifier-naming)
  using error_code = boost::system::error_code;
  using executor_type = boost::asio::io_context::executor_type;
  // NOLINTEND(readability-identifier-naming)

  explicit MemoryStream(boost::asio::io_context& io) : io_(io) {}
  executor_type get_executor() { return io_.get_executor(); }

  /// The other side's: more input; the end of it; what was written so far.
  void feed(std::string_view bytes) {
    input_ += bytes;
    serve_read();
  }
  void end_input() {
    ended_ = true;
    serve_read();
  }
  const std::string& output() const { return output_; }
  bool is_open() const { return open_; }

  template <typename Buffers, typename Handler>
  auto async_read_some(const Buffers& buffers, Handler&& handler) {
    return boost::asio::async_initiate<Handler, void(error_code, size_t)>(
        [this](auto done, const Buffers& target) {
          read_ = std::make_unique<Read<decltype(done), Buffers>>(std::move(done), target);
          serve_read();
        },
        handler, buffers);
  }
  template <typename Buffers, typename Handler>
  auto async_write_some(const Buffers& buffers, Handler&& handler) {
    return boost::asio::async_initiate<Handler, void(error_code, size_t)>(
        [this](auto done, const Buffers& source) {
          const size_t count = boost::asio::buffer_size(source);
          const size_t before = output_.size();
          output_.resize(before + count);
          boost::asio::buffer_copy(boost::asio::buffer(output_.data() + before, count), source);
          boost::asio::post(
              io_, [done = std::move(done), count]() mutable { done(error_code(), count); });
        },
        handler, buffers);
  }

  template <typename Duration>
  void expires_after(Duration) {}
  void expires_never() {}
  void cancel() { finish_read(boost::asio::error::operation_aborted, 0); }

  // The socket of it.
  MemoryStream& socket() { return *this; }
  void shutdown(boost::asio::ip::tcp::socket::shutdown_type, error_code&) {}
  void close(error_code&) {
    open_ = false;
    cancel();
  }

 private:
  struct Pending {
    virtual ~Pending() = default;
    virtual size_t fill(std::string_view input) = 0;
    virtual void complete(boost::asio::io_context& io, error_code error, size_t count) = 0;
  };
  template <typename Done, typename Buffers>
  struct Read final : Pending {
    Read(Done d, const Buffers& b) : done(std::move(d)), buffers(b) {}
    size_t fill(std::string_view input) override {
      return boost::asio::buffer_copy(buffers, boost::asio::buffer(input.data(), input.size()));
    }
    void complete(boost::asio::io_context& io, error_code error, size_t count) override {
      boost::asio::post(io, [d = std::move(done), error, count]() mutable { d(error, count); });
    }
    Done done;
    Buffers buffers;
  };

  void serve_read() {
    if (read_ == nullptr) return;
    if (!open_) return finish_read(boost::asio::error::operation_aborted, 0);
    if (input_.empty()) {
      if (ended_) finish_read(boost::asio::error::eof, 0);
      return;
    }
    const size_t count = read_->fill(input_);
    input_.erase(0, count);
    finish_read(error_code(), count);
  }
  void finish_read(error_code error, size_t count) {
    if (const auto read = std::exchange(read_, nullptr)) read->complete(io_, error, count);
  }

  boost::asio::io_context& io_;
  std::string input_, output_;
  std::unique_ptr<Pending> read_;
  bool ended_ = false, open_ = true;
};

}  // namespace hadal::server
