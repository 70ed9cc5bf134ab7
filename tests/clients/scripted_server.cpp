// Serves a scripted engine until its input ends: `scripted_server [PORT]` prints the address.
// What the script answers follows from the prompt, so that clients can ask for every kind: the
// first tool that is offered is called once, a schema is filled with the plainest values, and
// everything else is greeted.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "server/server.h"
#include "testing/scripted_engine.h"
#include "testing/tiny_tokenizer.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace {

using hadal::engine_core::Grammar;
using json = nlohmann::ordered_json;

/// A value that fits a schema as clients write them.
json filled(const json& schema, const json& root, int depth = 0) {
  if (!schema.is_object() || depth > 16) return "Paris";
  if (const auto reference = schema.find("$ref"); reference != schema.end()) {
    const std::string path = reference->get<std::string>();
    return path.starts_with("#")
               ? filled(root.at(json::json_pointer(path.substr(1))), root, depth + 1)
               : json("Paris");
  }
  if (schema.contains("const")) return schema["const"];
  if (schema.contains("enum")) return schema["enum"].at(0);
  for (const char* key : {"anyOf", "oneOf", "allOf"}) {
    if (schema.contains(key)) return filled(schema[key].at(0), root, depth + 1);
  }
  json type = schema.value("type", json(schema.contains("properties") ? "object" : "string"));
  if (type.is_array()) type = type.at(0);
  if (type == "integer") return 2;
  if (type == "number") return 2.5;
  if (type == "boolean") return true;
  if (type == "null") return nullptr;
  if (type == "array")
    return json::array({filled(schema.value("items", json::object()), root, depth + 1)});
  if (type != "object") return "Paris";
  json object = json::object();
  const json properties = schema.value("properties", json::object());
  for (const auto& [name, value] : properties.items()) {
    const json required = schema.value("required", json::array());
    if (std::find(required.begin(), required.end(), name) != required.end())
      object[name] = filled(value, root, depth + 1);
  }
  return object;
}

/// The tools that a prompt offers: {"name", "parameters"} a line.
std::vector<json> tools_of(const std::string& prompt) {
  constexpr std::string_view kHead = "### Available Tool Schemas\n\n";
  std::vector<json> tools;
  const size_t from = prompt.find(kHead);
  if (from == std::string::npos) return tools;
  std::istringstream lines(prompt.substr(from + kHead.size()));
  for (std::string line; std::getline(lines, line) && line.starts_with('{');)
    tools.push_back(json::parse(line));
  return tools;
}

std::string call_of(const json& tool) {
  const json parameters = tool.value("parameters", json::object());
  json arguments = filled(parameters, parameters);
  if (!arguments.is_object()) arguments = json::object();
  return hadal::text::write_tool_calls(
      std::vector<hadal::text::ToolCall>{{tool.at("name").get<std::string>(), arguments.dump()}});
}

/// The tool to call: the first that is allowed, behind a result one that is there to bring the end
/// (as frameworks name it); behind a result none where none must be called.
const json* tool_to_call(const std::vector<json>& tools,
                         const std::string& prompt,
                         const Grammar& grammar) {
  const bool forced = grammar.kind == Grammar::Kind::kToolCalls && grammar.must_call;
  json allowed = forced ? json::parse(grammar.text) : json(tools);
  if (allowed.is_object()) allowed = allowed.at("tools");
  const bool has_result = prompt.find("<tool_result>") != std::string::npos;
  const json* first = nullptr;
  for (const json& one : allowed) {
    const auto tool = std::ranges::find_if(
        tools, [&](const json& offered) { return offered.at("name") == one.at("name"); });
    if (tool == tools.end()) continue;
    if (has_result && tool->at("name").get<std::string>().starts_with("final")) return &*tool;
    if (first == nullptr) first = &*tool;
  }
  return has_result && !forced ? nullptr : first;
}

std::string answer(const hadal::text::Tokenizer& tokenizer,
                   const hadal::engine_core::Request& request,
                   int64_t choice) {
  std::vector<int32_t> ids(request.prompt.begin(), request.prompt.end());
  const std::string prompt = tokenizer.decode(ids);
  std::string out;
  if (request.thinking) out = "Let me think.</think>";
  const std::vector<json> tools = tools_of(prompt);
  // Where the prompt ends with a call's opening, the answer goes on from it.
  const std::string invoke(hadal::text::dsml::kInvoke);
  for (const json& tool : tools) {
    const std::string call = call_of(tool);
    const std::string named = invoke + " name=\"" + tool.at("name").get<std::string>() + "\">\n";
    if (prompt.ends_with(named)) return call.substr(call.find(named) + named.size());
    if (prompt.ends_with(invoke)) return call.substr(call.find(invoke) + invoke.size());
  }
  const Grammar& grammar = request.grammar;
  if (const json* tool = tool_to_call(tools, prompt, grammar)) {
    const bool forced = grammar.kind == Grammar::Kind::kToolCalls && grammar.must_call;
    return out + (forced ? "" : "I look it up.\n\n") + call_of(*tool);
  }
  if (grammar.kind == Grammar::Kind::kJsonSchema) {
    const json schema = json::parse(grammar.text);
    return out + filled(schema, schema).dump();
  }
  if (grammar.kind == Grammar::Kind::kJsonObject) return out + R"({"city": "Paris"})";
  return out + "Hello from choice " + std::to_string(choice) + ": \xc3\xa4\xe2\x82\xac!";
}

}  // namespace

int main(int argc, char** argv) {
  const auto tokenizer =
      hadal::text::Tokenizer::from_json(hadal::testing::byte_tokenizer_json(), "tiny");
  hadal::testing::ScriptedEngineOptions engine_options;
  engine_options.step = std::chrono::microseconds(500);
  engine_options.max_context = 1 << 17;
  hadal::testing::ScriptedEngine engine(
      tokenizer,
      [&](const auto& request, int64_t choice) { return answer(tokenizer, request, choice); },
      engine_options);
  hadal::server::ServerOptions options;
  options.port = 0;
  options.api_keys = {"test-key"};
  options.model_aliases = {"claude-scripted"};  // some clients know an API by its models' names
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
