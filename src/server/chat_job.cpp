#include "server/chat_job.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <map>

#include "text/chat_tokens.h"

namespace hadal::server {
namespace {

struct Effort {
  bool thinking;
  text::ReasoningEffort effort;
};

/// The level that a client's word stands for; with 0731's levels as DeepSeek's own server takes
/// them.
Effort effort_of(const std::string& name, text::EffortLevels levels) {
  using text::ReasoningEffort;
  const bool later = levels == text::EffortLevels::k0731;
  if (name == "none") return {false, ReasoningEffort::kNone};
  if (name == "minimal" || name == "low") return {true, ReasoningEffort::kLow};
  if (name == "medium" || name == "high" || (later && name == "xhigh"))
    return {true, ReasoningEffort::kHigh};
  if (name == "xhigh" || name == "max" || name == "ultra") return {true, ReasoningEffort::kMax};
  throw RequestError(400,
                     concat("reasoning effort '", name.substr(0, 40),
                            "': expected none, minimal, low, medium, high, xhigh, max or ultra"),
                     "reasoning_effort");
}

bool is_function_name(std::string_view name) {
  return !name.empty() && name.size() <= 128 && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-' || c == '.';
  });
}

const Json& function_of(const Json& tool) { return *tool.find("function"); }

bool is_strict(const Json& tool) {
  const Json* strict = function_of(tool).find_set("strict");
  return strict != nullptr && strict->truthy();
}

/// Whether the grammar keeps what it is called with.
bool is_kept(const Json& tool) {
  return is_strict(tool) || function_of(tool).find_set("format") != nullptr;
}

bool is_forced(const ChatJob& chat) {
  return chat.tool_choice == ToolChoice::kRequired || chat.tool_choice == ToolChoice::kNamed;
}

bool may_call(const ChatJob& chat, const std::string& name) {
  if (chat.tool_choice == ToolChoice::kNamed) return name == chat.tool_name;
  const auto& allowed = chat.allowed_tools;
  return allowed.empty() || std::find(allowed.begin(), allowed.end(), name) != allowed.end();
}

/// How the conversation is rendered.
struct Rendered {
  text::ThinkingMode mode;
  std::vector<int64_t> tokens;
};

/// Takes away what opens the answer.
void close_turn(text::ChatPrompt& prompt) {
  for (const std::string_view opens : {text::kThinkStart, text::kThinkEnd}) {
    const std::string opening = concat(text::kAssistant, opens);
    if (prompt.text.ends_with(opening)) {
      prompt.text.resize(prompt.text.size() - opening.size());
      return;
    }
  }
}

Rendered render(const Context& context, const ChatJob& chat) {
  bool thinking = chat.thinking.value_or(chat.default_thinking);
  text::ChatOptions options;
  if (!chat.effort.empty()) {
    options.levels = context.options.effort_levels;
    const Effort effort = effort_of(chat.effort, options.levels);
    if (!chat.thinking) thinking = effort.thinking;
    options.effort = effort.effort;
  }
  const Json* last_role = chat.messages.empty() ? nullptr : chat.messages.back().find("role");
  const bool prefill = last_role != nullptr && last_role->text() == "assistant" && chat.continues;
  // What the answer begins with is given, or the task's answer has no reasoning.
  if (is_forced(chat) && !chat.thinking && chat.effort.empty()) thinking = false;
  if (prefill || !chat.task.empty()) thinking = false;
  if (context.calls)
    options.recall = [&](std::string_view id, const text::ToolCall& call) {
      return context.calls->recall(id, call);
    };
  options.drop_thinking = chat.drop_thinking;
  options.thinking_mode = thinking ? text::ThinkingMode::kThinking : text::ThinkingMode::kChat;

  Json messages = Json::array(chat.messages);
  const bool show_tools = !chat.tools.empty() && chat.tool_choice != ToolChoice::kNone;
  if (show_tools || !chat.format_schema.is_null()) {
    // Tools and formats belong to a system message.
    const Json* role = messages.items().empty() ? nullptr : messages.items()[0].find("role");
    if (role == nullptr || role->text() != "system") {
      messages.items().insert(messages.items().begin(),
                              Json::object({{"role", js("system")}, {"content", js("")}}));
    }
    Json& system = messages.items().front();
    if (show_tools) {
      Json tools = Json::array(chat.tools);
      for (Json& tool : tools.items()) {
        tool.find("function")->erase("strict");
        tool.find("function")->erase("format");
      }
      system.set("tools", std::move(tools));
    }
    if (!chat.format_schema.is_null()) system.set("response_format", chat.format_schema);
  }
  if (!chat.task.empty()) messages.items().back().set("task", js(chat.task));
  if (prefill) messages.items().back().set("wo_eos", js(true));

  Rendered rendered{options.thinking_mode, {}};
  try {
    text::ChatPrompt prompt = text::render_chat(messages, options);
    if (!chat.opens_turn) {
      close_turn(prompt);
      rendered.mode = text::ThinkingMode::kChat;
    }
    const std::vector<int32_t> ids = context.tokenizer.encode(prompt.text, prompt.foreign);
    rendered.tokens = context.engine.as_written({ids.begin(), ids.end()});
  } catch (const RequestError&) {
    throw;
  } catch (const InputError& error) {
    throw RequestError(400, error.what(), "messages");
  }
  return rendered;
}

