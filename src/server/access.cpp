#include "server/access.h"

#include "base/check.h"
#include "server/http_text.h"
#include "server/json_reader.h"

namespace hadal::server {
namespace {

/// Pages ask rarely, so a browser may remember the answer for a while.
constexpr const char* kMaxAge = "600";

std::string_view authority_of(std::string_view origin) {
  const size_t scheme = origin.find("://");
  return scheme == std::string_view::npos ? origin : origin.substr(scheme + 3);
}

}  // namespace

Access::Access(const ServerOptions& options) : loopback_(is_loopback_name(options.host)) {
  for (const std::string& given : options.cors) {
    if (given == "*") {
      all_origins_ = true;
      continue;
    }
    const std::string origin = lower_case(given);
    HADAL_INPUT_CHECK(
        origin == "null" || (origin.find("://") != std::string::npos &&
                             authority_of(origin).find_first_of("/?#") == std::string_view::npos &&
                             !authority_of(origin).empty()),
        "--cors: expected an origin such as https://example.org, or *, found ", given);
    origins_.insert(origin);
    hosts_.insert(host_of(authority_of(origin)));
  }
  for (const std::string& host : options.allowed_hosts) hosts_.insert(host_of(host));
}

bool Access::is_allowed(std::string_view origin) const {
  return all_origins_ || origins_.contains(lower_case(origin));
}

void Access::check(const HttpRequest& request) const {
  if (!loopback_) return;
  // HTTP/1.0 may come without a Host, but browsers do not speak it.
  const std::string_view authority = request.header("host");
  const std::string host = host_of(authority);
  if (!authority.empty() && !is_loopback_name(host) && !hosts_.contains(host))
    throw RequestError(403,
                       concat("the host '", host.substr(0, 100),
                              "' is none of this machine's; --allow-host allows it"),
                       "", "host_not_allowed");
  const std::string_view origin = request.header("origin");
  if (origin.empty() || is_allowed(origin)) return;
  const bool from_here = origin != "null" && is_loopback_name(host_of(authority_of(origin)));
  if (from_here || (origin != "null" && same_letters(authority_of(origin), authority))) return;
  throw RequestError(403,
                     concat("pages of '", origin.substr(0, 100),
                            "' may not ask this server; --cors ORIGIN allows it"),
                     "", "origin_not_allowed");
}

std::optional<HttpResponse> Access::preflight(const HttpRequest& request) const {
  if (request.method != "OPTIONS" || request.header("access-control-request-method").empty() ||
      request.header("origin").empty() || !is_allowed(request.header("origin")))
    return {};
  HttpResponse response;
  response.content_type.clear();
  const std::string_view wanted = request.header("access-control-request-headers");
  response.headers = {{"Access-Control-Allow-Methods", "GET, HEAD, POST, DELETE, OPTIONS"},
                      {"Access-Control-Allow-Headers", wanted.empty() ? "*" : std::string(wanted)},
                      {"Access-Control-Max-Age", kMaxAge}};
  if (request.header("access-control-request-private-network") == "true")
    response.headers.emplace_back("Access-Control-Allow-Private-Network", "true");
  return response;
}

std::vector<std::pair<std::string, std::string>> Access::headers(const HttpRequest& request) const {
  const std::string_view origin = request.header("origin");
  if (!all_origins_ && origins_.empty()) return {};
  // Whoever keeps answers must keep them by origin, also those that say nothing.
  if (origin.empty() || !is_allowed(origin)) return {{"Vary", "Origin"}};
  return {{"Access-Control-Allow-Origin", std::string(origin)},
          {"Access-Control-Expose-Headers", "x-request-id, request-id, retry-after"},
          {"Vary", "Origin"}};
}

}  // namespace hadal::server
