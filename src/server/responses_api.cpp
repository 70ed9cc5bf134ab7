// OpenAI's /v1/responses: items in, items out, and a stream of events about them.
#include <algorithm>

#include "server/openai_api.h"
#include "server/openai_types.h"
#include "text/utf8.h"

namespace hadal::server {
namespace {

/// What a response repeats of its request.
struct Echo {
  Json instructions, max_output_tokens, temperature, top_p, effort, format, tools, tool_choice,
      metadata, parallel;
};

Json output_text(const std::string& text) {
  return Json::object({{"type", js("output_text")},
                       {"text", js(text)},
                       {"annotations", Json::array()},
                       {"logprobs", Json::array()}});
}
Json reasoning_text(const std::string& text) {
  return Json::object({{"type", js("reasoning_text")}, {"text", js(text)}});
}

class ResponseFormat final : public Format {
 public:
  explicit ResponseFormat(Echo echo)
      : echo_(std::move(echo)), message_id_(random_id("msg_")), reasoning_id_(random_id("rs_")) {}

  bool begins_at_once() const override { return true; }
  void begin(const Answer& answer, std::string& out) override {
    begun_.id = answer.id;
    begun_.model = answer.model;
    begun_.created = answer.created;
    event(out, "response.created", {{"response", response(answer, "in_progress")}});
    event(out, "response.in_progress", {{"response", response(answer, "in_progress")}});
  }
  void text(const Answer& answer,
            size_t index,
            Kind kind,
            const std::string& text,
            std::string& out) override {
    const bool content = kind == Kind::kContent;
    const Open wanted = content ? Open::kMessage : Open::kReasoning;
    if (open_ != wanted) {
      close_item(answer.choices[index], out);
      open_ = wanted;
      const std::string& id = content ? message_id_ : reasoning_id_;
      event(out, "response.output_item.added",
            {{"output_index", js(item_)},
             {"item", content ? message(id, "in_progress", Json::array())
                              : reasoning(id, "in_progress", Json::array())}});
      Members part = place(id);
      part.emplace_back("part", content ? output_text("") : reasoning_text(""));
      event(out, "response.content_part.added", std::move(part));
    }
    Members delta = place(content ? message_id_ : reasoning_id_);
    delta.emplace_back("delta", js(text));
    if (content) delta.emplace_back("logprobs", Json::array());
    event(out, content ? "response.output_text.delta" : "response.reasoning_text.delta",
          std::move(delta));
  }
  void call_begun(const Answer& answer, size_t index, std::string& out) override {
    const Choice& choice = answer.choices[index];
    close_item(choice, out);
    open_ = Open::kCall;
    event(out, "response.output_item.added",
          {{"output_index", js(item_)}, {"item", function_call(*choice.open_call, "in_progress")}});
  }
  void call_arguments(const Answer& answer,
                      size_t index,
                      const std::string& arguments,
                      std::string& out) override {
    event(out, "response.function_call_arguments.delta",
          {{"item_id", js("fc_" + answer.choices[index].open_call->id)},
           {"output_index", js(item_)},
           {"delta", js(arguments)}});
  }
  void call_ended(const Answer& answer, size_t index, std::string& out) override {
    const CallRecord& call = answer.choices[index].calls.back();
    event(out, "response.function_call_arguments.done",
          {{"item_id", js("fc_" + call.id)},
           {"output_index", js(item_)},
           {"name", js(call.name)},
           {"arguments", js(call.arguments)}});
    close_call(call, "completed", out);
  }
  void call_dropped(const Answer& answer, size_t index, std::string& out) override {
    close_item(answer.choices[index], out);
  }
  void finished(const Answer& answer, size_t index, std::string& out) override {
    close_item(answer.choices[index], out);
  }
  void end(const Answer& answer, std::string& out) override {
    const char* status = status_of(answer);
    event(out, std::string(status) == "completed" ? "response.completed" : "response.incomplete",
          {{"response", response(answer, status)}});
  }
  std::string whole(const Answer& answer) override {
    return response(answer, status_of(answer)).dump();
  }
  HttpResponse error(const RequestError& error) override { return openai_error(error); }
  void stream_error(const RequestError& error, std::string& out) override {
    Json failed = response(begun_, "failed");
    failed.set("error", Json::object({{"code", js("server_error")},
                                      {"message", js(text::repair_utf8(error.what()))}}));
    event(out, "response.failed", {{"response", std::move(failed)}});
  }