/// What the answer must be: calls of the tools that may be called, text in a format, or either.
engine_core::Grammar grammar_of(const ChatJob& chat) {
  using Kind = engine_core::Grammar::Kind;
  const bool forced = is_forced(chat);
  const bool limited = !chat.allowed_tools.empty();
  const bool strict = std::any_of(chat.tools.begin(), chat.tools.end(), is_kept);
  const bool callable = !chat.tools.empty() && chat.tool_choice != ToolChoice::kNone;
  const bool has_format = chat.format.kind != Kind::kNone;
  if (!callable || !(forced || limited || strict || has_format)) return chat.format;
  Json list = Json::array();
  for (const Json& tool : chat.tools) {
    const Json& function = function_of(tool);
    if (!may_call(chat, function.find("name")->text())) continue;
    const Json* parameters = function.find_set("parameters");
    // Where a call is forced the grammar keeps every schema that it can.
    const Json strictness = is_strict(tool) || !forced ? js(is_strict(tool)) : js("prefer");
    list.items().push_back(
        Json::object({{"name", *function.find("name")},
                      {"parameters", parameters != nullptr ? *parameters : Json::object()},
                      {"strict", strictness}}));
    if (const Json* format = function.find_set("format"))
      list.items().back().set("format", *format);
  }
  if (forced && chat.parallel_calls) return {Kind::kToolCalls, list.dump(), true};
  Json text = Json::object({{"tools", std::move(list)},
                            {"mode", js(forced ? "required" : "auto")},
                            {"parallel", js(chat.parallel_calls)}});
  if (has_format && !forced) {
    static const std::map<Kind, const char*> names = {{Kind::kJsonObject, "json_object"},
                                                      {Kind::kJsonSchema, "json_schema"},
                                                      {Kind::kRegex, "regex"},
                                                      {Kind::kEbnf, "ebnf"}};
    text.set("content", Json::object({{"kind", js(names.at(chat.format.kind))},
                                      {"text", js(chat.format.text)}}));
  }
  return {Kind::kToolCalls, text.dump(), forced};
}

}  // namespace

int64_t Context::max_context() const {
  const int64_t engines = engine.info().max_context;
  return options.max_context > 0 ? std::min(options.max_context, engines) : engines;
}

std::string settle_thinking(const Context& context, ChatJob& chat) {
  if (context.options.default_thinking) return {};
  if (!chat.thinking && !chat.effort.empty() &&
      effort_of(chat.effort, context.options.effort_levels).thinking) {
    std::string note = concat("reasoning effort '", chat.effort,
                              "': this model was not taught to think and answers at once; "
                              "`thinking` has it try");
    chat.effort = "none";
    return note;
  }
  if (!chat.thinking.value_or(false) || chat.thinking_budget) return {};
  chat.halves_thinking = true;
  return "thinking: this model was not taught to think; its reasoning is closed after half of the "
         "tokens, or after the budget that a request gives";
}

Job make_chat_job(const Context& context, ChatJob chat) {
  if (is_forced(chat) && chat.tools.empty())
    throw RequestError(400, "tool_choice asks for a call, but there are no tools", "tool_choice");
  const auto check_name = [&](const std::string& wanted) {
    const auto named = [&](const Json& tool) {
      return function_of(tool).find("name")->text() == wanted;
    };
    if (std::none_of(chat.tools.begin(), chat.tools.end(), named))
      throw RequestError(400, concat("tool_choice: no tool is named '", wanted, "'"),
                         "tool_choice");
  };
  if (chat.tool_choice == ToolChoice::kNamed) check_name(chat.tool_name);
  for (const std::string& name : chat.allowed_tools) check_name(name);
  Rendered rendered = render(context, chat);
  engine_core::Request request = std::move(chat.base);
  request.prompt = std::move(rendered.tokens);
  request.thinking = rendered.mode == text::ThinkingMode::kThinking;
  request.structured = true;
  if (request.thinking) request.thinking_budget = chat.thinking_budget.value_or(-1);
  request.grammar = grammar_of(chat);
  request.close_reasoning = chat.close_reasoning.value_or(!chat.tools.empty());
  fit_context(context, request);
  if (request.thinking && chat.halves_thinking)
    request.thinking_budget = std::max<int64_t>(request.max_tokens / 2, 1);
  Job job;
  job.chat = true;
  job.mode = rendered.mode;
  job.requests.push_back(std::move(request));
  job.tools = std::make_shared<const text::ToolSchemas>(Json::array(chat.tools));
  job.certain_calls = job.requests.front().grammar.kind == engine_core::Grammar::Kind::kToolCalls;
  job.one_call = !chat.parallel_calls;
  job.calls = context.calls;
  return job;
}

