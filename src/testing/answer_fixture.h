// The APIs over a scripted engine, for tests of what becomes of an answer: the same answer of each
// API, whole and put together from its stream.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "server/api.h"
#include "server/sse_parser.h"
#include "testing/scripted_engine.h"
#include "testing/tiny_tokenizer.h"

namespace hadal::testing {

/// An answer of any API.
struct SeenAnswer {
  int status = 0;
  std::string reasoning, content;
  std::string finish;     ///< finish_reason, stop_reason, status
  std::string malformed;  ///< or the reason why a response is incomplete
  std::vector<std::pair<std::string, std::string>> calls;  ///< names and arguments
  std::string raw;
};

class AnswerTest : public ::testing::Test {
 protected:
  enum class Route : uint8_t { kChat, kResponses, kMessages };
  static constexpr Route kRoutes[] = {Route::kChat, Route::kResponses, Route::kMessages};

  AnswerTest()
      : tokenizer_(text::Tokenizer::from_json(byte_tokenizer_json(), "tiny")),
        engine_(tokenizer_,
                [this](const engine_core::Request&, int64_t) { return script_; },
                {.max_context = 65536, .inline_steps = true}) {
    options_.grammar_threads = 0;  // all is answered when handle() returns
  }

  server::HttpResponse post(const std::string& path, const std::string& body) {
    if (!api_) api_.emplace(engine_, tokenizer_, options_);
    const auto recorder = std::make_shared<Recorder>();
    server::HttpRequest request;
    request.method = path == "/metrics" ? "GET" : "POST";
    request.path = path;
    request.body = body;
    api_->handle(std::move(request), recorder);
    EXPECT_EQ(recorder->ended, 1) << path << " " << body;
    return recorder->reply;
  }
  /// Asks for a chat with a thinking model or not; `more` are further members. The tools f and g
  /// are offered unless `tools` says otherwise, a list of functions.
  SeenAnswer ask(Route route, bool thinks, bool streams, std::string more = "");
  /// The same whole and streamed, which must agree.
  SeenAnswer ask_both(Route route, bool thinks, const std::string& more = "");
  std::string metrics() { return post("/metrics", "").body; }
  engine_core::Request last() const { return engine_.requests().back(); }
  std::string last_prompt() const {
    const engine_core::Request request = last();
    return tokenizer_.decode(std::vector<int32_t>(request.prompt.begin(), request.prompt.end()));
  }

  text::Tokenizer tokenizer_;
  server::ServerOptions options_;
  std::string script_;
  std::string functions_ = R"({"name": "f", "PARAMETERS": {"type": "object"}}, {"name": "g"})";
  ScriptedEngine engine_;
  std::optional<server::Api> api_;

 private:
  class Recorder final : public server::Responder {
   public:
    void post(std::function<void()> work) override { work(); }
    void send(server::HttpResponse response) override {
      reply = std::move(response);
      ++ended;
    }
    void begin_stream(server::HttpResponse head) override { reply = std::move(head); }
    void write(std::string bytes) override { reply.body += bytes; }
    void end_stream() override { ++ended; }
    void when_silent(std::chrono::milliseconds, std::function<void()>) override {}
    void on_close(std::function<void()>) override {}
    server::HttpResponse reply;
    int ended = 0;
  };
};

}  // namespace hadal::testing
