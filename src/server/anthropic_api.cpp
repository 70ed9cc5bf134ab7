#include "server/anthropic_api.h"

#include <utility>

#include "base/log.h"
#include "server/anthropic_request.h"
#include "server/cache_key.h"
#include "server/openai_types.h"
#include "server/sealed_text.h"
#include "text/utf8.h"

namespace hadal::server {
namespace {

const char* anthropic_error_type(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 413:
      return "request_too_large";
    case 429:
      return "rate_limit_error";
    case 503:
      return "overloaded_error";
    case 504:
      return "timeout_error";
    default:
      return status < 500 ? "invalid_request_error" : "api_error";
  }
}

Json error_json(const RequestError& error, const std::string& request_id) {
  std::string message = text::repair_utf8(error.what());
  return Json::object({{"type", js("error")},
                       {"error", Json::object({{"type", js(anthropic_error_type(error.status()))},
                                               {"message", js(message)}})},
                       {"request_id", js(request_id)}});
}

const char* stop_reason(const Choice& choice) {
  switch (choice.ending()) {
    case Ending::kLength:
    case Ending::kMalformed:
      return "max_tokens";  // of what clients know, what says that something is missing
    case Ending::kToolCalls:
      return "tool_use";
    case Ending::kStopString:
      return "stop_sequence";
    case Ending::kStop:
      break;
  }
  return "end_turn";
}

Json stop_sequence(const Choice& choice) {
  return choice.matched_stop.empty() ? Json() : js(choice.matched_stop);
}

Json usage(const Answer& answer, int64_t output_tokens) {
  return Json::object(
      {{"input_tokens", js(answer.prompt_tokens - answer.cached_tokens)},
       {"cache_creation_input_tokens", js(int64_t{0})},
       {"cache_creation", Json::object({{"ephemeral_5m_input_tokens", js(int64_t{0})},
                                        {"ephemeral_1h_input_tokens", js(int64_t{0})}})},
       {"cache_read_input_tokens", js(answer.cached_tokens)},
       {"cache_read_disk_tokens", js(answer.disk_tokens)},
       {"miss_reason", js(answer.miss)},
       {"output_tokens", js(output_tokens)},
       {"service_tier", js("standard")}});
}

/// Clients hand thinking back with its signature. Where they have the text, the signature says
/// nothing; where they asked for none, it holds the text for the next turn.
constexpr const char* kSignature = "hadal";

/// What a request asks of its answer's form.
struct Shape {
  std::vector<std::string> notes;
  bool omit_thinking = false, context_edits = false;
};

class MessageFormat final : public Format {
 public:
  explicit MessageFormat(Shape shape) : shape_(std::move(shape)) {}

  void name_request(const std::string& id) override { request_id_ = id; }
  void begin(const Answer& answer, std::string& out) override {
    Json message = frame(answer);
    message.set("content", Json::array());
    message.set("stop_reason", Json());
    message.set("stop_sequence", Json());
    message.set("usage", usage(answer, 0));
    event(out, "message_start", {{"message", std::move(message)}});
  }
  void text(const Answer&, size_t, Kind kind, const std::string& text, std::string& out) override {
    const bool content = kind == Kind::kContent;
    const Block wanted = content ? Block::kText : Block::kThinking;
    if (open_ != wanted) {
      close_block(out);
      open_ = wanted;
      open_block(content
                     ? Json::object({{"type", js("text")}, {"text", js("")}})
                     : Json::object(
                           {{"type", js("thinking")}, {"thinking", js("")}, {"signature", js("")}}),
                 out);
    }
    if (!content && shape_.omit_thinking) {
      omitted_ += text;
      return;
    }
    delta(content ? Json::object({{"type", js("text_delta")}, {"text", js(text)}})
                  : Json::object({{"type", js("thinking_delta")}, {"thinking", js(text)}}),
          out);
  }
  void call_begun(const Answer& answer, size_t index, std::string& out) override {
    close_block(out);
    const CallRecord& call = *answer.choices[index].open_call;
    open_ = Block::kTool;
    open_block(Json::object({{"type", js("tool_use")},
                             {"id", js(call.id)},
                             {"name", js(call.name)},
                             {"input", Json::object()}}),
               out);
  }
  void call_arguments(const Answer&,
                      size_t,
                      const std::string& arguments,
                      std::string& out) override {
    delta(Json::object({{"type", js("input_json_delta")}, {"partial_json", js(arguments)}}), out);
  }
  void call_ended(const Answer&, size_t, std::string& out) override { close_block(out); }
  void finished(const Answer& answer, size_t index, std::string& out) override {
    close_block(out);
    const Choice& choice = answer.choices[index];
    Json end = Json::object(
        {{"stop_reason", js(stop_reason(choice))}, {"stop_sequence", stop_sequence(choice)}});
    if (!choice.malformed.empty()) end.set("malformed", js(choice.malformed));
    Members members = {{"delta", std::move(end)},
                       {"usage", usage(answer, choice.completion_tokens)}};
    if (shape_.context_edits) members.emplace_back("context_management", no_edits());
    event(out, "message_delta", std::move(members));
  }
  void end(const Answer&, std::string& out) override { event(out, "message_stop", {}); }

