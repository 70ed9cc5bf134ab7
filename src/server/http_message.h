// HTTP messages as Beast parses them: what is refused, and how answers begin. Private to http.cpp
// and its connections, the only files that include Beast.
#pragma once

// Boost's assertions fail the connection, not the server: assertion_failed() in http_message.cpp.
#ifndef BOOST_ENABLE_ASSERT_HANDLER
#define BOOST_ENABLE_ASSERT_HANDLER
#endif

#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <string>
#include <string_view>

#include "server/http.h"

namespace hadal::server {

using RequestParser = boost::beast::http::request_parser<boost::beast::http::string_body>;

void set_limits(RequestParser& parser, const ServerOptions& options);
/// The request of a parser whose header is done, without its body. Taken then, since the parser
/// adds a chunked body's trailer fields to the header: they would pass what was checked before
/// the body was read (RFC 9110, 6.5.1: a recipient may ignore them, and hadal does).
HttpRequest head_of_request(const RequestParser& parser);
/// The status for bytes that are no request, and its message.
int status_of(const boost::system::error_code& error);
const char* reason_of(int status);
/// Why nothing behind this header is read, or null: its framing is ambiguous, or whom it asks.
const char* suspicion(const RequestParser& parser);

/// Status line and headers; `framing` says how the body ends.
std::string head_of(const HttpResponse& response,
                    bool keep_alive,
                    std::string_view framing,
                    bool dated);

}  // namespace hadal::server
