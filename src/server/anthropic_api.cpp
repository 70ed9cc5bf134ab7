#include "server/anthropic_api.h"

#include <algorithm>

#include "server/openai_types.h"
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

Json error_json(const RequestError& error) {
  std::string message = text::repair_utf8(error.what());
  return Json::object({{"type", js("error")},
                       {"error", Json::object({{"type", js(error_type(error.status()))},
                                               {"message", js(message)}})}});
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
  return Json::object({{"input_tokens", js(answer.prompt_tokens - answer.cached_tokens)},
                       {"cache_creation_input_tokens", js(int64_t{0})},
                       {"cache_read_input_tokens", js(answer.cached_tokens)},
                       {"cache_read_disk_tokens", js(answer.disk_tokens)},
                       {"miss_reason", js(answer.miss)},
                       {"output_tokens", js(output_tokens)}});
}

/// Clients hand thinking back with its signature; ours proves nothing and is not checked.
constexpr const char* kSignature = "hadal";

class MessageFormat final : public Format {
 public:
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
    event(out, "message_delta",
          {{"delta", Json::object({{"stop_reason", js(stop_reason(choice))},
                                   {"stop_sequence", stop_sequence(choice)}})},
           {"usage", usage(answer, choice.completion_tokens)}});
  }
  void end(const Answer&, std::string& out) override { event(out, "message_stop", {}); }

  std::string whole(const Answer& answer) override {
    const Choice& choice = answer.choices.front();
    Json content = Json::array();
    if (!choice.reasoning.empty())
      content.items().push_back(Json::object({{"type", js("thinking")},
                                              {"thinking", js(choice.reasoning)},
                                              {"signature", js(kSignature)}}));
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
    message.set("usage", usage(answer, choice.completion_tokens));
    return message.dump();
  }
  HttpResponse error(const RequestError& error) override { return anthropic_error(error); }
  void stream_error(const RequestError& error, std::string& out) override {
    write_sse(out, error_json(error), "error");
  }
  void ping(std::string& out) override { event(out, "ping", {}); }

 private:
  enum class Block : uint8_t { kNone, kText, kThinking, kTool };

  static Json frame(const Answer& answer) {
    return Json::object({{"id", js(answer.id)},
                         {"type", js("message")},
                         {"role", js("assistant")},
                         {"model", js(answer.model)}});
  }
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
      delta(Json::object({{"type", js("signature_delta")}, {"signature", js(kSignature)}}), out);
    event(out, "content_block_stop", {{"index", js(index_)}});
    open_ = Block::kNone;
    ++index_;
  }

  Block open_ = Block::kNone;
  int64_t index_ = 0;
};

// --- requests
// ----------------------------------------------------------------------------------------

void append(std::string& text, const std::string& more) {
  if (!text.empty()) text += "\n\n";
  text += more;
}

void read_user(const Fields& message, const Json& content, std::vector<Json>& out) {
  for (size_t i = 0; i < content.items().size(); ++i) {
    const Fields block(content.items()[i], concat(message.path("content"), "[", i, "]"));
    const std::string type = block.string("type");
    if (type == "text") {
      out.push_back(Json::object({{"role", js("user")}, {"content", js(block.string("text"))}}));
    } else if (type == "tool_result") {
      std::string result = read_text(block, "content", {"text"});
      if (block.boolean_or("is_error", false)) result.insert(0, "Error: ");
      out.push_back(Json::object({{"role", js("tool")},
                                  {"tool_call_id", js(block.string("tool_use_id"))},
                                  {"content", js(result)}}));
    } else {
      block.fail("type",
                 concat("'", type.substr(0, 40), "' is not supported; this model reads text"));
    }
  }
}

Json read_assistant(const Fields& message, const Json& content) {
  std::string text, reasoning;
  Json calls = Json::array();
  for (size_t i = 0; i < content.items().size(); ++i) {
    const Fields block(content.items()[i], concat(message.path("content"), "[", i, "]"));
    const std::string type = block.string("type");
    if (type == "text") {
      append(text, block.string("text"));
    } else if (type == "thinking") {
      append(reasoning, block.string("thinking"));
    } else if (type == "tool_use") {
      const Json* input = block.object_or_null("input");
      calls.items().push_back(Json::object(
          {{"id", js(block.string("id"))},
           {"type", js("function")},
           {"function",
            Json::object({{"name", js(block.string("name"))},
                          {"arguments", js(input != nullptr ? input->dump() : "{}")}})}}));
    } else if (type != "redacted_thinking") {
      block.fail("type", concat("'", type.substr(0, 40), "' is not supported"));
    }
  }
  Json out = Json::object({{"role", js("assistant")}, {"content", js(text)}});
  if (!reasoning.empty()) out.set("reasoning_content", js(reasoning));
  if (!calls.items().empty()) out.set("tool_calls", std::move(calls));
  return out;
}

