// Tools of OpenAI's APIs, what may be called, and how the model is to think.
#include <algorithm>
#include <array>

#include "server/openai_reading.h"

namespace hadal::server {
namespace {

/// Kinds that would run on OpenAI's servers, or in surroundings that this model was not taught.
bool is_hosted(std::string_view type) {
  constexpr std::array kHosted = {
      "web_search",       "file_search", "computer",    "code_interpreter",
      "image_generation", "mcp",         "local_shell", "shell",
      "apply_patch",      "tool_search", "retrieval",   "web_extractor"};
  return std::ranges::any_of(kHosted,
                             [&](std::string_view known) { return type.starts_with(known); });
}

/// A custom tool as a function of one text; what the text must be is in "format", which the model
/// does not see.
Json function_of_custom(const Fields& custom) {
  std::string about = custom.string_or("description", "");
  Json rule;
  if (custom.has("format")) {
    const Fields format = custom.object("format");
    const std::string type = format.string_or("type", "text");
    if (type != "text" && type != "grammar") format.fail("type", "expected text or grammar");
    // Flat in one API, nested in another.
    const Fields grammar = format.has("grammar") ? format.object("grammar") : format;
    if (type == "grammar") {
      const std::string syntax = grammar.string_or("syntax", "lark");
      if (syntax != "lark" && syntax != "regex") grammar.fail("syntax", "expected lark or regex");
      const std::string definition = grammar.string("definition");
      about += concat(about.empty() ? "" : "\n\n", "The input follows this ", syntax, " grammar:\n",
                      definition);
      rule = Json::object({{"syntax", js(syntax)}, {"definition", js(definition)}});
    }
  }
  const Json input = Json::object({{"type", js("string")}});
  const Json function =
      Json::object({{"name", js(custom.string("name"))},
                    {"description", js(about)},
                    {"parameters", Json::object({{"type", js("object")},
                                                 {"properties", Json::object({{"input", input}})},
                                                 {"required", Json::array({js("input")})}})}});
  Json tool = read_function(Fields(function, "tools"));
  if (!rule.is_null()) tool.find("function")->set("format", std::move(rule));
  return tool;
}

class ToolReader {
 public:
  ToolReader(ChatJob& chat, ToolNames& names, Notes& notes, bool nested)
      : chat_(chat), names_(names), notes_(notes), nested_(nested) {}

  void read(const Fields& tool, const std::string& space) {
    const std::string type = tool.string("type");
    if (type == "function") {
      const Fields function = nested_ ? tool.object("function") : tool;
      add(tool, read_function(function), {function.string("name"), space, false});
    } else if (type == "custom") {
      const Fields custom = nested_ ? tool.object("custom") : tool;
      add(tool, function_of_custom(custom), {custom.string("name"), space, true});
    } else if (type == "namespace" && !nested_ && space.empty()) {
      const std::string name = tool.string("name");
      const Json* members = tool.array_or_null("tools");
      for (size_t i = 0; members != nullptr && i < members->items().size(); ++i)
        read(Fields(members->items()[i], concat(tool.path("tools"), "[", i, "]")), name);
    } else if (is_hosted(type)) {
      notes_.push_back(concat(tool.path("type"), ": '", type.substr(0, 40),
                              "' does not run here and was left out"));
    } else {
      tool.fail("type", concat("'", type.substr(0, 40), "' is not supported"));
    }
  }

 private:
  void add(const Fields& tool, Json read, ToolName name) {
    const std::string shown = prompt_name(name.space, name.name);
    read.find("function")->set("name", js(shown));
    if (!names_.emplace(shown, std::move(name)).second)
      tool.fail("name", concat("there is another tool '", shown, "'"));
    chat_.tools.push_back(std::move(read));
  }

