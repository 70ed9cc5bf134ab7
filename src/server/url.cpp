#include "server/url.h"

#include <algorithm>
#include <charconv>
#include <string_view>

#include "base/check.h"

namespace hadal::server {
namespace {

constexpr uint16_t default_port(bool tls) { return tls ? 443 : 80; }

bool plain(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

}  // namespace

Url Url::parse(const std::string& text, const std::string& name) {
  const auto refuse = [&](const char* why) {
    throw InputError(concat(name, ": expected http://host:port, found ", text, " (", why, ")"));
  };
  Url url;
  std::string_view rest = text;
  if (rest.starts_with("http://")) {
    rest.remove_prefix(7);
  } else if (rest.starts_with("https://")) {
    url.tls = true;
    rest.remove_prefix(8);
  } else {
    refuse("no http:// or https:// in front");
  }
  if (!plain(rest)) refuse("spaces or characters beyond ASCII");
  if (rest.find_first_of("@?#") != std::string_view::npos)
    refuse("user names, queries and fragments are not taken");
  const size_t slash = rest.find('/');
  std::string_view authority = rest.substr(0, slash);
  if (slash != std::string_view::npos) url.path = rest.substr(slash);
  while (url.path.ends_with('/')) url.path.pop_back();

  size_t colon = authority.rfind(':');
  if (authority.starts_with('[')) {
    const size_t bracket = authority.find(']');
    if (bracket == std::string_view::npos) refuse("a bracket without its other half");
    url.host = authority.substr(1, bracket - 1);
    authority.remove_prefix(bracket + 1);
    if (!authority.empty() && authority.front() != ':') refuse("text behind the bracket");
    colon = authority.empty() ? std::string_view::npos : 0;
  } else {
    url.host = authority.substr(0, colon);
    if (url.host.find(':') != std::string::npos) refuse("IPv6 addresses stand in brackets");
  }
  if (url.host.empty()) refuse("no host");
  url.port = default_port(url.tls);
  if (colon != std::string_view::npos) {
    const std::string_view digits = authority.substr(colon + 1);
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), url.port);
    if (error != std::errc() || end != digits.data() + digits.size() || url.port == 0)
      refuse("the port is no number from 1 to 65535");
  }
  return url;
}

std::string Url::authority() const {
  const std::string name = host.find(':') == std::string::npos ? host : concat("[", host, "]");
  return port == default_port(tls) ? name : concat(name, ":", port);
}

std::string Url::str() const { return concat(tls ? "https://" : "http://", authority(), path); }

}  // namespace hadal::server
