// libFuzzer target: any body of any route is answered exactly once, by an answer or by an API's own
// error, never by 500. The first byte, a digit in the seeds, picks the route; the rest is the body.
// Most inputs are made from JSON: from one known already or from a seed, so that many are accepted.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "base/log.h"
#include "server/api.h"
#include "testing/json_mutator.h"
#include "testing/scripted_engine.h"
#include "testing/tiny_tokenizer.h"
#include "text/tool_calls.h"

namespace {

using hadal::server::HttpResponse;

constexpr std::array<const char*, 7> kPaths = {
    "/v1/chat/completions",      "/v1/completions", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/tokenize",       "/detokenize"};

class Recorder final : public hadal::server::Responder {
 public:
  /// Behind what is under way, as on a connection's strand.
  void post(std::function<void()> work) override { posted.push_back(std::move(work)); }
  void run() {
    for (; !posted.empty(); posted.pop_front()) posted.front()();
  }
  void send(HttpResponse response) override {
    status = response.status;
    body = std::move(response.body);
    ++ended;
  }
  void begin_stream(HttpResponse head) override {
    status = head.status;
    streamed = true;
  }
  void write(std::string bytes) override { body += bytes; }
  void end_stream() override { ++ended; }
  void when_silent(std::chrono::milliseconds, std::function<void()>) override {}
  void on_close(std::function<void()>) override {}
  int status = 0, ended = 0;
  bool streamed = false;
  std::string body;
  std::deque<std::function<void()>> posted;
};

hadal::server::ServerOptions on_one_thread() {
  hadal::server::ServerOptions options;
  options.grammar_threads = 0;
  return options;
}

struct World {
  World()
      : options(on_one_thread()),
        tokenizer(hadal::text::Tokenizer::from_json(
            // Few tokens an answer: what is fuzzed is the request.
            hadal::testing::byte_tokenizer_json({call()}),
            "tiny")),
        engine(tokenizer, answer, {.max_context = 2048, .inline_steps = true}),
        api(engine, tokenizer, options) {
    hadal::log::set_level(hadal::log::Level::kError);
  }
  /// How deep the inputs went.
  ~World() {
    for (size_t i = 0; i < kPaths.size(); ++i)
      std::fprintf(stderr, "reached: %s: %ld of %ld answered 200, %ld streams\n", kPaths[i],
                   counts[i].good, counts[i].all, counts[i].streams);
  }
  static const std::string& call() {
    static const std::string text =
        "\n\n" + hadal::text::write_tool_calls(
                     std::vector<hadal::text::ToolCall>{{"f", R"({"a": "b", "c": [1.5]})"}});
    return text;
  }
  static std::string answer(const hadal::engine_core::Request& request, int64_t choice) {
    std::string text = request.thinking ? "so</think>" : "";
    if (request.prompt.size() % 3 == 1) return text + "ok" + call();
    return text + (choice == 1 ? "<think>" : "fine");
  }
  struct Count {
    long all = 0, good = 0, streams = 0;
  };
  std::array<Count, kPaths.size()> counts;
  hadal::server::ServerOptions options;
  hadal::text::Tokenizer tokenizer;
  hadal::testing::ScriptedEngine engine;
  hadal::server::Api api;
};

// clang-format off
constexpr std::string_view kKeys[] = {
    "add_generation_prompt", "add_special_tokens", "allowed_tools", "arguments", "best_of",
    "budget_tokens", "call_id", "chat_template_kwargs", "choice", "content",
    "continue_final_message", "custom", "definition", "description", "enable_thinking", "enabled",
    "encrypted_content", "guided_choice", "guided_json", "include", "min_tokens", "mode",
    "namespace", "prompt_logprobs", "return_token_ids", "stop_token_ids", "structured_outputs",
    "disable_parallel_tool_use", "echo", "effort", "format", "frequency_penalty", "function", "id",
    "include_usage", "input", "input_schema", "instructions", "is_error", "json_schema",
    "logit_bias", "logprobs", "max_completion_tokens", "max_output_tokens", "max_tokens",
    "messages", "min_p", "model", "n", "name", "output", "output_config", "output_format",
    "parallel_tool_calls", "parameters", "prefix", "priority", "prompt", "reasoning",
    "reasoning_content", "reasoning_effort", "regex", "response_format", "role", "schema", "seed",
    "special_tokens", "stop", "stop_sequences", "stream", "stream_options", "strict", "suffix",
    "summary", "system", "task", "text", "thinking", "tokens", "tool_call_id", "tool_calls",
    "tool_choice", "tool_use_id", "tools", "top_k", "top_logprobs", "top_p", "type",
    "return_sampled_logprobs"};
constexpr std::string_view kValues[] = {
    "true", "false", "null", "0", "1", "2", "-1", "0.5", "1e999", "9007199254740993", "[]", "{}",
    "\"\"", "\"x\"", "[5, 6]", "\"\\u4f60\\ud83d\"", "\"user\"", "\"assistant\"", "\"system\"",
    "\"developer\"", "\"tool\"", "\"function\"", "\"auto\"", "\"none\"", "\"required\"", "\"any\"",
    "\"max\"", "\"text\"", "\"json_object\"", "\"json_schema\"", "\"function_call\"",
    "\"function_call_output\"", "\"tool_use\"", "\"tool_result\"", "\"thinking\"", "\"title\"",
    "\"enabled\"", "\"custom\"", "\"namespace\"", "\"allowed_tools\"",
    "\"custom_tool_call\"", "\"custom_tool_call_output\"", "\"item_reference\"", "\"image_url\"",
    "\"web_search\"", "\"reasoning.encrypted_content\"", "\"message.output_text.logprobs\"",
    "\"f\"", "\"{\\\"a\\\": [1]}\"",
    R"({"role": "user", "content": "x"})",
    R"({"role": "user", "content": [{"type": "text", "text": "y"}]})",
    R"({"role": "assistant", "content": "a", "reasoning_content": "r", "prefix": true})",
    R"({"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
        "function": {"name": "f", "arguments": "{\"a\": 1}"}}]})",
    R"({"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f",
        "input": {"a": "b"}}]})",
    R"({"role": "tool", "tool_call_id": "1", "content": "t"})",
    R"([{"role": "user", "content": "x"}])",
    R"({"type": "tool_result", "tool_use_id": "1", "content": "t"})",
    R"({"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]})",
    R"({"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"})",
    R"({"type": "function_call_output", "call_id": "1", "output": "o"})",
    R"([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])",
    R"([{"type": "function", "name": "f", "strict": true}])",
    R"([{"name": "f", "input_schema": {"type": "object"}}])",
    R"({"type": "function", "function": {"name": "f"}})", R"({"type": "tool", "name": "f"})",
    R"({"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}})",
    R"({"type": "regex", "regex": "a+"})", R"({"include_usage": true})", R"({"effort": "high"})"};
