#include "server/http_message.h"

#include <ctime>

#include "base/check.h"
#include "server/http_text.h"

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

namespace http = boost::beast::http;
using boost::system::error_code;

HttpRequest head_of_request(const RequestParser& parser) {
  const http::request<http::string_body>& message = parser.get();
  HttpRequest request;
  const auto copy = [](auto view) { return std::string(view.data(), view.size()); };
  request.method = copy(message.method_string());
  HttpTarget target = split_target(copy(message.target()));
  request.path = std::move(target.path);
  request.query = std::move(target.query);
  for (const auto& field : message) {
    // What a whole URI says goes before the Host header (RFC 9112, 3.2.2).
    if (!target.authority.empty() && field.name() == http::field::host) continue;
    std::string name = copy(field.name_string());
    for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
    request.headers.emplace_back(std::move(name), copy(field.value()));
  }
  if (!target.authority.empty()) request.headers.emplace_back("host", std::move(target.authority));
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

}  // namespace hadal::server
