// The names under which clients ask to keep a prompt: fields of OpenAI's APIs, marks in
// Anthropic's.
#pragma once

#include "engine_core/request.h"
#include "server/json_reader.h"

namespace hadal::server {

/// prompt_cache_key or session_id, and prompt_cache_retention ("in_memory": an hour, "24h").
engine_core::CacheKey read_cache_key(const Fields& body);

/// A request of /v1/messages with cache_control anywhere: its conversation is the key, known by how
/// it begins (`messages` as the model sees them: the system's text and the first turn) and by
/// metadata.user_id. Kept for the longest "ttl" of the marks ("5m", "1h"). Without marks: no name.
engine_core::CacheKey read_cache_marks(const Fields& body, const std::vector<Json>& messages);

}  // namespace hadal::server
