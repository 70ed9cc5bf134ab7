#include "server/openai_api.h"

#include <algorithm>
#include <charconv>

#include "server/openai_types.h"
#include "text/chat_tokens.h"

namespace hadal::server {
namespace {

/// One of a client's messages in the form the chat encoding takes.
Json read_message(const Fields& message) {
  const std::string role = message.string("role");
  if (role == "system" || role == "developer" || role == "latest_reminder") {
    // OpenAI's developer messages are what system messages were.
    return Json::object({{"role", js(role == "latest_reminder" ? role : "system")},
                         {"content", js(read_text(message, "content", {"text", "input_text"}))}});
  }
  if (role == "user") {
    if (!message.has("content")) message.fail("content", "expected text, found nothing");
    return Json::object(
        {{"role", js(role)}, {"content", js(read_text(message, "content", {"text"}))}});
  }
  if (role == "tool") {
    return Json::object({{"role", js(role)},
                         {"tool_call_id", js(message.string("tool_call_id"))},
                         {"content", js(read_text(message, "content", {"text"}))}});
  }
  if (role != "assistant")
    message.fail("role", "expected system, developer, user, assistant, tool or latest_reminder");
  Json out = Json::object(
      {{"role", js(role)}, {"content", js(read_text(message, "content", {"text", "refusal"}))}});
  const std::string reasoning =
      message.string_or("reasoning_content", message.string_or("reasoning", ""));
  if (!reasoning.empty()) out.set("reasoning_content", js(reasoning));
  const Json* calls = message.array_or_null("tool_calls");
  if (calls == nullptr || calls->items().empty()) return out;
  Json list = Json::array();
  for (size_t i = 0; i < calls->items().size(); ++i) {
    const Fields call(calls->items()[i], concat(message.path("tool_calls"), "[", i, "]"));
    const Fields function = call.object("function");
    list.items().push_back(Json::object(
        {{"id", js(call.string("id"))},
         {"type", js("function")},
         {"function", Json::object({{"name", js(function.string("name"))},
                                    {"arguments", js(function.string("arguments"))}})}}));
  }
  out.set("tool_calls", std::move(list));
  return out;
}

void read_messages(const Context& context, const Fields& body, ChatJob& chat) {
  const Json* messages = body.array_or_null("messages");
  if (messages == nullptr || messages->items().empty())
    body.fail("messages", "expected at least one message");
  if (messages->items().size() > context.options.max_messages)
    body.fail("messages", concat("more than ", context.options.max_messages, " messages"));
  for (size_t i = 0; i < messages->items().size(); ++i) {
    const Fields message(messages->items()[i], concat("messages[", i, "]"));
    chat.messages.push_back(read_message(message));
  }
  const Fields last(messages->items().back(), concat("messages[", chat.messages.size() - 1, "]"));
  const std::string role = last.string("role");
  if (role == "assistant") {
    if (!last.boolean_or("prefix", false))
      last.fail("role", "the last message is the assistant's; set prefix to have it continued");
    if (last.has("tool_calls")) last.fail("tool_calls", "a prefix cannot have tool calls");
  } else if (role != "user" && role != "tool" && role != "latest_reminder") {
    last.fail("role", "the last message must be a user's or a tool's");
  }
}

void read_tools(const Context& context, const Fields& body, ChatJob& chat) {
  const Json* tools = body.array_or_null("tools");
  if (tools == nullptr) return;
  if (tools->items().size() > context.options.max_tools)
    body.fail("tools", concat("more than ", context.options.max_tools, " tools"));
  for (size_t i = 0; i < tools->items().size(); ++i) {
    const Fields tool(tools->items()[i], concat("tools[", i, "]"));
    if (tool.string("type") != "function") tool.fail("type", "only functions are supported");
    chat.tools.push_back(read_function(tool.object("function")));
  }
}

/// `nested`: {"type": "function", "function": {"name"}}; else {"type": "function", "name"}.
void read_tool_choice(const Fields& body, bool nested, ChatJob& chat) {
  chat.parallel_calls = body.boolean_or("parallel_tool_calls", true);
  const Json* choice = body.find("tool_choice");
  if (choice == nullptr) return;
  if (choice->is_object()) {
    const Fields fields(*choice, "tool_choice");
    if (fields.string("type") != "function") fields.fail("type", "expected function");
    chat.tool_choice = ToolChoice::kNamed;
    chat.tool_name = nested ? fields.object("function").string("name") : fields.string("name");
    return;
  }
  const std::string name = body.string("tool_choice");
  if (name == "none") {
    chat.tool_choice = ToolChoice::kNone;
  } else if (name == "required") {
    chat.tool_choice = ToolChoice::kRequired;
  } else if (name != "auto") {
    body.fail("tool_choice", "expected none, auto, required or a function");
  }
}

void read_thinking(const Fields& body, ChatJob& chat) {
  const Json* thinking = body.find("thinking");
  if (thinking == nullptr) return;
  if (thinking->kind() == Json::Kind::kBool) {
    chat.thinking = thinking->truthy();
    return;
  }
  const Fields fields(*thinking, "thinking");
  const std::string type = fields.string("type");
  if (type != "enabled" && type != "disabled") fields.fail("type", "expected enabled or disabled");
  chat.thinking = type == "enabled";
}

void read_logit_bias(const Context& context, const Fields& body, engine::Request& request) {
  const Json* bias = body.object_or_null("logit_bias");
  if (bias == nullptr) return;
  if (bias->members().size() > 1024) body.fail("logit_bias", "more than 1024 tokens");
  const Fields fields(*bias, "logit_bias");
  for (const auto& [key, value] : bias->members()) {
    int64_t token = -1;
    const auto end = std::from_chars(key.data(), key.data() + key.size(), token);
    if (end.ec != std::errc() || end.ptr != key.data() + key.size() || token < 0 ||
        token >= context.engine.info().vocab_size)
      body.fail("logit_bias", concat("'", key.substr(0, 40), "' is no token id"));
    request.sampling.logit_bias.emplace_back(token, fields.number_or(key, 0, -100, 100));
  }
}

bool include_usage(const Fields& body) {
  if (!body.has("stream_options")) return false;
  return body.object("stream_options").boolean_or("include_usage", false);
}

}  // namespace

ChatJob read_chat_completion(const Context& context, const Fields& body) {
  ChatJob chat;
  chat.default_thinking = context.options.default_thinking;
  read_messages(context, body, chat);
  read_tools(context, body, chat);
  read_tool_choice(body, true, chat);
  read_thinking(body, chat);
  chat.effort = body.string_or("reasoning_effort", "");
  chat.task = body.string_or("task", "");
  if (!chat.task.empty()) {
    const auto& known = text::kTaskTokens;
    if (std::none_of(known.begin(), known.end(),
                     [&](const text::TaskToken& t) { return t.task == chat.task; }))
      body.fail("task", "expected action, query, authority, domain, title or read_url");
    if (chat.messages.back().find("role")->text() != "user")
      body.fail("task", "the last message must be a user's");
  }
  if (body.has("response_format")) {
    const Fields format = body.object("response_format");
    const bool nested = format.string("type") == "json_schema";
    read_format(format, nested ? format.object("json_schema") : format, chat);
  }
  return chat;
}

Job chat_completion_job(const Context& context, const Json& json) {
  const Fields body(json, "");
  const std::string model = read_model(context, body);
  ChatJob chat = read_chat_completion(context, body);
  engine::Request& request = chat.base;
  read_sampling(context, body, request);
  read_logit_bias(context, body, request);
  request.stop = read_stop(body, "stop", context.options);
  const int64_t new_limit = read_max_tokens(body, "max_completion_tokens");
  const int64_t old_limit = read_max_tokens(body, "max_tokens");
  request.max_tokens = new_limit > 0 ? new_limit : old_limit;
  request.n = body.integer_or("n", 1, 1, std::max<int64_t>(1, context.engine.info().max_choices));
  OpenAiFormatOptions format;
  format.logprobs = body.boolean_or("logprobs", false);
  const int64_t top = body.integer_or("top_logprobs", 0, 0, 20);
  if (top > 0 && !format.logprobs) body.fail("top_logprobs", "needs logprobs to be true");
  if (format.logprobs) request.top_logprobs = top;
  const bool stream = body.boolean_or("stream", false);
  format.include_usage = include_usage(body);
  Job job = make_chat_job(context, std::move(chat));
  job.stream = stream;
  job.id = random_id("chatcmpl-");
  job.model = model;
  job.format = chat_completion_format(context.tokenizer, std::move(format));
  return job;
}

std::vector<int64_t> plain_prompt_tokens(const Context& context,
                                         const Fields& body,
                                         const std::string& prompt) {
  const bool special = body.boolean_or("special_tokens", false);
  std::vector<int32_t> ids;
  if (body.boolean_or("add_special_tokens", true))
    ids.push_back(context.tokenizer.id_of(text::kBos));
  context.tokenizer.encode(
      prompt, special ? text::SpecialTokens::kRecognise : text::SpecialTokens::kAsText, ids);
  return {ids.begin(), ids.end()};
}

namespace {

struct Prompt {
  std::vector<int64_t> tokens;
  std::string text;  ///< for echo
};

Prompt prompt_of_tokens(const Context& context, const Fields& body, const Json& list) {
  Prompt prompt;
  std::vector<int32_t> ids;
  for (const Json& item : list.items()) {
    const auto id = integer_of(item);
    if (!id || *id < 0 || *id >= context.engine.info().vocab_size)
      body.fail("prompt", "expected token ids of the vocabulary");
    prompt.tokens.push_back(*id);
    ids.push_back(static_cast<int32_t>(*id));
  }
  if (ids.empty()) body.fail("prompt", "a list of token ids is empty");
  if (body.boolean_or("echo", false)) prompt.text = context.tokenizer.decode(ids);
  return prompt;
}

std::vector<Prompt> read_prompts(const Context& context, const Fields& body) {
  const Json* value = body.find("prompt");
  if (value == nullptr) body.fail("prompt", "expected text or token ids, found nothing");
  const auto of_text = [&](const std::string& text) {
    Prompt prompt{plain_prompt_tokens(context, body, text), text};
    if (prompt.tokens.empty()) body.fail("prompt", "the prompt is empty");
    return prompt;
  };
  if (value->is_string()) return {of_text(value->text())};
  const Json& list = *body.array_or_null("prompt");
  if (list.items().empty()) body.fail("prompt", "the list is empty");
  if (list.items().front().kind() == Json::Kind::kInteger)
    return {prompt_of_tokens(context, body, list)};
  if (list.items().size() > context.options.max_prompts)
    body.fail("prompt", concat("more than ", context.options.max_prompts, " prompts"));
  std::vector<Prompt> prompts;
  for (const Json& item : list.items()) {
    if (item.is_string()) {
      prompts.push_back(of_text(item.text()));
    } else if (item.is_array()) {
      prompts.push_back(prompt_of_tokens(context, body, item));
    } else {
      body.fail("prompt", concat("expected text or token ids, found ", item.kind_name()));
    }
  }
  return prompts;
}

}  // namespace

Job text_completion_job(const Context& context, const Json& json) {
  const Fields body(json, "");
  Job job;
  job.model = read_model(context, body);
  if (body.has("suffix") && !body.string("suffix").empty())
    body.fail("suffix", "insertion is not supported");
  engine::Request base;
  read_sampling(context, body, base);
  read_logit_bias(context, body, base);
  base.stop = read_stop(body, "stop", context.options);
  base.max_tokens = body.integer_or("max_tokens", 16, 1, int64_t{1} << 40);
  base.n = body.integer_or("n", 1, 1, std::max<int64_t>(1, context.engine.info().max_choices));
  if (body.integer_or("best_of", base.n, 1, 1 << 20) != base.n)
    body.fail("best_of", "only as many as n are supported");
  OpenAiFormatOptions format;
  if (body.has("logprobs")) {
    format.logprobs = true;
    base.top_logprobs = body.integer_or("logprobs", 0, 0, 20);
  }
  const bool echo = body.boolean_or("echo", false);
  if (echo && format.logprobs) body.fail("echo", "logprobs of the prompt are not supported");
  if (body.has("response_format")) {
    ChatJob holder;
    const Fields wanted = body.object("response_format");
    const bool nested = wanted.string("type") == "json_schema";
    read_format(wanted, nested ? wanted.object("json_schema") : wanted, holder);
    base.grammar = holder.format;
  }
  format.include_usage = include_usage(body);
  format.choices_per_prompt = base.n;
  for (Prompt& prompt : read_prompts(context, body)) {
    engine::Request request = base;
    request.prompt = std::move(prompt.tokens);
    fit_context(context, request);
    job.requests.push_back(std::move(request));
    if (echo) format.echo.push_back(std::move(prompt.text));
  }
  job.stream = body.boolean_or("stream", false);
  job.id = random_id("cmpl-");
  job.format = text_completion_format(context.tokenizer, std::move(format));
  return job;
}

}  // namespace hadal::server
