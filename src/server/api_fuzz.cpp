// libFuzzer target: any bytes are answered exactly once, by an answer or by an API's own error,
// never by 500. The first byte picks the route, or the whole HTTP parser; the rest is the body, or
// the request.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/log.h"
#include "server/api.h"
#include "testing/scripted_engine.h"
#include "testing/tiny_tokenizer.h"
#include "text/tool_calls.h"

namespace {

using hadal::server::HttpResponse;

class Recorder final : public hadal::server::Responder {
 public:
  void post(std::function<void()> work) override { work(); }
  void send(HttpResponse response) override {
    status = response.status;
    body = std::move(response.body);
    ++ended;
  }
  void begin_stream(HttpResponse head) override { status = head.status; }
  void write(std::string bytes) override { body += bytes; }
  void end_stream() override { ++ended; }
  void when_silent(std::chrono::milliseconds, std::function<void()>) override {}
  void on_close(std::function<void()>) override {}
  int status = 0, ended = 0;
  std::string body;
};

struct World {
  World()
      : tokenizer(hadal::text::Tokenizer::from_json(
            // Few tokens an answer: what is fuzzed is the request.
            hadal::testing::byte_tokenizer_json({call()}),
            "tiny")),
        engine(tokenizer, answer, {.max_context = 2048, .inline_steps = true}),
        api(engine, tokenizer, options) {
    hadal::log::set_level(hadal::log::Level::kError);
  }
  static const std::string& call() {
    static const std::string text =
        "\n\n" + hadal::text::write_tool_calls(
                     std::vector<hadal::text::ToolCall>{{"f", R"({"a": "b", "c": [1.5]})"}});
    return text;
  }
  static std::string answer(const hadal::engine::Request& request, int64_t choice) {
    std::string text = request.thinking ? "so</think>" : "";
    if (request.prompt.size() % 3 == 1) return text + "ok" + call();
    return text + (choice == 1 ? "<think>" : "fine");
  }
  hadal::server::ServerOptions options;
  hadal::text::Tokenizer tokenizer;
  hadal::testing::ScriptedEngine engine;
  hadal::server::Api api;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static World world;
  if (size == 0) return 0;
  static constexpr const char* kPaths[] = {
      "/v1/chat/completions",      "/v1/completions", "/v1/responses", "/v1/messages",
      "/v1/messages/count_tokens", "/tokenize",       "/detokenize"};
  const std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  hadal::server::HttpRequest request;
  const size_t route = data[0] % (std::size(kPaths) + 1);
  if (route < std::size(kPaths)) {
    request.method = "POST";
    request.path = kPaths[route];
    request.body = rest;
  } else if (const int status = parse_http_request(rest, world.options, request); status != 0) {
    if (status != 400 && status != 413 && status != 431) std::abort();
    return 0;
  }
  const auto recorder = std::make_shared<Recorder>();
  const std::string path = request.path;
  world.api.handle(std::move(request), recorder);
  if (recorder->ended != 1 || recorder->status >= 500 || recorder->status < 200) std::abort();
  if (recorder->status >= 400 && recorder->body.find("\"error\"") == std::string::npos)
    std::abort();
  return 0;
}
