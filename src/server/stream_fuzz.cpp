// libFuzzer target: whatever a model writes, however its text is cut, the stream of each chat API
// adds up to the whole answer, and no markup is in either. The first two bytes choose API, mode and
// cuts; the rest is what the model writes.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "server/api.h"
#include "server/sse_parser.h"
#include "testing/tiny_tokenizer.h"
#include "text/completion_check.h"
#include "text/utf8.h"

namespace {

using hadal::server::HttpResponse;
using Json = hadal::text::PyJson;

void require(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

/// Answers every request at once with one text, in random pieces of whole characters.
class PieceEngine final : public hadal::engine_core::Engine {
 public:
  explicit PieceEngine(const hadal::text::Tokenizer& tokenizer) : tokenizer_(tokenizer) {
    info_.model_name = "pieces";
    info_.vocab_size = hadal::testing::byte_tokenizer_size();
    info_.max_context = 1 << 20;
    info_.max_choices = 1;
    info_.eos_token = 1;
  }
  void script(std::string text, unsigned seed, hadal::engine_core::FinishReason finish) {
    text_ = std::move(text);
    seed_ = seed;
    finish_ = finish;
  }
  const hadal::engine_core::EngineInfo& info() const override { return info_; }
  hadal::engine_core::Submitted submit(hadal::engine_core::Request,
                                       std::shared_ptr<hadal::engine_core::Sink> sink,
                                       uint64_t* id) override {
    *id = 1;
    std::minstd_rand random(++seed_);
    const size_t stride = 1 + random() % 64;
    for (size_t pos = 0; pos < text_.size();) {
      hadal::engine_core::Update update;
      for (size_t tokens = 1 + random() % 3; tokens > 0 && pos < text_.size(); --tokens) {
        // Literals of special tokens are their tokens, before which the text is.
        const auto [offset, special] =
            hadal::text::find_special(std::string_view(text_).substr(pos));
        size_t end = std::min(pos + offset, pos + 1 + random() % stride);
        while (end < text_.size() && (static_cast<uint8_t>(text_[end]) & 0xC0) == 0x80) ++end;
        end = std::min(end, pos + offset);
        const bool is_special = end == pos + offset && special > 0;
        const std::string text = text_.substr(pos, end - pos);
        update.tokens.push_back(
            {is_special ? tokenizer_.id_of(text_.substr(end, special)) : 100, text, 0, {}});
        pos = end + (is_special ? special : 0);
      }
      sink->on_update(std::move(update));
    }
    hadal::engine_core::Update last;
    last.finish = finish_;
    if (finish_ == hadal::engine_core::FinishReason::kStop)
      last.tokens.push_back({info_.eos_token, "", 0, {}});
    sink->on_update(std::move(last));
    return hadal::engine_core::Submitted::kAccepted;
  }
  void cancel(uint64_t) override {}
  hadal::engine_core::EngineStats stats() const override { return {}; }

 private:
  const hadal::text::Tokenizer& tokenizer_;
  hadal::engine_core::EngineInfo info_;
  std::string text_;
  unsigned seed_ = 0;
  hadal::engine_core::FinishReason finish_ = hadal::engine_core::FinishReason::kStop;
};

class Recorder final : public hadal::server::Responder {
 public:
  void post(std::function<void()> work) override { work(); }
  void send(HttpResponse response) override {
    require(response.status == 200, "a good request is refused");
    body = std::move(response.body);
    ++ended;
  }
  void begin_stream(HttpResponse) override {}
  void write(std::string bytes) override { body += bytes; }
  void end_stream() override { ++ended; }
  void when_silent(std::chrono::milliseconds, std::function<void()>) override {}
  void on_close(std::function<void()>) override {}
  std::string body;
  int ended = 0;
};

/// An answer, whole or put together from its stream.
struct Seen {
  std::string reasoning, content, finish;
  std::vector<std::pair<std::string, std::string>> calls;  ///< names and arguments
};

const std::string& text_of(const Json& json, std::string_view key) {
  static const std::string none;
  const Json* value = json.find_set(key);
  return value == nullptr ? none : value->text();
}
const std::string& type_of(const Json& json) { return text_of(json, "type"); }

Seen whole_chat(const Json& json) {
  const Json& choice = json.find("choices")->items()[0];
  const Json& message = *choice.find("message");
  Seen seen{text_of(message, "reasoning_content"),
            text_of(message, "content"),
            text_of(choice, "finish_reason"),
            {}};
  if (const Json* calls = message.find("tool_calls")) {
    for (const Json& call : calls->items()) {
      const Json& function = *call.find("function");
      seen.calls.emplace_back(text_of(function, "name"), text_of(function, "arguments"));
    }
  }
  return seen;
}
void stream_chat(const Json& json, Seen& seen) {
  const Json& choice = json.find("choices")->items()[0];
  const Json& delta = *choice.find("delta");
  seen.reasoning += text_of(delta, "reasoning_content");
  seen.content += text_of(delta, "content");
  seen.finish += text_of(choice, "finish_reason");
  const Json* calls = delta.find("tool_calls");
  if (calls == nullptr) return;
  const Json& call = calls->items()[0];
  const auto index = static_cast<size_t>(std::stoul(call.find("index")->text()));
  require(index <= seen.calls.size() && index + 1 >= seen.calls.size(), "a call's index");
  if (index == seen.calls.size()) seen.calls.emplace_back();
  seen.calls[index].first += text_of(*call.find("function"), "name");
  seen.calls[index].second += text_of(*call.find("function"), "arguments");
}

Seen whole_response(const Json& json) {
  Seen seen;
  seen.finish = text_of(json, "status");
  for (const Json& item : json.find("output")->items()) {
    if (type_of(item) == "function_call") {
      seen.calls.emplace_back(text_of(item, "name"), text_of(item, "arguments"));
    } else {
      (type_of(item) == "message" ? seen.content : seen.reasoning) =
          text_of(item.find("content")->items()[0], "text");
    }
  }
  return seen;
}
void stream_response(const Json& json, Seen& seen) {
  const std::string& type = type_of(json);
  if (type == "response.reasoning_text.delta") seen.reasoning += text_of(json, "delta");
  if (type == "response.output_text.delta") seen.content += text_of(json, "delta");
  if (type == "response.output_item.added" && type_of(*json.find("item")) == "function_call")
    seen.calls.emplace_back(text_of(*json.find("item"), "name"), "");
  if (type == "response.function_call_arguments.delta")
    seen.calls.back().second += text_of(json, "delta");
  if (type == "response.completed" || type == "response.incomplete")
    seen.finish = text_of(*json.find("response"), "status");
}

Seen whole_message(const Json& json) {
  Seen seen;
  seen.finish = text_of(json, "stop_reason");
  for (const Json& block : json.find("content")->items()) {
    if (type_of(block) == "tool_use") {
      seen.calls.emplace_back(text_of(block, "name"), block.find("input")->dump());
    } else {
      seen.content += text_of(block, "text");
      seen.reasoning += text_of(block, "thinking");
    }
  }
  return seen;
}
void stream_message(const Json& json, Seen& seen) {
  if (type_of(json) == "content_block_start") {
    const Json& block = *json.find("content_block");
    if (type_of(block) == "tool_use") seen.calls.emplace_back(text_of(block, "name"), "");
  }
  const Json* delta = json.find("delta");
  if (delta == nullptr) return;
  seen.finish += text_of(*delta, "stop_reason");
  seen.content += text_of(*delta, "text");
  seen.reasoning += text_of(*delta, "thinking");
  if (type_of(*delta) == "input_json_delta")
    seen.calls.back().second += text_of(*delta, "partial_json");
}

struct Route {
  const char* path;
  const char* body;  ///< up to the value of what says whether to think
  const char* thinks[2];
  Seen (*whole)(const Json&);
  void (*stream)(const Json&, Seen&);
};
constexpr Route kRoutes[] = {
    {"/v1/chat/completions",
     R"({"messages": [{"role": "user", "content": "x"}], "thinking": )",
     {"false", "true"},
     whole_chat,
     stream_chat},
    {"/v1/responses",
     R"({"input": "x", "reasoning": {"effort": )",
     {R"("none"})", R"("high"})"},
     whole_response,
     stream_response},
    {"/v1/messages",
     R"({"max_tokens": 9999, "messages": [{"role": "user", "content": "x"}],
     "thinking": {"type": )",
     {R"("disabled"})", R"("enabled"})"},
     whole_message,
     stream_message}};

struct World {
  World() { hadal::log::set_level(hadal::log::Level::kError); }
  std::string ask(const char* path, std::string body) {
    hadal::server::HttpRequest request;
    request.method = "POST";
    request.path = path;
    request.body = std::move(body);
    const auto recorder = std::make_shared<Recorder>();
    api.handle(std::move(request), recorder);
    require(recorder->ended == 1, "not answered once");
    return std::move(recorder->body);
  }
  hadal::server::ServerOptions options;
  hadal::text::Tokenizer tokenizer =
      hadal::text::Tokenizer::from_json(hadal::testing::byte_tokenizer_json(), "tiny");
  PieceEngine engine{tokenizer};
  hadal::server::Api api{engine, tokenizer, options};
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static World world;
  if (size < 2) return 0;
  const Route& route = kRoutes[data[0] % 3];
  const bool thinks = (data[0] & 4) != 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 2, size - 2);
  const std::string text = hadal::text::repair_utf8(
      (data[0] & 8) != 0 ? hadal::text::expand_markup(rest) : std::string(rest));
  if (text.size() > 500) return -1;  // a long answer has many events, all alike
  world.engine.script(text, data[1],
                      (data[0] & 16) != 0 ? hadal::engine_core::FinishReason::kLength
                                          : hadal::engine_core::FinishReason::kStop);
  std::string body = std::string(route.body) + route.thinks[thinks ? 1 : 0];
  // Where only one call may come, the answer ends behind it.
  if ((data[0] & 32) != 0 && data[0] % 3 != 2) body += R"(, "parallel_tool_calls": false)";
  const Seen whole = route.whole(Json::parse(world.ask(route.path, body + "}"), "whole"));
  Seen sum;
  hadal::server::SseParser parser;
  const std::string stream = world.ask(route.path, body + R"(, "stream": true})");
  parser.feed(stream, [&](const hadal::server::SseEvent& event) {
    if (event.data != "[DONE]") route.stream(Json::parse(event.data, "event"), sum);
  });

  require(sum.reasoning == whole.reasoning, "the reasoning differs");
  require(sum.content == whole.content, "the content differs");
  require(sum.finish == whole.finish, "the end differs");
  // Around what is left out, pieces of text may add up to a literal; a marker of markup never
  // comes.
  for (const auto& call : sum.calls)
    require(call.first.find(hadal::text::kDsml) == std::string::npos, "markup leaks");
  // A call that does not end is in the stream only, at the end.
  require(sum.calls.size() == whole.calls.size() || sum.calls.size() == whole.calls.size() + 1,
          "the number of calls differs");
  for (size_t i = 0; i < whole.calls.size(); ++i) {
    require(sum.calls[i] == whole.calls[i], "a call differs");
    // /v1/responses shows the call that an answer is cut off in, as far as it came.
    const bool cut_off = whole.finish == "incomplete" && i + 1 == whole.calls.size();
    require(cut_off || hadal::text::is_json(whole.calls[i].second), "arguments are no JSON");
  }
  return 0;
}
