// The APIs over an engine that answers from a script, without sockets: what a body gets. Included
// by tests only.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "server/api.h"
#include "testing/scripted_engine.h"
#include "testing/tiny_tokenizer.h"

namespace hadal::testing {

/// Collects an answer. What is posted waits for run(), as it would for the connection's strand.
class AnswerRecorder final : public server::Responder {
 public:
  void post(std::function<void()> work) override { posted_.push_back(std::move(work)); }
  void run() {
    for (; !posted_.empty(); posted_.pop_front()) posted_.front()();
  }
  void send(server::HttpResponse response) override {
    reply = std::move(response);
    ++ended;
  }
  void begin_stream(server::HttpResponse head) override {
    reply = std::move(head);
    streamed = true;
  }
  void write(std::string bytes) override { reply.body += bytes; }
  void end_stream() override { ++ended; }
  void when_silent(std::chrono::milliseconds, std::function<void()>) override {}
  void on_close(std::function<void()>) override {}
  server::HttpResponse reply;
  bool streamed = false;
  int ended = 0;

 private:
  std::deque<std::function<void()>> posted_;
};

class ApiHarness : public ::testing::Test {
 protected:
  using Json = text::PyJson;
  struct Event {
    std::string name;
    Json data;
  };

  ApiHarness()
      : tokenizer_(text::Tokenizer::from_json(byte_tokenizer_json(), "tiny")),
        engine_(tokenizer_,
                [this](const engine_core::Request&, int64_t choice) {
                  return answers_[static_cast<size_t>(choice) % answers_.size()];
                },
                {.max_context = 4096, .inline_steps = true}) {
    options_.grammar_threads = 0;  // all is answered when handle() returns
  }

  server::HttpResponse call(const std::string& method,
                            const std::string& path,
                            const std::string& body) {
    if (!api_) api_.emplace(engine_, tokenizer_, options_);
    const auto recorder = std::make_shared<AnswerRecorder>();
    server::HttpRequest request;
    request.method = method;
    request.path = path;
    request.body = body;
    api_->handle(std::move(request), recorder);
    recorder->run();
    EXPECT_EQ(recorder->ended, 1) << path << " " << body;
    streamed_ = recorder->streamed;
    status_ = recorder->reply.status;
    return recorder->reply;
  }
  Json post(const std::string& path, const std::string& body) {
    return Json::parse(call("POST", path, body).body, "answer");
  }
  /// The events of a stream; whether it ended with [DONE] is in done_.
  std::vector<Event> stream(const std::string& path, const std::string& body) {
    const server::HttpResponse response = call("POST", path, body);
    EXPECT_TRUE(streamed_) << response.body;
    std::vector<Event> events;
    std::string name;
    for (size_t from = 0; from < response.body.size();) {
      const size_t end = response.body.find('\n', from);
      const std::string line = response.body.substr(from, end - from);
      from = end + 1;
      if (line.starts_with("event: ")) name = line.substr(7);
      if (!line.starts_with("data: ")) continue;
      done_ = line == "data: [DONE]";
      if (!done_) events.push_back({std::exchange(name, ""), Json::parse(line.substr(6), "event")});
    }
    return events;
  }
  /// The value at a path such as "choices.0.message.content", as JSON text.
  static std::string at(const Json& json, const std::string& path) {
    const Json* value = &json;
    size_t from = 0;
    while (from <= path.size()) {
      const size_t end = std::min(path.find('.', from), path.size());
      const std::string key = path.substr(from, end - from);
      from = end + 1;
      if (value->is_array()) {
        const auto index = static_cast<size_t>(std::atoi(key.c_str()));
        if (index >= value->items().size()) return "nothing";
        value = &value->items()[index];
      } else {
        value = value->find(key);
        if (value == nullptr) return "nothing";
      }
    }
    return value->dump();
  }
  engine_core::Request last() const {
    const auto requests = engine_.requests();
    EXPECT_FALSE(requests.empty()) << "the engine got nothing";
    return requests.empty() ? engine_core::Request() : requests.back();
  }
  std::string prompt_of_last() const {
    const engine_core::Request request = last();
    return tokenizer_.decode(std::vector<int32_t>(request.prompt.begin(), request.prompt.end()));
  }

  text::Tokenizer tokenizer_;
  server::ServerOptions options_;
  std::vector<std::string> answers_ = {"Hello!"};
  ScriptedEngine engine_;
  std::optional<server::Api> api_;
  bool streamed_ = false, done_ = false;
  int status_ = 0;
};

}  // namespace hadal::testing
