#include "server/openai_types.h"

#include <algorithm>

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

/// A logprob JSON can hold: minus infinity becomes a number no token reaches.
double finite(double logprob) { return std::max(logprob, -9999.0); }

Json token_logprob(const text::Tokenizer& tokenizer, int64_t token, double logprob) {
  const std::string_view bytes = tokenizer.token_bytes(static_cast<int32_t>(token));
  return Json::object({{"token", js(text::repair_utf8(bytes))},
                       {"logprob", js(finite(logprob))},
                       {"bytes", byte_list(bytes)}});
}

Json logprob_list(const text::Tokenizer& tokenizer,
                  const std::vector<engine::OutputToken>& tokens,
                  size_t from) {
  Json list = Json::array();
  for (size_t i = from; i < tokens.size(); ++i) {
    Json entry = token_logprob(tokenizer, tokens[i].token, tokens[i].logprob);
    Json top = Json::array();
    for (const engine::TokenLogprob& other : tokens[i].top)
      top.items().push_back(token_logprob(tokenizer, other.token, other.logprob));
    entry.set("top_logprobs", std::move(top));
    list.items().push_back(std::move(entry));
  }
  return list;
}

Json call_json(const CallRecord& call) {
  return Json::object(
      {{"id", js(call.id)},
       {"type", js("function")},
       {"function", Json::object({{"name", js(call.name)}, {"arguments", js(call.arguments)}})}});
}

/// The two list what is common: errors in the middle of a stream and its end.
class OpenAiFormat : public Format {
 public:
  OpenAiFormat(const text::Tokenizer& tokenizer, OpenAiFormatOptions options)
      : tokenizer_(tokenizer), options_(std::move(options)) {}
  HttpResponse error(const RequestError& error) override { return openai_error(error); }
  void stream_error(const RequestError& error, std::string& out) override {
    out += "data: " + openai_error(error).body + "\n\ndata: [DONE]\n\n";
  }

 protected:
  void write_chunk(const Answer& answer, const char* object, Json choices, std::string& out) const {
    Json chunk = frame(answer, object);
    chunk.set("choices", std::move(choices));
    if (options_.include_usage) chunk.set("usage", Json());
    write_sse(out, chunk);
  }
  void write_end(const Answer& answer, const char* object, std::string& out) const {
    if (options_.include_usage) {
      Json chunk = frame(answer, object);
      chunk.set("choices", Json::array());
      chunk.set("usage", openai_usage(answer));
      write_sse(out, chunk);
    }
    out += "data: [DONE]\n\n";
  }
  static Json frame(const Answer& answer, const char* object) {
    return Json::object({{"id", js(answer.id)},
                         {"object", js(object)},
                         {"created", js(answer.created)},
                         {"model", js(answer.model)}});
  }

  const text::Tokenizer& tokenizer_;
  const OpenAiFormatOptions options_;
};

class ChatFormat final : public OpenAiFormat {
 public:
  using OpenAiFormat::OpenAiFormat;
  static constexpr const char* kChunk = "chat.completion.chunk";

  void begin(const Answer& answer, std::string& out) override {
    sent_.resize(answer.choices.size());
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
      logprobs = Json::object(
          {{content ? "content" : "reasoning_content", logprob_list(tokenizer_, tokens, sent)}});
      sent = tokens.size();
    }
    delta(answer, index, Json::object({{content ? "content" : "reasoning_content", js(text)}}),
          std::move(logprobs), out);
  }
  void call_begun(const Answer& answer, size_t index, std::string& out) override {
    const CallRecord& call = *answer.choices[index].open_call;
    call_delta(answer, index, call_json({call.id, call.name, {}}), out);
  }
  void call_arguments(const Answer& answer,
                      size_t index,
                      const std::string& arguments,
                      std::string& out) override {
    call_delta(answer, index,
               Json::object({{"function", Json::object({{"arguments", js(arguments)}})}}), out);
  }
  void finished(const Answer& answer, size_t index, std::string& out) override {
    const Choice& choice = answer.choices[index];
    Json entry = Json::object({{"index", js(static_cast<int64_t>(index))},
                               {"delta", Json::object()},
                               {"logprobs", Json()},
                               {"finish_reason", js(openai_finish(choice))}});
    add_details(choice, entry);
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
        logprobs = Json::object(
            {{"content", logprob_list(tokenizer_, choice.content_tokens_info, 0)},
             {"reasoning_content", logprob_list(tokenizer_, choice.reasoning_tokens_info, 0)},
             {"refusal", Json()}});
      }
      Json entry = Json::object({{"index", js(static_cast<int64_t>(i))},
                                 {"message", std::move(message)},
                                 {"logprobs", std::move(logprobs)},
                                 {"finish_reason", js(openai_finish(choice))}});
      add_details(choice, entry);
      choices.items().push_back(std::move(entry));
    }
    Json body = frame(answer, "chat.completion");
    body.set("choices", std::move(choices));
    body.set("usage", openai_usage(answer));
    return body.dump();
  }

 private:
  struct Sent {
    size_t content = 0, reasoning = 0;
  };
  /// Extensions: which stop string matched, and markup that did not parse.
  static void add_details(const Choice& choice, Json& entry) {
    if (!choice.matched_stop.empty()) entry.set("stop_reason", js(choice.matched_stop));
    if (!choice.malformed.empty()) entry.set("malformed", js(text::repair_utf8(choice.malformed)));
  }
  void delta(const Answer& answer, size_t index, Json content, Json logprobs, std::string& out) {
    write_chunk(answer, kChunk,
                Json::array({Json::object({{"index", js(static_cast<int64_t>(index))},
                                           {"delta", std::move(content)},
                                           {"logprobs", std::move(logprobs)},
                                           {"finish_reason", Json()}})}),
                out);
  }
  /// Of the open call.
  void call_delta(const Answer& answer, size_t index, const Json& content, std::string& out) {
    Json call = Json::object({{"index", js(std::ssize(answer.choices[index].calls) +
                                           answer.choices[index].dropped_calls)}});
    for (const auto& [key, value] : content.members()) call.set(key, value);
    delta(answer, index, Json::object({{"tool_calls", Json::array({std::move(call)})}}), {}, out);
  }
  std::vector<Sent> sent_;
};

