// The web page of `hadal serve`: src/server/page/index.html, embedded by cmake/embed_page.cmake.
//
// The page is one ASCII file with inline styles and exactly one inline script; it loads nothing
// else and talks to its own origin only, so that it lives under
//   Content-Security-Policy: default-src 'self'; script-src '<page_script_hash()>'; style-src
//   'unsafe-inline'
#pragma once

#include <string_view>

namespace hadal::server {

/// The bytes of the page, to be sent as text/html; charset=utf-8. They live as long as the program.
std::string_view page();

/// "sha256-" and the base64 of the SHA-256 of the page's inline script, without the policy's
/// quotes.
std::string_view page_script_hash();

}  // namespace hadal::server
