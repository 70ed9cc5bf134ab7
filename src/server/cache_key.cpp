#include "server/cache_key.h"

#include <algorithm>
#include <optional>

namespace hadal::server {
namespace {

using std::chrono::hours;
using std::chrono::minutes;
using std::chrono::seconds;

constexpr size_t kLongestName = 1024;

/// The longest time that a mark on this object or inside it asks for. `path` names it.
void look_for_marks(const Json& value, const std::string& path, std::optional<seconds>& longest) {
  if (value.is_array()) {
    for (size_t i = 0; i < value.items().size(); ++i)
      look_for_marks(value.items()[i], concat(path, "[", i, "]"), longest);
    return;
  }
  if (!value.is_object()) return;
  const Fields fields(value, path);
  // Blocks of a tool's result are marked, too.
  if (const Json* content = fields.find("content"))
    look_for_marks(*content, fields.path("content"), longest);
  if (!fields.has("cache_control")) return;
  const Fields mark = fields.object("cache_control");
  if (mark.string_or("type", "ephemeral") != "ephemeral")
    mark.fail("type", "expected \"ephemeral\"");
  const std::string time = mark.string_or("ttl", "5m");
  if (time != "5m" && time != "1h") mark.fail("ttl", "expected \"5m\" or \"1h\"");
  const seconds wanted = time == "1h" ? seconds(hours(1)) : seconds(minutes(5));
  longest = std::max(longest.value_or(wanted), wanted);
}

}  // namespace

engine_core::CacheKey read_cache_key(const Fields& body) {
  engine_core::CacheKey key;
  for (const std::string_view field : {"prompt_cache_key", "session_id"}) {
    const std::string name = body.string_or(field, "");
    if (name.size() > kLongestName)
      body.fail(field, concat(name.size(), " bytes, expected at most ", kLongestName));
    if (key.name.empty() && !name.empty()) key.name = concat(field, " ", name);
  }
  const std::string retention = body.string_or("prompt_cache_retention", "in_memory");
  if (retention == "24h") {
    key.retention = hours(24);
  } else if (retention != "in_memory" && retention != "in-memory") {
    body.fail("prompt_cache_retention", "expected \"in_memory\" or \"24h\"");
  }
  return key;
}

engine_core::CacheKey read_cache_marks(const Fields& body, const std::vector<Json>& messages) {
  std::optional<seconds> retention;
  for (const std::string_view holder : {"system", "tools", "messages"}) {
    if (const Json* value = body.find(holder)) look_for_marks(*value, body.path(holder), retention);
  }
  // On the request itself: up to its last block.
  look_for_marks(Json::object({{"cache_control",
                                body.has("cache_control") ? *body.find("cache_control") : Json()}}),
                 "", retention);
  engine_core::CacheKey key;
  if (!retention) return key;
  key.retention = *retention;
  key.name = "conversation ";
  if (const Json* metadata = body.find("metadata"); metadata != nullptr && metadata->is_object())
    key.name += Fields(*metadata, "metadata").string_or("user_id", "").substr(0, kLongestName);
  for (const Json& message : messages) {
    const std::string text = message.dump();
    key.name += concat(" ", text.size(), " ", std::hash<std::string>{}(text));
    if (message.find("role")->text() != "system") break;
  }
  return key;
}

}  // namespace hadal::server