  std::string whole(const Answer& answer) override {
    const Choice& choice = answer.choices.front();
    Json content = Json::array();
    if (!choice.reasoning.empty())
      content.items().push_back(Json::object(
          {{"type", js("thinking")},
           {"thinking", js(shape_.omit_thinking ? "" : choice.reasoning)},
           {"signature",
            js(shape_.omit_thinking ? seal_text(choice.reasoning) : std::string(kSignature))}}));
    if (!choice.content.empty())
      content.items().push_back(Json::object({{"type", js("text")}, {"text", js(choice.content)}}));
    for (const CallRecord& call : choice.calls)
      content.items().push_back(Json::object({{"type", js("tool_use")},
                                              {"id", js(call.id)},
                                              {"name", js(call.name)},
                                              {"input", Json::parse(call.arguments, "input")}}));
    Json message = frame(answer);
    message.set("content", std::move(content));
    message.set("stop_reason", js(stop_reason(choice)));
    message.set("stop_sequence", stop_sequence(choice));
    if (!choice.malformed.empty()) message.set("malformed", js(choice.malformed));
    message.set("usage", usage(answer, choice.completion_tokens));
    if (shape_.context_edits) message.set("context_management", no_edits());
    return message.dump();
  }
  HttpResponse error(const RequestError& error) override {
    return anthropic_error(error, request_id_);
  }
  void stream_error(const RequestError& error, std::string& out) override {
    write_sse(out, error_json(error, request_id_), "error");
  }
  void ping(std::string& out) override { event(out, "ping", {}); }

 private:
  enum class Block : uint8_t { kNone, kText, kThinking, kTool };

  Json frame(const Answer& answer) const {
    Json message = Json::object({{"id", js(answer.id)},
                                 {"type", js("message")},
                                 {"role", js("assistant")},
                                 {"model", js(answer.model)}});
    if (!shape_.notes.empty()) {
      Json notes = Json::array();
      for (const std::string& note : shape_.notes) notes.items().push_back(js(note));
      message.set("notes", std::move(notes));
    }
    return message;
  }
  static Json no_edits() { return Json::object({{"applied_edits", Json::array()}}); }
  static void event(std::string& out, const char* name, Members members) {
    members.insert(members.begin(), {"type", js(name)});
    write_sse(out, Json::object(std::move(members)), name);
  }
  void open_block(Json block, std::string& out) {
    event(out, "content_block_start", {{"index", js(index_)}, {"content_block", std::move(block)}});
  }
  void delta(Json content, std::string& out) {
    event(out, "content_block_delta", {{"index", js(index_)}, {"delta", std::move(content)}});
  }
  void close_block(std::string& out) {
    if (open_ == Block::kNone) return;
    if (open_ == Block::kThinking)
      delta(Json::object({{"type", js("signature_delta")},
                          {"signature", js(shape_.omit_thinking ? seal_text(omitted_)
                                                                : std::string(kSignature))}}),
            out);
    event(out, "content_block_stop", {{"index", js(index_)}});
    omitted_.clear();
    open_ = Block::kNone;
    ++index_;
  }

  const Shape shape_;
  std::string request_id_, omitted_;
  Block open_ = Block::kNone;
  int64_t index_ = 0;
};

/// Clients match these words, and the numbers in them, to shorten their conversation.
RequestError too_long(const Context& context, const ChatJob& chat) {
  return {400,
          concat("prompt is too long: ", chat_prompt_tokens(context, chat).size(), " tokens > ",
                 context.max_context(), " maximum"),
          "messages", "context_length_exceeded"};
}

}  // namespace

HttpResponse anthropic_error(const RequestError& error, const std::string& request_id) {
  HttpResponse response;
  response.status = error.status();
  response.body = error_json(error, request_id).dump();
  return response;
}

Job message_job(const Context& context, const Json& json) {
  const Fields body(json, "");
  const std::string model = read_model(context, body);
  if (!body.has("max_tokens")) body.fail("max_tokens", "expected an integer, found nothing");
  MessagesRequest read = read_messages_request(context, body);
  ChatJob& chat = read.chat;
  read_sampling(context, body, chat.base);
  chat.base.cache_key = read_cache_marks(body, chat.messages);
  chat.base.stop = read_stop(body, "stop_sequences", context.options);
  chat.base.max_tokens = read_max_tokens(body, "max_tokens");
  const bool stream = body.boolean_or("stream", false);
  Job job;
  try {
    job = make_chat_job(context, chat);
  } catch (const RequestError& error) {
    if (error.code() == "context_length_exceeded") throw too_long(context, chat);
    throw;
  }
  job.stream = stream;
  job.id = random_id("msg_");
  job.model = model;
  for (const std::string& note : read.notes) log::info("server", job.id, ": ", note);
  job.format = std::make_unique<MessageFormat>(
      Shape{std::move(read.notes), read.omit_thinking, read.context_edits});
  return job;
}

int64_t count_message_tokens(const Context& context, const Json& json) {
  const Fields body(json, "");
  read_model(context, body);
  return std::ssize(chat_prompt_tokens(context, read_messages_request(context, body).chat));
}

}  // namespace hadal::server