void read_messages(const Context& context, const Fields& body, ChatJob& chat) {
  if (body.has("system"))
    chat.messages.push_back(Json::object(
        {{"role", js("system")}, {"content", js(read_text(body, "system", {"text"}))}}));
  const Json* messages = body.array_or_null("messages");
  if (messages == nullptr || messages->items().empty())
    body.fail("messages", "expected at least one message");
  if (messages->items().size() > context.options.max_messages)
    body.fail("messages", concat("more than ", context.options.max_messages, " messages"));
  for (size_t i = 0; i < messages->items().size(); ++i) {
    const Fields message(messages->items()[i], concat("messages[", i, "]"));
    const std::string role = message.string("role");
    if (role != "user" && role != "assistant") message.fail("role", "expected user or assistant");
    const Json* content = message.find("content");
    if (content == nullptr) message.fail("content", "expected text, found nothing");
    if (content->is_string()) {
      chat.messages.push_back(Json::object({{"role", js(role)}, {"content", *content}}));
      continue;
    }
    const Json& blocks = *message.array_or_null("content");
    if (blocks.items().empty()) message.fail("content", "expected at least one block");
    if (role == "user") {
      read_user(message, blocks, chat.messages);
    } else {
      chat.messages.push_back(read_assistant(message, blocks));
    }
  }
  const Json& last = chat.messages.back();
  if (last.find("role")->text() == "assistant" && last.find("tool_calls") != nullptr)
    body.fail("messages", "the last message has tool calls without their results");
}

void read_tools(const Context& context, const Fields& body, ChatJob& chat) {
  if (const Json* tools = body.array_or_null("tools")) {
    if (tools->items().size() > context.options.max_tools)
      body.fail("tools", concat("more than ", context.options.max_tools, " tools"));
    for (size_t i = 0; i < tools->items().size(); ++i) {
      const Fields tool(tools->items()[i], concat("tools[", i, "]"));
      const std::string type = tool.string_or("type", "custom");
      if (type != "custom")
        tool.fail("type",
                  concat("'", type.substr(0, 40), "' does not run here; only custom tools"));
      Json function = Json::object({{"name", js(tool.string("name"))}});
      if (tool.has("description")) function.set("description", js(tool.string("description")));
      if (const Json* schema = tool.object_or_null("input_schema"))
        function.set("parameters", *schema);
      if (tool.boolean_or("strict", false)) function.set("strict", js(true));
      chat.tools.push_back(read_function(Fields(function, concat("tools[", i, "]"))));
    }
  }
  if (!body.has("tool_choice")) return;
  const Fields choice = body.object("tool_choice");
  const std::string type = choice.string("type");
  chat.parallel_calls = !choice.boolean_or("disable_parallel_tool_use", false);
  if (type == "any") {
    chat.tool_choice = ToolChoice::kRequired;
  } else if (type == "none") {
    chat.tool_choice = ToolChoice::kNone;
  } else if (type == "tool") {
    chat.tool_choice = ToolChoice::kNamed;
    chat.tool_name = choice.string("name");
  } else if (type != "auto") {
    choice.fail("type", "expected auto, any, tool or none");
  }
}

ChatJob read_chat(const Context& context, const Fields& body) {
  ChatJob chat;
  chat.default_thinking = false;
  read_messages(context, body, chat);
  read_tools(context, body, chat);
  if (body.has("thinking")) {
    const Fields thinking = body.object("thinking");
    const std::string type = thinking.string("type");
    if (type != "enabled" && type != "disabled" && type != "adaptive")
      thinking.fail("type", "expected enabled, disabled or adaptive");
    chat.thinking = type != "disabled";
    thinking.integer_or("budget_tokens", 1024, 1, int64_t{1} << 40);  // checked, not a limit here
  }
  if (body.has("output_config")) {
    const Fields config = body.object("output_config");
    // Effort says how much to think, not whether to.
    if (config.has("effort") && !chat.thinking) chat.thinking = false;
    chat.effort = config.string_or("effort", "");
    if (config.has("format")) {
      const Fields format = config.object("format");
      read_format(format, format, chat);
    }
  }
  if (body.has("output_format")) {
    const Fields format = body.object("output_format");
    read_format(format, format, chat);
  }
  return chat;
}

}  // namespace

HttpResponse anthropic_error(const RequestError& error) {
  HttpResponse response;
  response.status = error.status();
  const std::string id = random_id("req_");
  Json body = error_json(error);
  body.set("request_id", js(id));
  response.body = body.dump();
  response.headers.emplace_back("request-id", id);
  return response;
}

Job message_job(const Context& context, const Json& json) {
  const Fields body(json, "");
  const std::string model = read_model(context, body);
  if (!body.has("max_tokens")) body.fail("max_tokens", "expected an integer, found nothing");
  ChatJob chat = read_chat(context, body);
  read_sampling(context, body, chat.base);
  chat.base.stop = read_stop(body, "stop_sequences", context.options);
  chat.base.max_tokens = read_max_tokens(body, "max_tokens");
  const bool stream = body.boolean_or("stream", false);
  Job job = make_chat_job(context, std::move(chat));
  job.stream = stream;
  job.id = random_id("msg_");
  job.model = model;
  job.format = std::make_unique<MessageFormat>();
  return job;
}

int64_t count_message_tokens(const Context& context, const Json& json) {
  const Fields body(json, "");
  read_model(context, body);
  return std::ssize(chat_prompt_tokens(context, read_chat(context, body)));
}

}  // namespace hadal::server