class TextFormat final : public OpenAiFormat {
 public:
  using OpenAiFormat::OpenAiFormat;
  static constexpr const char* kObject = "text_completion";

  void begin(const Answer& answer, std::string& out) override {
    sent_.resize(answer.choices.size());
    offset_.resize(answer.choices.size());
    for (size_t i = 0; i < answer.choices.size(); ++i) {
      if (const std::string echo = echo_of(i); !echo.empty())
        write(answer, i, echo, Json(), Json(), out);
    }
  }
  void text(const Answer& answer,
            size_t index,
            Kind,
            const std::string& text,
            std::string& out) override {
    const auto& tokens = answer.choices[index].content_tokens_info;
    Json logprobs;
    if (options_.logprobs) logprobs = logprobs_of(tokens, sent_[index], offset_[index]);
    sent_[index] = tokens.size();
    write(answer, index, text, std::move(logprobs), Json(), out);
  }
  void finished(const Answer& answer, size_t index, std::string& out) override {
    write(answer, index, "", Json(), js(openai_finish(answer.choices[index])), out);
  }
  void end(const Answer& answer, std::string& out) override { write_end(answer, kObject, out); }

  std::string whole(const Answer& answer) override {
    Json choices = Json::array();
    for (size_t i = 0; i < answer.choices.size(); ++i) {
      const Choice& choice = answer.choices[i];
      int64_t offset = 0;
      Json logprobs;
      if (options_.logprobs) logprobs = logprobs_of(choice.content_tokens_info, 0, offset);
      choices.items().push_back(Json::object({{"index", js(static_cast<int64_t>(i))},
                                              {"text", js(echo_of(i) + choice.content)},
                                              {"logprobs", std::move(logprobs)},
                                              {"finish_reason", js(openai_finish(choice))}}));
    }
    Json body = frame(answer, kObject);
    body.set("choices", std::move(choices));
    body.set("usage", openai_usage(answer));
    return body.dump();
  }

 private:
  std::string echo_of(size_t index) const {
    const size_t prompt = index / static_cast<size_t>(options_.choices_per_prompt);
    return prompt < options_.echo.size() ? options_.echo[prompt] : std::string();
  }
  Json logprobs_of(const std::vector<engine::OutputToken>& tokens,
                   size_t from,
                   int64_t& offset) const {
    Json names = Json::array(), values = Json::array(), tops = Json::array(),
         offsets = Json::array();
    for (size_t i = from; i < tokens.size(); ++i) {
      const auto name = [&](int64_t token) {
        return text::repair_utf8(tokenizer_.token_bytes(static_cast<int32_t>(token)));
      };
      names.items().push_back(js(name(tokens[i].token)));
      values.items().push_back(js(finite(tokens[i].logprob)));
      Json top = Json::object();
      for (const engine::TokenLogprob& other : tokens[i].top)
        top.set(name(other.token), js(finite(other.logprob)));
      tops.items().push_back(std::move(top));
      offsets.items().push_back(js(offset));
      offset += std::ssize(tokens[i].text);
    }
    return Json::object({{"tokens", std::move(names)},
                         {"token_logprobs", std::move(values)},
                         {"top_logprobs", std::move(tops)},
                         {"text_offset", std::move(offsets)}});
  }
  void write(const Answer& answer,
             size_t index,
             const std::string& text,
             Json logprobs,
             Json finish,
             std::string& out) {
    write_chunk(answer, kObject,
                Json::array({Json::object({{"index", js(static_cast<int64_t>(index))},
                                           {"text", js(text)},
                                           {"logprobs", std::move(logprobs)},
                                           {"finish_reason", std::move(finish)}})}),
                out);
  }
  std::vector<size_t> sent_;
  std::vector<int64_t> offset_;
};

}  // namespace

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

Json openai_usage(const Answer& answer) {
  Json prompt = Json::object({{"cached_tokens", js(answer.cached_tokens)},
                              {"disk_tokens", js(answer.disk_tokens)},
                              {"miss_reason", js(answer.miss)}});
  Json completion = Json::object({{"reasoning_tokens", js(answer.reasoning_tokens())}});
  return Json::object({{"prompt_tokens", js(answer.prompt_tokens)},
                       {"completion_tokens", js(answer.completion_tokens())},
                       {"total_tokens", js(answer.prompt_tokens + answer.completion_tokens())},
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
  if (!event.empty()) out += concat("event: ", event, "\n");
  out += "data: ";
  out += data.dump();
  out += "\n\n";
}

std::unique_ptr<Format> chat_completion_format(const text::Tokenizer& tokenizer,
                                               OpenAiFormatOptions options) {
  return std::make_unique<ChatFormat>(tokenizer, std::move(options));
}
std::unique_ptr<Format> text_completion_format(const text::Tokenizer& tokenizer,
                                               OpenAiFormatOptions options) {
  return std::make_unique<TextFormat>(tokenizer, std::move(options));
}

}  // namespace hadal::server
