// The http and https addresses that a client may be given.
#pragma once

#include <cstdint>
#include <string>

namespace hadal::server {

struct Url {
  bool tls = false;
  std::string host;  ///< a name or address; IPv6 without brackets
  uint16_t port = 80;
  std::string path;  ///< begins with / or is empty; never ends with /

  /// "http://host[:port][/path]" or https; an InputError that begins with `name` for anything else,
  /// user names, queries and fragments included.
  static Url parse(const std::string& text, const std::string& name);

  /// Host and, where it is not the scheme's own, port: what a Host header holds.
  std::string authority() const;
  std::string str() const;
};

}  // namespace hadal::server
