#include "server/openai_types.h"

#include <algorithm>

#include "server/openai_format.h"
#include "server/openai_reading.h"
#include "text/utf8.h"

namespace hadal::server {
namespace {

const char* error_type(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    default:
      return status < 500 ? "invalid_request_error" : "server_error";
  }
}

Json byte_list(std::string_view bytes) {
  Json list = Json::array();
  for (const char c : bytes) list.items().push_back(js(int64_t{static_cast<uint8_t>(c)}));
  return list;
}

Json token_logprob(const text::Tokenizer& tokenizer,
                   int64_t token,
                   double logprob,
                   bool id_as_token) {
  const std::string_view bytes = tokenizer.token_bytes(static_cast<int32_t>(token));
  const std::string name = id_as_token ? concat("token_id:", token) : text::repair_utf8(bytes);
  return Json::object(
      {{"token", js(name)}, {"logprob", js(finite_logprob(logprob))}, {"bytes", byte_list(bytes)}});
}

class ChatFormat final : public OpenAiFormat {
 public:
  using OpenAiFormat::OpenAiFormat;
  static constexpr const char* kChunk = "chat.completion.chunk";

  void begin(const Answer& answer, std::string& out) override {
    sent_.resize(answer.choices.size());
    if (options_.token_ids || !options_.notes.empty()) {
      Json chunk = frame(answer, kChunk);
      chunk.set("choices", Json::array());
      if (options_.token_ids) chunk.set("prompt_token_ids", id_list(prompt_of(0).tokens));
      add_notes(options_.notes, chunk);
      write_sse(out, chunk);
    }
    for (size_t i = 0; i < answer.choices.size(); ++i)
      delta(answer, i, Json::object({{"role", js("assistant")}, {"content", js("")}}), {}, out);
  }
  void text(const Answer& answer,
            size_t index,
            Kind kind,
            const std::string& text,
            std::string& out) override {
    const bool content = kind == Kind::kContent;
    Json logprobs;
    if (options_.logprobs) {
      const Choice& choice = answer.choices[index];
      const auto& tokens = content ? choice.content_tokens_info : choice.reasoning_tokens_info;
      size_t& sent = content ? sent_[index].content : sent_[index].reasoning;
      logprobs = Json::object({{content ? "content" : "reasoning_content",
                                logprob_list(tokenizer_, tokens, sent, options_.ids_as_tokens)}});
      sent = tokens.size();
    }
    delta(answer, index, Json::object({{content ? "content" : "reasoning_content", js(text)}}),
          std::move(logprobs), out);
  }
  void call_begun(const Answer& answer, size_t index, std::string& out) override {
    const CallRecord& call = *answer.choices[index].open_call;
    call_delta(answer, index, 0, call_json({call.id, call.name, {}}), out);
  }
  void call_arguments(const Answer& answer,
                      size_t index,
                      const std::string& arguments,
                      std::string& out) override {
    // A custom tool's text is known when its JSON is whole.
    if (is_custom(*answer.choices[index].open_call)) return;
    call_delta(answer, index, 0,
               Json::object({{"function", Json::object({{"arguments", js(arguments)}})}}), out);
  }
  void call_ended(const Answer& answer, size_t index, std::string& out) override {
    const CallRecord& call = answer.choices[index].calls.back();
    if (!is_custom(call)) return;
    call_delta(answer, index, 1,
               Json::object({{"custom", Json::object({{"input", js(custom_input(call))}})}}), out);
  }
  void finished(const Answer& answer, size_t index, std::string& out) override {
    const Choice& choice = answer.choices[index];
    Json entry = Json::object({{"index", js(static_cast<int64_t>(index))},
                               {"delta", Json::object()},
                               {"logprobs", Json()},
                               {"finish_reason", js(openai_finish(choice))}});
    add_details(choice, entry);
    add_weights(choice, entry);
    add_new(answer, index, entry);
    write_chunk(answer, kChunk, Json::array({std::move(entry)}), out);
  }
  void end(const Answer& answer, std::string& out) override { write_end(answer, kChunk, out); }