// clang-format on

/// The seeds in the repository; none where it is elsewhere.
const std::vector<std::string>& seeds() {
  static const std::vector<std::string> all = [] {
    std::vector<std::string> found;
    std::error_code missing;
    for (const auto& entry :
         std::filesystem::directory_iterator(HADAL_SOURCE_DIR "/src/server/fuzz/api_fuzz", missing))
      found.push_back(hadal::read_file(entry.path().string()));
    std::sort(found.begin(), found.end());
    return found;
  }();
  return all;
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data,
                                          size_t size,
                                          size_t max_size,
                                          unsigned seed) {
  if (size == 0 || max_size < 2) return 0;
  const hadal::testing::JsonPool pool{kKeys, kValues};
  if (seed % 16 == 1) {
    data[0] = static_cast<uint8_t>('0' + seed / 16 % kPaths.size());
  } else if (const std::vector<std::string>& known = seeds(); seed % 16 < 8 && !known.empty()) {
    const std::string& one = known[seed / 16 % known.size()];
    size = std::min(one.size(), max_size);
    std::memcpy(data, one.data(), size);
  }
  return 1 + hadal::testing::mutate_json(data + 1, size - 1, max_size - 1, seed / 16, pool);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static World world;
  if (size == 0) return 0;
  const size_t route = static_cast<size_t>(data[0] - '0') % kPaths.size();
  hadal::server::HttpRequest request;
  request.method = "POST";
  request.path = kPaths[route];
  request.body = std::string_view(reinterpret_cast<const char*>(data) + 1, size - 1);
  const auto recorder = std::make_shared<Recorder>();
  world.api.handle(std::move(request), recorder);
  recorder->run();
  if (recorder->ended != 1 || recorder->status >= 500 || recorder->status < 200) std::abort();
  if (recorder->status >= 400 && recorder->body.find("\"error\"") == std::string::npos)
    std::abort();
  World::Count& count = world.counts[route];
  ++count.all;
  if (recorder->status == 200) ++count.good;
  if (recorder->streamed) ++count.streams;
  return 0;
}