  ChatJob& chat_;
  ToolNames& names_;
  Notes& notes_;
  const bool nested_;
};

/// {"type", "function": {"name"}} or flat; custom tools likewise. Empty: not a tool of the
/// client's.
std::string chosen_name(const Fields& choice, bool nested) {
  const std::string type = choice.string("type");
  if (type != "function" && type != "custom") return {};
  if (nested) return choice.object(type).string("name");
  return prompt_name(choice.string_or("namespace", ""), choice.string("name"));
}

void read_allowed(const Fields& choice, bool nested, ChatJob& chat) {
  const Fields allowed = nested ? choice.object("allowed_tools") : choice;
  const std::string mode = allowed.string_or("mode", "auto");
  if (mode != "auto" && mode != "required") allowed.fail("mode", "expected auto or required");
  if (mode == "required") chat.tool_choice = ToolChoice::kRequired;
  const Json* tools = allowed.array_or_null("tools");
  if (tools == nullptr) allowed.fail("tools", "expected a list of tools, found nothing");
  for (size_t i = 0; i < tools->items().size(); ++i) {
    const Fields tool(tools->items()[i], concat(allowed.path("tools"), "[", i, "]"));
    if (std::string name = chosen_name(tool, nested); !name.empty())
      chat.allowed_tools.push_back(std::move(name));
  }
  // None of the client's own may be called.
  if (chat.allowed_tools.empty()) chat.tool_choice = ToolChoice::kNone;
}

std::optional<bool> switch_of(const Fields& fields, std::string_view key) {
  if (!fields.has(key)) return {};
  return fields.boolean_or(key, false);
}

void read_template_arguments(const Fields& body, ChatJob& chat, std::optional<bool>& thinking) {
  if (!body.has("chat_template_kwargs")) return;
  const Fields fields = body.object("chat_template_kwargs");
  for (const auto& [key, value] : fields.json().members()) {
    if (value.is_null()) continue;
    if (key == "thinking" || key == "enable_thinking") {
      if (!thinking) thinking = switch_of(fields, key);
    } else if (key == "thinking_mode") {
      const std::string mode = fields.string(key);
      if (mode != "chat" && mode != "thinking") fields.fail(key, "expected chat or thinking");
      if (!thinking) thinking = mode == "thinking";
    } else if (key == "reasoning_effort") {
      if (chat.effort.empty()) chat.effort = fields.string(key);
    } else if (key == "thinking_budget") {
      if (!chat.thinking_budget) chat.thinking_budget = fields.integer_or(key, 0, 0, 1 << 30);
    } else if (key == "drop_thinking" || key == "clear_thinking") {
      chat.drop_thinking = fields.boolean_or(key, true);
    } else if (key == "preserve_thinking") {
      chat.drop_thinking = !fields.boolean_or(key, false);
    } else {
      fields.fail(key,
                  "not supported: expected thinking, enable_thinking, thinking_mode, "
                  "reasoning_effort, thinking_budget, drop_thinking or preserve_thinking");
    }
  }
}

/// reasoning: {effort, enabled, max_tokens, exclude}.
void read_reasoning(const Fields& body, ChatJob& chat, std::optional<bool>& thinking) {
  if (!body.has("reasoning")) return;
  const Fields fields = body.object("reasoning");
  if (chat.effort.empty()) chat.effort = fields.string_or("effort", "");
  if (!thinking) thinking = switch_of(fields, "enabled");
  if (fields.has("max_tokens"))
    chat.thinking_budget = fields.integer_or("max_tokens", 0, 0, 1 << 30);
  if (fields.boolean_or("exclude", false)) fields.fail("exclude", "reasoning is always given");
}

}  // namespace

std::string prompt_name(std::string_view space, std::string_view name) {
  return space.empty() ? std::string(name) : concat(space, ".", name);
}

Json custom_arguments(std::string_view input) { return Json::object({{"input", js(input)}}); }

std::string custom_input(const CallRecord& call) {
  try {
    const Json arguments = Json::parse(call.arguments, "arguments");
    const Json* input = arguments.find("input");
    if (input == nullptr && arguments.members().size() == 1)
      input = &arguments.members().front().second;
    if (input != nullptr) return input->is_string() ? input->text() : input->dump();
  } catch (const InputError&) {
    return call.arguments;  // cut off
  }
  return call.arguments;
}

void read_openai_tools(const Context& context,
                       const Fields& body,
                       bool nested,
                       ChatJob& chat,
                       ToolNames& names,
                       Notes& notes) {
  const Json* tools = body.array_or_null("tools");
  if (tools == nullptr) return;
  ToolReader reader(chat, names, notes, nested);
  for (size_t i = 0; i < tools->items().size(); ++i) {
    reader.read(Fields(tools->items()[i], concat("tools[", i, "]")), "");
    if (chat.tools.size() > context.options.max_tools)
      body.fail("tools", concat("more than ", context.options.max_tools, " tools"));
  }
}

void read_openai_tool_choice(const Fields& body, bool nested, ChatJob& chat, Notes& notes) {
  chat.parallel_calls = body.boolean_or("parallel_tool_calls", true);
  const Json* choice = body.find("tool_choice");
  if (choice == nullptr) return;
  if (!choice->is_object()) {
    const std::string name = body.string("tool_choice");
    if (name == "none") {
      chat.tool_choice = ToolChoice::kNone;
    } else if (name == "required") {
      chat.tool_choice = ToolChoice::kRequired;
    } else if (name != "auto") {
      body.fail("tool_choice", "expected none, auto, required or a function");
    }
    return;
  }
  const Fields fields(*choice, "tool_choice");
  const std::string type = fields.string("type");
  if (type == "allowed_tools") return read_allowed(fields, nested, chat);
  if (type == "function" || type == "custom") {
    chat.tool_choice = ToolChoice::kNamed;
    chat.tool_name = chosen_name(fields, nested);
  } else if (is_hosted(type)) {
    notes.push_back(
        concat("tool_choice: '", type.substr(0, 40), "' does not run here and was left out"));
  } else {
    fields.fail("type", "expected function, custom or allowed_tools");
  }
}

void read_thinking(const Fields& body, ChatJob& chat) {
  std::optional<bool> wanted;
  if (const Json* thinking = body.find("thinking")) {
    if (thinking->kind() == Json::Kind::kBool) {
      wanted = thinking->truthy();
    } else {
      const Fields fields(*thinking, "thinking");
      const std::string type = fields.string("type");
      if (type != "enabled" && type != "disabled" && type != "adaptive")
        fields.fail("type", "expected enabled, disabled or adaptive");
      if (type != "adaptive") wanted = type == "enabled";
      if (fields.has("budget_tokens"))
        chat.thinking_budget = fields.integer_or("budget_tokens", 0, 0, 1 << 30);
    }
  }
  if (!wanted) wanted = switch_of(body, "enable_thinking");
  chat.close_reasoning = switch_of(body, "close_reasoning");
  chat.effort = body.string_or("reasoning_effort", "");
  for (const std::string_view key : {"thinking_budget", "thinking_token_budget"}) {
    if (body.has(key)) chat.thinking_budget = body.integer_or(key, 0, 0, 1 << 30);
  }
  // llama.cpp's: -1 is no limit.
  if (body.has("reasoning_budget")) {
    const int64_t budget = body.integer_or("reasoning_budget", -1, -1, 1 << 30);
    if (budget >= 0) chat.thinking_budget = budget;
  }
  read_reasoning(body, chat, wanted);
  read_template_arguments(body, chat, wanted);
  // Who gives tokens for it wants it; who gives none does not.
  if (chat.thinking_budget && (!wanted || *chat.thinking_budget == 0))
    wanted = *chat.thinking_budget > 0;
  chat.thinking = wanted;
}

}  // namespace hadal::server