  std::string whole(const Answer& answer) override {
    Json choices = Json::array();
    for (size_t i = 0; i < answer.choices.size(); ++i) {
      const Choice& choice = answer.choices[i];
      const bool no_content = choice.content.empty() && !choice.calls.empty();
      Json message = Json::object({{"role", js("assistant")},
                                   {"content", no_content ? Json() : js(choice.content)},
                                   {"refusal", Json()}});
      if (!choice.reasoning.empty()) message.set("reasoning_content", js(choice.reasoning));
      if (!choice.calls.empty()) {
        Json calls = Json::array();
        for (const CallRecord& call : choice.calls) calls.items().push_back(call_json(call));
        message.set("tool_calls", std::move(calls));
      }
      Json logprobs;
      if (options_.logprobs) {
        logprobs = Json::object({{"content", logprobs_of(choice.content_tokens_info)},
                                 {"reasoning_content", logprobs_of(choice.reasoning_tokens_info)},
                                 {"refusal", Json()}});
      }
      Json entry = Json::object({{"index", js(static_cast<int64_t>(i))},
                                 {"message", std::move(message)},
                                 {"logprobs", std::move(logprobs)},
                                 {"finish_reason", js(openai_finish(choice))}});
      add_details(choice, entry);
      add_weights(choice, entry);
      add_drawn(choice, 0, entry);
      choices.items().push_back(std::move(entry));
    }
    Json body = frame(answer, "chat.completion");
    body.set("choices", std::move(choices));
    if (options_.token_ids) body.set("prompt_token_ids", id_list(prompt_of(0).tokens));
    const auto& scores = answer.choices.front().prompt_scores;
    if (options_.prompt_logprobs >= 0 && scores) {
      body.set("prompt_logprobs",
               prompt_logprobs_json(tokenizer_, options_, prompt_of(0), *scores));
    }
    body.set("usage", openai_usage(answer));
    add_notes(options_.notes, body);
    return body.dump();
  }

 private:
  struct Sent {
    size_t content = 0, reasoning = 0, drawn = 0;
  };
  Json logprobs_of(const std::vector<engine_core::OutputToken>& tokens) const {
    return logprob_list(tokenizer_, tokens, 0, options_.ids_as_tokens);
  }
  /// What was drawn since the choice's last chunk.
  void add_new(const Answer& answer, size_t index, Json& entry) {
    const Choice& choice = answer.choices[index];
    add_drawn(choice, sent_[index].drawn, entry);
    sent_[index].drawn = num_drawn(choice);
  }
  /// Extensions: which stop string matched, and markup that did not parse.
  static void add_details(const Choice& choice, Json& entry) {
    add_stop_reason(choice, entry);
    if (!choice.malformed.empty()) entry.set("malformed", js(text::repair_utf8(choice.malformed)));
  }
  void delta(const Answer& answer, size_t index, Json content, Json logprobs, std::string& out) {
    Json entry = Json::object({{"index", js(static_cast<int64_t>(index))},
                               {"delta", std::move(content)},
                               {"logprobs", std::move(logprobs)},
                               {"finish_reason", Json()}});
    add_new(answer, index, entry);
    write_chunk(answer, kChunk, Json::array({std::move(entry)}), out);
  }
  bool is_custom(const CallRecord& call) const { return options_.custom_tools.contains(call.name); }
  Json call_json(const CallRecord& call) const {
    const bool custom = is_custom(call), begun = call.arguments.empty();
    const char* const type = custom ? "custom" : "function";
    const std::string text = custom && !begun ? custom_input(call) : call.arguments;
    return Json::object({{"id", js(call.id)},
                         {"type", js(type)},
                         {type, Json::object({{"name", js(call.name)},
                                              {custom ? "input" : "arguments", js(text)}})}});
  }
  /// Of the open call, or with `ended` 1 of the one that just ended.
  void call_delta(
      const Answer& answer, size_t index, int64_t ended, const Json& content, std::string& out) {
    Json call = Json::object({{"index", js(std::ssize(answer.choices[index].calls) - ended +
                                           answer.choices[index].dropped_calls)}});
    for (const auto& [key, value] : content.members()) call.set(key, value);
    delta(answer, index, Json::object({{"tool_calls", Json::array({std::move(call)})}}), {}, out);
  }
  std::vector<Sent> sent_;
};

}  // namespace