 private:
  enum class Open : uint8_t { kNone, kReasoning, kMessage, kCall };

  static const char* status_of(const Answer& answer) {
    const Ending ending = answer.choices.front().ending();
    return ending == Ending::kLength || ending == Ending::kMalformed ? "incomplete" : "completed";
  }
  static Json message(const std::string& id, const char* status, Json content) {
    return Json::object({{"id", js(id)},
                         {"type", js("message")},
                         {"status", js(status)},
                         {"role", js("assistant")},
                         {"content", std::move(content)}});
  }
  static Json reasoning(const std::string& id, const char* status, Json content) {
    return Json::object({{"id", js(id)},
                         {"type", js("reasoning")},
                         {"status", js(status)},
                         {"summary", Json::array()},
                         {"content", std::move(content)}});
  }
  static Json function_call(const CallRecord& call, const char* status) {
    return Json::object({{"id", js("fc_" + call.id)},
                         {"type", js("function_call")},
                         {"status", js(status)},
                         {"call_id", js(call.id)},
                         {"name", js(call.name)},
                         {"arguments", js(call.arguments)}});
  }
  Members place(const std::string& id) const {
    return {{"item_id", js(id)}, {"output_index", js(item_)}, {"content_index", js(int64_t{0})}};
  }
  void event(std::string& out, const char* name, Members members) {
    members.insert(members.begin(), {{"type", js(name)}, {"sequence_number", js(sequence_++)}});
    write_sse(out, Json::object(std::move(members)), name);
  }
  void close_call(const CallRecord& call, const char* status, std::string& out) {
    event(out, "response.output_item.done",
          {{"output_index", js(item_)}, {"item", function_call(call, status)}});
    open_ = Open::kNone;
    ++item_;
  }
  void close_item(const Choice& choice, std::string& out) {
    if (open_ == Open::kNone) return;
    if (open_ == Open::kCall) return close_call(*choice.open_call, "incomplete", out);
    const bool content = open_ == Open::kMessage;
    const std::string& id = content ? message_id_ : reasoning_id_;
    const std::string& text = content ? choice.content : choice.reasoning;
    const Json part = content ? output_text(text) : reasoning_text(text);
    Members done = place(id);
    done.emplace_back("text", js(text));
    if (content) done.emplace_back("logprobs", Json::array());
    event(out, content ? "response.output_text.done" : "response.reasoning_text.done",
          std::move(done));
    Members closed = place(id);
    closed.emplace_back("part", part);
    event(out, "response.content_part.done", std::move(closed));
    event(out, "response.output_item.done",
          {{"output_index", js(item_)},
           {"item", content ? message(id, "completed", Json::array({part}))
                            : reasoning(id, "completed", Json::array({part}))}});
    open_ = Open::kNone;
    ++item_;
  }
  Json response(const Answer& answer, const char* status) const {
    const bool over = std::string_view(status) != "in_progress";
    Json output = Json::array();
    Json usage, incomplete;
    if (over && !answer.choices.empty()) {
      const Choice& choice = answer.choices.front();
      const Ending ending = choice.ending();
      const bool cut = ending == Ending::kLength || ending == Ending::kMalformed;
      const char* item_status = cut ? "incomplete" : "completed";
      if (!choice.reasoning.empty())
        output.items().push_back(
            reasoning(reasoning_id_, item_status, Json::array({reasoning_text(choice.reasoning)})));
      if (!choice.content.empty())
        output.items().push_back(
            message(message_id_, item_status, Json::array({output_text(choice.content)})));
      for (const CallRecord& call : choice.calls)
        output.items().push_back(function_call(call, "completed"));
      if (choice.open_call)
        output.items().push_back(function_call(*choice.open_call, "incomplete"));
      if (cut)
        incomplete = Json::object(
            {{"reason", js(ending == Ending::kLength ? "max_output_tokens" : "malformed")}});
      const int64_t tokens = answer.completion_tokens();
      usage = Json::object(
          {{"input_tokens", js(answer.prompt_tokens)},
           {"input_tokens_details", Json::object({{"cached_tokens", js(answer.cached_tokens)},
                                                  {"disk_tokens", js(answer.disk_tokens)},
                                                  {"miss_reason", js(answer.miss)}})},
           {"output_tokens", js(tokens)},
           {"output_tokens_details",
            Json::object({{"reasoning_tokens", js(answer.reasoning_tokens())}})},
           {"total_tokens", js(answer.prompt_tokens + tokens)}});
    }
    return Json::object(
        {{"id", js(answer.id)},
         {"object", js("response")},
         {"created_at", js(answer.created)},
         {"status", js(status)},
         {"error", Json()},
         {"incomplete_details", std::move(incomplete)},
         {"instructions", echo_.instructions},
         {"max_output_tokens", echo_.max_output_tokens},
         {"metadata", echo_.metadata},
         {"model", js(answer.model)},
         {"output", std::move(output)},
         {"parallel_tool_calls", echo_.parallel},
         {"previous_response_id", Json()},
         {"reasoning", Json::object({{"effort", echo_.effort}, {"summary", Json()}})},
         {"store", js(false)},
         {"temperature", echo_.temperature},
         {"text", Json::object({{"format", echo_.format}})},
         {"tool_choice", echo_.tool_choice},
         {"tools", echo_.tools},
         {"top_p", echo_.top_p},
         {"truncation", js("disabled")},
         {"usage", std::move(usage)}});
  }

