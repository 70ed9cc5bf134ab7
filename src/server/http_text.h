// Small texts of HTTP: request targets, dates, escapes, names of hosts.
#pragma once

#include <ctime>
#include <string>
#include <string_view>

namespace hadal::server {

/// A request target taken apart. The authority is empty unless the target is a whole URI
/// ("absolute-form"), as proxies are sent it.
struct HttpTarget {
  std::string authority, path, query;  ///< as sent, the query without '?'
};
HttpTarget split_target(std::string_view target);

/// "Sun, 06 Nov 1994 08:49:37 GMT": the form of the Date header, whatever the locale.
std::string http_date(std::time_t seconds);

/// %XX as bytes; what is no escape stays as it is.
std::string percent_decoded(std::string_view text);

bool same_letters(std::string_view a, std::string_view b);  ///< ignoring the case of A to Z
std::string lower_case(std::string_view text);              ///< of A to Z

/// The host of "host", "host:port" or "[host]:port", in lower case and without brackets.
std::string host_of(std::string_view authority);
/// "localhost", a name under it, or a loopback address (without brackets).
bool is_loopback_name(std::string_view host);

}  // namespace hadal::server
