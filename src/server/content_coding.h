// Bodies that clients sent compressed.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace hadal::server {

/// The body that a Content-Encoding stands for: gzip, deflate, zstd or identity, several in a row
/// undone from the last to the first. Errors: RequestError 415 for other codings, 400 for a body
/// that is damaged or cut, 413 where more than `limit` bytes come out.
std::string decoded_body(std::string_view codings, std::string body, size_t limit);

}  // namespace hadal::server
