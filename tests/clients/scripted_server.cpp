// Serves a scripted engine until its input ends: `scripted_server [PORT]` prints the address.
// What the script answers follows from the prompt, so that clients can ask for every kind.
#include <charconv>
#include <cstdio>
#include <iostream>
#include <string>

#include "server/server.h"
#include "testing/scripted_engine.h"
#include "testing/tiny_tokenizer.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace {

using hadal::engine::Grammar;

std::string answer(const hadal::text::Tokenizer& tokenizer,
                   const hadal::engine::Request& request,
                   int64_t choice) {
  std::vector<int32_t> ids(request.prompt.begin(), request.prompt.end());
  const std::string prompt = tokenizer.decode(ids);
  std::string out;
  if (request.thinking) out = "Let me think.</think>";
  const std::string call = hadal::text::write_tool_calls(
      std::vector<hadal::text::ToolCall>{{"get_weather", R"({"city": "Paris", "days": 2})"}});
  const std::string invoke(hadal::text::dsml::kInvoke);
  if (prompt.ends_with(invoke)) return call.substr(call.find(invoke) + invoke.size());
  if (const std::string named = invoke + " name=\"get_weather\">\n"; prompt.ends_with(named))
    return call.substr(call.find(named) + named.size());
  const bool has_result = prompt.rfind("<tool_result>") != std::string::npos;
  if (prompt.find("### Available Tool Schemas") != std::string::npos && !has_result)
    return out + "I look it up.\n\n" + call;
  if (request.grammar.kind == Grammar::Kind::kJsonSchema ||
      request.grammar.kind == Grammar::Kind::kJsonObject)
    return out + R"({"city": "Paris", "population": 2100000})";
  return out + "Hello from choice " + std::to_string(choice) + ": \xc3\xa4\xe2\x82\xac!";
}

}  // namespace

int main(int argc, char** argv) {
  const auto tokenizer =
      hadal::text::Tokenizer::from_json(hadal::testing::byte_tokenizer_json(), "tiny");
  hadal::testing::ScriptedEngineOptions engine_options;
  engine_options.step = std::chrono::microseconds(500);
  hadal::testing::ScriptedEngine engine(
      tokenizer,
      [&](const auto& request, int64_t choice) { return answer(tokenizer, request, choice); },
      engine_options);
  hadal::server::ServerOptions options;
  options.port = 0;
  options.api_keys = {"test-key"};
  if (argc > 1) {
    const std::string port = argv[1];
    std::from_chars(port.data(), port.data() + port.size(), options.port);
  }
  hadal::server::Server server(engine, tokenizer, options);
  server.start();
  std::cout << "http://127.0.0.1:" << server.port() << std::endl;
  std::string line;
  while (std::getline(std::cin, line)) {
  }
  server.stop();
  return 0;
}