  const Echo echo_;
  Answer begun_;  ///< names the response where it fails
  const std::string message_id_, reasoning_id_;
  Open open_ = Open::kNone;
  int64_t item_ = 0, sequence_ = 0;
};

// --- requests
// ----------------------------------------------------------------------------------------

Json empty_assistant() { return Json::object({{"role", js("assistant")}, {"content", js("")}}); }

/// Reasoning, a message and calls in a row are one turn of the assistant's.
void read_item(const Fields& item, std::vector<Json>& messages) {
  const std::string type = item.string_or("type", "message");
  const auto last_is_assistant = [&] {
    return !messages.empty() && messages.back().find("role")->text() == "assistant";
  };
  if (type == "message") {
    const std::string role = item.string("role");
    const std::string text = read_text(item, "content", {"input_text", "output_text", "text"});
    if (role == "assistant") {
      const bool joins = last_is_assistant() && !messages.back().find("content")->truthy() &&
                         messages.back().find("tool_calls") == nullptr;
      if (!joins) messages.push_back(empty_assistant());
      messages.back().set("content", js(text));
    } else if (role == "user") {
      messages.push_back(Json::object({{"role", js(role)}, {"content", js(text)}}));
    } else if (role == "system" || role == "developer") {
      messages.push_back(Json::object({{"role", js("system")}, {"content", js(text)}}));
    } else {
      item.fail("role", "expected user, assistant, system or developer");
    }
  } else if (type == "reasoning") {
    messages.push_back(empty_assistant());
    std::string text = read_text(item, "content", {"reasoning_text", "text"});
    if (text.empty()) text = read_text(item, "summary", {"summary_text"});
    messages.back().set("reasoning_content", js(text));
  } else if (type == "function_call") {
    if (!last_is_assistant()) messages.push_back(empty_assistant());
    Json& message = messages.back();
    if (message.find("tool_calls") == nullptr) message.set("tool_calls", Json::array());
    message.find("tool_calls")
        ->items()
        .push_back(Json::object(
            {{"id", js(item.string("call_id"))},
             {"type", js("function")},
             {"function", Json::object({{"name", js(item.string("name"))},
                                        {"arguments", js(item.string("arguments"))}})}}));
  } else if (type == "function_call_output") {
    messages.push_back(
        Json::object({{"role", js("tool")},
                      {"tool_call_id", js(item.string("call_id"))},
                      {"content", js(read_text(item, "output", {"input_text", "text"}))}}));
  } else {
    item.fail("type", concat("'", type.substr(0, 40), "' is not supported"));
  }
}

void read_input(const Context& context, const Fields& body, ChatJob& chat) {
  if (body.has("instructions"))
    chat.messages.push_back(
        Json::object({{"role", js("system")}, {"content", js(body.string("instructions"))}}));
  const Json* input = body.find("input");
  if (input == nullptr) body.fail("input", "expected text or items, found nothing");
  if (input->is_string()) {
    chat.messages.push_back(Json::object({{"role", js("user")}, {"content", *input}}));
    return;
  }
  const Json& items = *body.array_or_null("input");
  if (items.items().empty()) body.fail("input", "expected at least one item");
  if (items.items().size() > context.options.max_messages)
    body.fail("input", concat("more than ", context.options.max_messages, " items"));
  for (size_t i = 0; i < items.items().size(); ++i)
    read_item(Fields(items.items()[i], concat("input[", i, "]")), chat.messages);
  const std::string role = chat.messages.back().find("role")->text();
  if (role != "user" && role != "tool")
    body.fail("input", "the last item must be a user's message or a function's output");
}

void read_tools(const Context& context, const Fields& body, ChatJob& chat) {
  chat.parallel_calls = body.boolean_or("parallel_tool_calls", true);
  if (const Json* tools = body.array_or_null("tools")) {
    if (tools->items().size() > context.options.max_tools)
      body.fail("tools", concat("more than ", context.options.max_tools, " tools"));
    for (size_t i = 0; i < tools->items().size(); ++i) {
      const Fields tool(tools->items()[i], concat("tools[", i, "]"));
      if (tool.string("type") != "function") tool.fail("type", "only functions are supported");
      chat.tools.push_back(read_function(tool));
    }
  }
  const Json* choice = body.find("tool_choice");
  if (choice == nullptr) return;
  if (choice->is_object()) {
    const Fields fields(*choice, "tool_choice");
    if (fields.string("type") != "function") fields.fail("type", "expected function");
    chat.tool_choice = ToolChoice::kNamed;
    chat.tool_name = fields.string("name");
    return;
  }
  const std::string name = body.string("tool_choice");
  if (name != "auto" && name != "none" && name != "required")
    body.fail("tool_choice", "expected none, auto, required or a function");
  if (name == "none") chat.tool_choice = ToolChoice::kNone;
  if (name == "required") chat.tool_choice = ToolChoice::kRequired;
}

Json copy_or(const Fields& body, std::string_view key, const Json& fallback) {
  const Json* value = body.find(key);
  return value != nullptr ? *value : fallback;
}

}  // namespace

Job response_job(const Context& context, const Json& json) {
  const Fields body(json, "");
  const std::string model = read_model(context, body);
  if (body.has("previous_response_id"))
    body.fail("previous_response_id", "responses are not stored; send the items again");
  if (body.boolean_or("background", false))
    body.fail("background", "responses are not stored, so none can run in the background");
  ChatJob chat;
  chat.default_thinking = context.options.default_thinking;
  read_input(context, body, chat);
  read_tools(context, body, chat);
  Echo echo;
  echo.format = Json::object({{"type", js("text")}});
  if (body.has("text")) {
    const Fields text = body.object("text");
    if (text.has("format")) {
      const Fields format = text.object("format");
      read_format(format, format, chat);
      echo.format = format.json();
    }
  }
  if (body.has("reasoning")) chat.effort = body.object("reasoning").string_or("effort", "");
  read_sampling(context, body, chat.base);
  chat.base.stop = read_stop(body, "stop", context.options);
  chat.base.max_tokens = read_max_tokens(body, "max_output_tokens");
  echo.instructions = copy_or(body, "instructions", Json());
  echo.max_output_tokens = copy_or(body, "max_output_tokens", Json());
  echo.temperature = js(chat.base.sampling.temperature);
  echo.top_p = js(body.number_or("top_p", context.options.default_sampling.top_p, 0.0, 1.0));
  echo.effort = chat.effort.empty() ? Json() : js(chat.effort);
  echo.tools = copy_or(body, "tools", Json::array());
  echo.tool_choice = copy_or(body, "tool_choice", js("auto"));
  echo.metadata = copy_or(body, "metadata", Json::object());
  echo.parallel = js(chat.parallel_calls);
  const bool stream = body.boolean_or("stream", false);
  Job job = make_chat_job(context, std::move(chat));
  job.stream = stream;
  job.id = random_id("resp_");
  job.model = model;
  job.format = std::make_unique<ResponseFormat>(std::move(echo));
  return job;
}

}  // namespace hadal::server
