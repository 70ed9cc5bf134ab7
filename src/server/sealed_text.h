// Text that a client keeps for the server: its own reasoning, where the client is not to show it.
//
// The seal is no secret and proves nothing, since a client may send any reasoning in plain as well.
// It only tells what this server wrote from what others did, and whole texts from cut ones.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace hadal::server {

std::string seal_text(std::string_view text);
/// What seal_text() was given; nothing for other texts.
std::optional<std::string> unseal_text(std::string_view sealed);

}  // namespace hadal::server
