// Headers that every answer to a request carries, whoever makes it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/http.h"

namespace hadal::server {

/// Passes everything on to `inner`, with `headers` added to the answer's head where it does not set
/// them itself.
std::shared_ptr<Responder> with_headers(std::shared_ptr<Responder> inner,
                                        std::vector<std::pair<std::string, std::string>> headers);

}  // namespace hadal::server