std::vector<int64_t> chat_prompt_tokens(const Context& context, const ChatJob& chat) {
  return render(context, chat).tokens;
}

void read_sampling(const Context& context, const Fields& body, engine_core::Request& request) {
  const Sampling& model = context.options.default_sampling;
  Sampling& sampling = request.sampling;
  sampling.temperature = body.number_or("temperature", model.temperature, 0.0, 2.0);
  // 0 means the most likely token alone, which the smallest share gives.
  sampling.top_p = std::max(body.number_or("top_p", model.top_p, 0.0, 1.0), 1e-9);
  sampling.min_p = body.number_or("min_p", model.min_p, 0.0, 0.999999);
  sampling.top_k =
      std::max<int64_t>(0, body.integer_or("top_k", model.top_k, -1, int64_t{1} << 31));
  sampling.repetition_penalty =
      body.number_or("repetition_penalty", model.repetition_penalty, 0.01, 10.0);
  sampling.presence_penalty = body.number_or("presence_penalty", 0.0, -2.0, 2.0);
  sampling.frequency_penalty = body.number_or("frequency_penalty", 0.0, -2.0, 2.0);
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  sampling.seed = body.has("seed")
                      ? static_cast<uint64_t>(body.integer_or("seed", 0, -kAny - 1, kAny))
                      : random_seed();
  request.priority = static_cast<int>(body.integer_or("priority", 0, -100, 100));
  request.ignore_eos = body.boolean_or("ignore_eos", false);
  request.use_prefix_cache = body.boolean_or("use_prefix_cache", true);
}

std::vector<std::string> read_stop(const Fields& body,
                                   std::string_view key,
                                   const ServerOptions& options) {
  std::vector<std::string> stops;
  const Json* value = body.find(key);
  if (value == nullptr) return stops;
  if (value->is_string()) {
    stops.push_back(value->text());
  } else {
    for (const Json& item : body.array_or_null(key)->items()) {
      if (!item.is_string()) body.fail(key, concat("expected strings, found ", item.kind_name()));
      stops.push_back(item.text());
      if (stops.size() > options.max_stop_strings)
        body.fail(key, concat("more than ", options.max_stop_strings, " strings"));
    }
  }
  for (const std::string& stop : stops) {
    if (stop.empty()) body.fail(key, "a stop string is empty");
    if (stop.size() > 1024) body.fail(key, "a stop string is longer than 1024 bytes");
  }
  return stops;
}

int64_t read_max_tokens(const Fields& body, std::string_view key) {
  return body.integer_or(key, 0, 1, int64_t{1} << 40);
}

ContextOverflow::ContextOverflow(int64_t prompt, int64_t context)
    : RequestError(400,
                   concat("This model's maximum context length is ",
                          context,
                          " tokens. However, your messages resulted in ",
                          prompt,
                          " tokens. Please reduce the length of the messages."),
                   "messages",
                   "context_length_exceeded"),
      prompt_tokens(prompt),
      max_context(context) {}

void fit_context(const Context& context, engine_core::Request& request, Room room) {
  const int64_t limit = context.max_context();
  const int64_t left = limit - std::ssize(request.prompt);
  if (left < (room == Room::kNone ? 0 : 1))
    throw ContextOverflow(std::ssize(request.prompt), limit);
  int64_t wanted = request.max_tokens > 0 ? request.max_tokens : context.options.default_max_tokens;
  if (wanted <= 0) wanted = left;
  request.max_tokens = room == Room::kNone ? 0 : std::min(wanted, left);
  const auto timeout = context.options.request_timeout;
  if (timeout.count() > 0) request.deadline = std::chrono::steady_clock::now() + timeout;
}

