// From where the server may be asked: the hosts that it answers for and the pages that may call it.
//
// A server on loopback is meant for this machine, but any page in its browser can send requests to
// it, and a name that an attacker points to 127.0.0.1 makes that page one of "ours". So there the
// Host must be this machine's or named by the operator (ServerOptions::allowed_hosts), and the
// Origin, which only browsers send, too (ServerOptions::cors). Elsewhere keys decide. What a page
// may read is another question: without `cors` no answer carries the headers that allow it.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/http.h"

namespace hadal::server {

class Access {
 public:
  /// Errors: InputError where an origin is no origin.
  explicit Access(const ServerOptions& options);

  /// Errors: RequestError 403.
  void check(const HttpRequest& request) const;
  /// The answer to a browser's question before the request, where it is one of an allowed page.
  std::optional<HttpResponse> preflight(const HttpRequest& request) const;
  /// What tells the browser that the page may read the answer; empty where it may not.
  std::vector<std::pair<std::string, std::string>> headers(const HttpRequest& request) const;

 private:
  bool is_allowed(std::string_view origin) const;

  bool loopback_, all_origins_ = false;
  std::set<std::string, std::less<>> origins_, hosts_;
};

}  // namespace hadal::server