Json logprob_list(const text::Tokenizer& tokenizer,
                  const std::vector<engine_core::OutputToken>& tokens,
                  size_t from,
                  bool ids_as_tokens) {
  Json list = Json::array();
  for (size_t i = from; i < tokens.size(); ++i) {
    Json entry = token_logprob(tokenizer, tokens[i].token, tokens[i].logprob, ids_as_tokens);
    Json top = Json::array();
    for (const TokenLogprob& other : tokens[i].top)
      top.items().push_back(token_logprob(tokenizer, other.token, other.logprob, ids_as_tokens));
    entry.set("top_logprobs", std::move(top));
    list.items().push_back(std::move(entry));
  }
  return list;
}

Json id_list(const std::vector<int64_t>& ids, size_t from) {
  Json list = Json::array();
  for (size_t i = from; i < ids.size(); ++i) list.items().push_back(js(ids[i]));
  return list;
}

Json number_list(const std::vector<double>& numbers, size_t from) {
  Json list = Json::array();
  for (size_t i = from; i < numbers.size(); ++i) list.items().push_back(js(numbers[i]));
  return list;
}

double finite_logprob(double logprob) { return std::max(logprob, -9999.0); }

HttpResponse openai_error(const RequestError& error) {
  HttpResponse response;
  response.status = error.status();
  const auto or_null = [](const std::string& text) { return text.empty() ? Json() : js(text); };
  response.body =
      Json::object({{"error", Json::object({{"message", js(text::repair_utf8(error.what()))},
                                            {"type", js(error_type(error.status()))},
                                            {"param", or_null(error.param())},
                                            {"code", or_null(error.code())}})}})
          .dump();
  return response;
}

Json timings_json(const Answer& answer) {
  Json timings = Json::object({{"first_token_ms", js(1000 * answer.first_token_seconds)},
                               {"total_ms", js(1000 * answer.seconds)}});
  const double writing = answer.seconds - answer.first_token_seconds;
  const int64_t more = answer.completion_tokens() - std::ssize(answer.choices);
  if (more > 0 && writing > 0)
    timings.set("tokens_per_second", js(static_cast<double>(more) / writing));
  return timings;
}

void add_notes(const std::vector<std::string>& notes, Json& answer) {
  if (notes.empty()) return;
  Json list = Json::array();
  for (const std::string& note : notes) list.items().push_back(js(text::repair_utf8(note)));
  answer.set("notes", std::move(list));
}

Json openai_usage(const Answer& answer) {
  Json prompt = Json::object({{"cached_tokens", js(answer.cached_tokens)},
                              {"disk_tokens", js(answer.disk_tokens)},
                              {"miss_reason", js(answer.miss)}});
  Json completion = Json::object({{"reasoning_tokens", js(answer.reasoning_tokens())}});
  return Json::object(
      {{"prompt_tokens", js(answer.prompt_tokens)},
       {"completion_tokens", js(answer.completion_tokens())},
       {"total_tokens", js(answer.prompt_tokens + answer.completion_tokens())},
       {"prompt_cache_hit_tokens", js(answer.cached_tokens)},
       {"prompt_cache_miss_tokens", js(answer.prompt_tokens - answer.cached_tokens)},
       {"timings", timings_json(answer)},
       {"prompt_tokens_details", std::move(prompt)},
       {"completion_tokens_details", std::move(completion)}});
}

std::string openai_finish(const Choice& choice) {
  switch (choice.ending()) {
    case Ending::kLength:
    case Ending::kMalformed:
      return "length";  // of what clients know, what says that something is missing
    case Ending::kToolCalls:
      return "tool_calls";
    default:
      return "stop";
  }
}

void write_sse(std::string& out, const Json& data, std::string_view event) {
  if (!event.empty()) {
    out += "event: ";
    out += event;
    out += '\n';
  }
  out += "data: ";
  data.dump_to(out);
  out += "\n\n";
}

std::unique_ptr<Format> chat_completion_format(const text::Tokenizer& tokenizer,
                                               OpenAiFormatOptions options) {
  return std::make_unique<ChatFormat>(tokenizer, std::move(options));
}
}  // namespace hadal::server