std::string read_model(const Context& context, const Fields& body) {
  const std::string& own = context.engine.info().model_name;
  const std::string name = body.string_or("model", own);
  const auto& aliases = context.options.model_aliases;
  if (name == own || context.options.any_model ||
      std::find(aliases.begin(), aliases.end(), name) != aliases.end())
    return name;
  throw RequestError(404, concat("there is no model '", name.substr(0, 100), "'; this is ", own),
                     "model", "model_not_found");
}

Json read_function(const Fields& function) {
  const std::string name = function.string("name");
  if (!is_function_name(name))
    function.fail("name", "expected 1 to 128 letters, digits, '_', '-' or '.'");
  Json out = Json::object({{"name", js(name)}});
  if (function.has("description")) out.set("description", js(function.string("description")));
  if (const Json* parameters = function.object_or_null("parameters"))
    out.set("parameters", *parameters);
  if (function.boolean_or("strict", false)) out.set("strict", js(true));
  return Json::object({{"type", js("function")}, {"function", std::move(out)}});
}

void read_format(const Fields& format, const Fields& schema, ChatJob& chat) {
  using Kind = engine_core::Grammar::Kind;
  const std::string type = format.string("type");
  if (type == "text") return;
  if (type == "json_object") {
    chat.format = {Kind::kJsonObject, ""};
  } else if (type == "json_schema") {
    const Json* object = schema.object_or_null("schema");
    if (object == nullptr) schema.fail("schema", "expected a JSON schema, found nothing");
    chat.format = {Kind::kJsonSchema, object->dump()};
    chat.format_schema = *object;
  } else if (type == "regex") {
    chat.format = {Kind::kRegex, format.string("regex")};
  } else if (type == "grammar") {
    chat.format = {Kind::kEbnf, format.string("grammar")};
  } else {
    format.fail("type", "expected text, json_object, json_schema, regex or grammar");
  }
}

namespace {

/// What stands for a part that is no text.
std::string unsupported(const std::string& type) {
  const std::string_view name = type;
  for (const std::string_view known : {"image", "audio", "video", "file"}) {
    if (name.find(known) != std::string_view::npos) return concat("[Unsupported ", known, "]");
  }
  return concat("[Unsupported ", name.substr(0, 40), "]");
}

std::string part_text(const Fields& part, std::initializer_list<std::string_view> types) {
  const std::string type = part.string("type");
  if (std::find(types.begin(), types.end(), type) == types.end()) return unsupported(type);
  // A refusal has its text under its own name.
  return part.string(type == "refusal" && part.has(type) ? type : "text");
}

bool is_role(const Json& message, std::string_view role) {
  return message.find("role")->text() == role;
}

}  // namespace

std::string read_text(const Fields& message,
                      std::string_view key,
                      std::initializer_list<std::string_view> types) {
  const Json* content = message.find(key);
  if (content == nullptr) return {};
  if (content->is_string()) return content->text();
  if (!content->is_array())
    message.fail(key, concat("expected a string or a list of parts, found ", content->kind_name()));
  std::string text;
  for (size_t i = 0; i < content->items().size(); ++i) {
    const Json& item = content->items()[i];
    if (i > 0) text += "\n\n";
    text += item.is_string()
                ? item.text()
                : part_text(Fields(item, concat(message.path(key), "[", i, "]")), types);
  }
  return text;
}

void settle_system_messages(std::vector<Json>& messages) {
  const auto is_turn = [](const Json& message) {
    return is_role(message, "user") || is_role(message, "tool");
  };
  const auto empty_turn = [] { return Json::object({{"role", js("user")}, {"content", js("")}}); };
  std::vector<Json> settled;
  for (size_t i = 0; i < messages.size(); ++i) {
    Json& message = messages[i];
    const bool begun = std::ranges::any_of(
        settled, [](const Json& earlier) { return !is_role(earlier, "system"); });
    if (is_role(message, "system") && begun) {
      // What speaks next decides whether it stands before a turn or in one.
      size_t next = i + 1;
      while (next < messages.size() && is_role(messages[next], "system")) ++next;
      const bool before_turn = next < messages.size() && is_role(messages[next], "user");
      const bool after_answer = !is_turn(settled.back());
      if (!before_turn || !after_answer) message.set("role", js("user"));
    } else if (is_role(message, "assistant") && !settled.empty() && !begun) {
      settled.push_back(empty_turn());
    }
    settled.push_back(std::move(message));
  }
  if (std::ranges::all_of(settled, [](const Json& m) { return is_role(m, "system"); }))
    settled.push_back(empty_turn());
  messages = std::move(settled);
}

}  // namespace hadal::server
