// What a request gets that says nothing: the model's own settings, in every API, and told at
// /v1/models.
#include <gtest/gtest.h>

#include "server/api.h"
#include "testing/scripted_engine.h"
#include "testing/tiny_tokenizer.h"

namespace hadal::server {
namespace {

class Silent final : public Responder {
 public:
  void post(std::function<void()> work) override { work(); }
  void send(HttpResponse response) override { reply = std::move(response); }
  void begin_stream(HttpResponse head) override { reply = std::move(head); }
  void write(std::string bytes) override { reply.body += bytes; }
  void end_stream() override {}
  void when_silent(std::chrono::milliseconds, std::function<void()>) override {}
  void on_close(std::function<void()>) override {}
  HttpResponse reply;
};

class ModelDefaults : public ::testing::Test {
 protected:
  ModelDefaults()
      : tokenizer_(text::Tokenizer::from_json(testing::byte_tokenizer_json(), "tiny")),
        engine_(tokenizer_,
                [](const engine_core::Request&, int64_t) { return "hi"; },
                {.max_context = 4096, .inline_steps = true}) {
    options_.grammar_threads = 0;
    options_.default_thinking = false;
    options_.default_sampling.temperature = 0.7;
    options_.default_sampling.top_p = 0.9;
    options_.default_sampling.top_k = 40;
    options_.default_sampling.min_p = 0.05;
    options_.default_sampling.repetition_penalty = 1.1;
    options_.default_max_tokens = 77;
  }
  HttpResponse call(const std::string& method, const std::string& path, const std::string& body) {
    Api api(engine_, tokenizer_, options_);
    const auto responder = std::make_shared<Silent>();
    HttpRequest request;
    request.method = method;
    request.path = path;
    request.body = body;
    api.handle(std::move(request), responder);
    EXPECT_EQ(responder->reply.status, 200) << path << ": " << responder->reply.body;
    return responder->reply;
  }
  engine_core::Request asked(const std::string& path, const std::string& body) {
    call("POST", path, body);
    const auto requests = engine_.requests();
    return requests.empty() ? engine_core::Request() : requests.back();
  }

  text::Tokenizer tokenizer_;
  testing::ScriptedEngine engine_;
  ServerOptions options_;
};

const std::pair<const char*, const char*> kRequests[] = {
    {"/v1/chat/completions", R"({"messages": [{"role": "user", "content": "x"}])"},
    {"/v1/responses", R"({"input": "x")"},
    {"/v1/messages", R"({"max_tokens": 77, "messages": [{"role": "user", "content": "x"}])"},
    {"/v1/completions", R"({"prompt": "x")"},
};

TEST_F(ModelDefaults, AreThoseOfEveryApi) {
  for (const auto& [path, body] : kRequests) {
    const engine_core::Request request = asked(path, body + std::string("}"));
    EXPECT_FALSE(request.thinking) << path;
    EXPECT_EQ(request.sampling.temperature, 0.7) << path;
    EXPECT_EQ(request.sampling.top_p, 0.9) << path;
    EXPECT_EQ(request.sampling.top_k, 40) << path;
    EXPECT_EQ(request.sampling.min_p, 0.05) << path;
    EXPECT_EQ(request.sampling.repetition_penalty, 1.1) << path;
    // That API says 16 itself.
    EXPECT_EQ(request.max_tokens, path == std::string("/v1/completions") ? 16 : 77) << path;
  }
}

TEST_F(ModelDefaults, GiveWayToWhatARequestSays) {
  for (const auto& [path, body] : kRequests) {
    const engine_core::Request request =
        asked(path, body + std::string(R"(, "temperature": 0.2, "top_p": 0.5, "top_k": -1})"));
    EXPECT_EQ(request.sampling.temperature, 0.2) << path;
    EXPECT_EQ(request.sampling.top_p, 0.5) << path;
    EXPECT_EQ(request.sampling.top_k, 0) << path;
  }
  EXPECT_TRUE(asked("/v1/chat/completions",
                    R"({"messages": [{"role": "user", "content": "x"}], "thinking": true})")
                  .thinking);
  options_.default_thinking = true;
  EXPECT_TRUE(asked("/v1/chat/completions", R"({"messages": [{"role": "user", "content": "x"}]})")
                  .thinking);
}

TEST_F(ModelDefaults, AreToldAtModels) {
  const Json json = Json::parse(call("GET", "/v1/models", "").body, "models");
  const Json* told = json.find("data")->items().at(0).find("defaults");
  ASSERT_NE(told, nullptr);
  EXPECT_EQ(told->dump(),
            R"({"thinking": false, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, )"
            R"("repetition_penalty": 1.1, "max_tokens": 77})");
}

}  // namespace
}  // namespace hadal::server
