// A server on loopback in front of a scripted engine, for tests of what clients see.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/json_reader.h"
#include "server/server.h"
#include "testing/loopback_client.h"
#include "testing/scripted_engine.h"
#include "testing/tiny_tokenizer.h"

namespace hadal::testing {

/// One SSE event of an answer.
struct ServerEvent {
  std::string name;
  text::PyJson data;
};

class ScriptedService {
 public:
  /// The engine says `answer`, which may be changed between requests.
  explicit ScriptedService(server::ServerOptions options = {},
                           ScriptedEngineOptions engine_options = {.max_context = 1 << 20})
      : tokenizer(text::Tokenizer::from_json(byte_tokenizer_json(), "tiny")),
        engine(
            tokenizer,
            [this](const engine_core::Request&, int64_t) { return answer; },
            engine_options) {
    options.port = 0;
    server.emplace(engine, tokenizer, options);
    server->start();
  }
  LoopbackClient client() { return LoopbackClient(server->port()); }
  Reply post(std::string_view path, std::string_view body, std::string_view headers = "") {
    return client().post(path, body, headers);
  }
  Reply get(std::string_view path, std::string_view headers = "") {
    return client().get(path, headers);
  }
  /// The answer of bytes as they are.
  Reply raw(std::string_view bytes) {
    LoopbackClient connection = client();
    connection.send(bytes);
    return connection.receive();
  }
  /// The prompt of the last request, as text.
  std::string prompt() const {
    const std::vector<int64_t> tokens = prompt_tokens();
    return tokenizer.decode(std::vector<int32_t>(tokens.begin(), tokens.end()));
  }
  std::vector<int64_t> prompt_tokens() const {
    const auto requests = engine.requests();
    return requests.empty() ? std::vector<int64_t>() : requests.back().prompt;
  }

  std::string answer = "Hello!";
  text::Tokenizer tokenizer;
  ScriptedEngine engine;
  std::optional<server::Server> server;
};

inline text::PyJson parsed(const Reply& reply) {
  return text::PyJson::parse(reply.body, "answer " + std::to_string(reply.status));
}

/// The events of a stream.
inline std::vector<ServerEvent> events_of(const Reply& reply) {
  std::vector<ServerEvent> events;
  std::string name;
  for (size_t from = 0; from < reply.body.size();) {
    const size_t end = std::min(reply.body.find('\n', from), reply.body.size());
    const std::string line = reply.body.substr(from, end - from);
    from = end + 1;
    if (line.starts_with("event: ")) name = line.substr(7);
    if (line.starts_with("data: ") && line != "data: [DONE]")
      events.push_back({std::exchange(name, ""), text::PyJson::parse(line.substr(6), "event")});
  }
  return events;
}

/// The value at a path such as "choices.0.message.content", as JSON text; "nothing" without one.
inline std::string value_at(const text::PyJson& json, const std::string& path) {
  const text::PyJson* value = &json;
  for (size_t from = 0; from <= path.size();) {
    const size_t end = std::min(path.find('.', from), path.size());
    const std::string key = path.substr(from, end - from);
    from = end + 1;
    if (value->is_array()) {
      const size_t index = static_cast<size_t>(std::stoul(key));
      if (index >= value->items().size()) return "nothing";
      value = &value->items()[index];
    } else {
      value = value->find(key);
      if (value == nullptr) return "nothing";
    }
  }
  return value->is_string() ? value->text() : value->dump();
}

}  // namespace hadal::testing
