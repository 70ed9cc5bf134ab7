#include "text/chat_format.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace hadal::text {
namespace {

/// The preview's max, and 0731's high.
constexpr std::string_view kAbsoluteMaximum =
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial "
    "scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n";

/// 0731's max.
constexpr std::string_view kBeyondMaximum =
    "Reasoning Effort: Beyond maximum \u2014 exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles "
    "and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n";

std::string_view effort_prefix(ReasoningEffort effort, EffortLevels levels) {
  if (levels == EffortLevels::kPreview)
    return effort == ReasoningEffort::kMax ? kAbsoluteMaximum : std::string_view();
  if (effort == ReasoningEffort::kMax) return kBeyondMaximum;
  return effort == ReasoningEffort::kHigh ? kAbsoluteMaximum : std::string_view();
}

constexpr std::string_view kToolsBefore =
    "## Tools\n\n"
    "You have access to a set of tools to help answer the user's question. You can invoke tools by "
    "writing a "
    "\"<\uff5cDSML\uff5ctool_calls>\" block like the following:\n\n"
    "<\uff5cDSML\uff5ctool_calls>\n"
    "<\uff5cDSML\uff5cinvoke name=\"$TOOL_NAME\">\n"
    "<\uff5cDSML\uff5cparameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE"
    "</\uff5cDSML\uff5cparameter>\n"
    "...\n"
    "</\uff5cDSML\uff5cinvoke>\n"
    "<\uff5cDSML\uff5cinvoke name=\"$TOOL_NAME2\">\n"
    "...\n"
    "</\uff5cDSML\uff5cinvoke>\n"
    "</\uff5cDSML\uff5ctool_calls>\n\n"
    "String parameters should be specified as is and set `string=\"true\"`. For all other types "
    "(numbers, booleans, "
    "arrays, objects), pass the value in JSON format and set `string=\"false\"`.\n\n"
    "If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning "
    "inside "
    "<think>...</think> BEFORE any tool calls or final response.\n\n"
    "Otherwise, output directly after </think> with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n";
constexpr std::string_view kToolsAfter =
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool "
    "calls.\n";
constexpr std::string_view kFormatBefore =
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";

// Names inside the encoder's own working copy of the messages.
constexpr std::string_view kBlocks = "content_blocks";

std::string_view role_of(const PyJson& message) {
  const PyJson* role = message.find("role");
  return role != nullptr && role->is_string() ? std::string_view(role->text()) : std::string_view();
}
bool is_user_like(const PyJson& message) {
  return role_of(message) == "user" || role_of(message) == "developer";
}
bool truthy(const PyJson& message, std::string_view key) {
  const PyJson* value = message.find(key);
  return value != nullptr && value->truthy();
}

/// A string member; null and absent count as empty. Errors: InputError for other kinds.
std::string text_member(const PyJson& object, std::string_view key, const std::string& where) {
  const PyJson* value = object.find_set(key);
  if (value == nullptr) return {};
  HADAL_INPUT_CHECK(value->is_string(), where, ": ", key, " is ", value->kind_name(),
                    ", expected a string");
  return value->text();
}

const PyJson* list_member(const PyJson& object, std::string_view key, const std::string& where) {
  const PyJson* value = object.find_set(key);
  HADAL_INPUT_CHECK(value == nullptr || value->is_array(), where, ": ", key, " is ",
                    value->kind_name(), ", expected a list");
  return value;
}

// --- pre-processing (chat_encoding.md 3) ---

/// Adds a block to the last message if that is a user message with blocks, else to a new user
/// message, returned.
PyJson* add_block(std::vector<PyJson>& merged, PyJson block, bool respect_task) {
  if (!merged.empty() && role_of(merged.back()) == "user" &&
      merged.back().find(kBlocks) != nullptr &&
      !(respect_task && merged.back().find_set("task") != nullptr)) {
    merged.back().find(kBlocks)->items().push_back(std::move(block));
    return nullptr;
  }
  merged.push_back(PyJson::object({{"role", PyJson::string("user")}}));
  merged.back().set(kBlocks, PyJson::array({std::move(block)}));
  return &merged.back();
}

std::vector<PyJson> merge_messages(const PyJson& messages, const char* list) {
  HADAL_INPUT_CHECK(messages.is_array(), list, " is ", messages.kind_name(), ", expected a list");
  std::vector<PyJson> merged;
  for (size_t i = 0; i < messages.items().size(); ++i) {
    const PyJson& message = messages.items()[i];
    const std::string where = concat(list, "[", i, "]");
    HADAL_INPUT_CHECK(message.is_object(), where, " is ", message.kind_name(),
                      ", expected an object");
    const PyJson* role = message.find("role");
    HADAL_INPUT_CHECK(role != nullptr && role->is_string(), where, " has no role");
    if (role->text() == "tool") {
      PyJson block = PyJson::object({{"type", PyJson::string("tool_result")}});
      if (const PyJson* id = message.find_set("tool_call_id")) block.set("tool_use_id", *id);
      if (const PyJson* content = message.find_set("content")) {
        HADAL_INPUT_CHECK(content->is_string() || content->is_array(), where, ": content is ",
                          content->kind_name(), ", expected a string or a list");
        block.set("content", *content);
      }
      add_block(merged, std::move(block), /*respect_task=*/false);
    } else if (role->text() == "user") {
      const PyJson* content = message.find("content");
      HADAL_INPUT_CHECK(content != nullptr && content->is_string(), where, ": content is ",
                        content == nullptr ? "absent" : content->kind_name(),
                        ", expected a string");
      PyJson block = PyJson::object({{"type", PyJson::string("text")}, {"text", *content}});
      PyJson* opened = add_block(merged, std::move(block), /*respect_task=*/true);
      for (const char* key : {"task", "wo_eos", "mask"}) {
        if (const PyJson* value = message.find(key); value != nullptr && opened != nullptr)
          opened->set(key, *value);
      }
    } else {
      merged.push_back(message);
    }
  }
  return merged;
}

std::string call_id(const PyJson& call) {
  const PyJson* id = call.find("id");
  if (id == nullptr || !id->truthy()) {
    const PyJson* function = call.find("function");
    id = function == nullptr ? nullptr : function->find("id");
  }
  return id != nullptr && id->is_string() ? id->text() : std::string();
}

void sort_tool_results(std::vector<PyJson>& messages) {
  std::unordered_map<std::string, size_t> order;
  for (PyJson& message : messages) {
    if (role_of(message) == "assistant" && truthy(message, "tool_calls")) {
      order.clear();
      const PyJson* calls = list_member(message, "tool_calls", "assistant message");
      for (size_t i = 0; i < calls->items().size(); ++i) {
        if (std::string id = call_id(calls->items()[i]); !id.empty()) order[std::move(id)] = i;
      }
      continue;
    }
    const PyJson* found = role_of(message) == "user" ? message.find(kBlocks) : nullptr;
    if (found == nullptr || order.empty()) continue;
    PyJson blocks = *found;
    std::vector<size_t> slots;
    for (size_t i = 0; i < blocks.items().size(); ++i) {
      if (blocks.items()[i].find("type")->text() == "tool_result") slots.push_back(i);
    }
    if (slots.size() < 2) continue;
    const auto rank = [&](const PyJson& block) {
      const PyJson* id = block.find("tool_use_id");
      const auto place = id != nullptr && id->is_string() ? order.find(id->text()) : order.end();
      return place == order.end() ? size_t{0} : place->second;
    };
    std::vector<PyJson> results;
    for (const size_t slot : slots) results.push_back(blocks.items()[slot]);
    std::stable_sort(results.begin(), results.end(),
                     [&](const PyJson& a, const PyJson& b) { return rank(a) < rank(b); });
    for (size_t i = 0; i < slots.size(); ++i) blocks.items()[slots[i]] = std::move(results[i]);
    message.set(kBlocks, std::move(blocks));
  }
}

ptrdiff_t last_user_index(const std::vector<PyJson>& messages) {
  for (auto i = static_cast<ptrdiff_t>(messages.size()) - 1; i >= 0; --i) {
    if (is_user_like(messages[static_cast<size_t>(i)])) return i;
  }
  return -1;
}

/// Drops the reasoning of earlier turns, and earlier messages of other roles (developer included).
std::vector<PyJson> drop_reasoning(const std::vector<PyJson>& messages) {
  const ptrdiff_t last_user = last_user_index(messages);
  std::vector<PyJson> kept;
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string_view role = role_of(messages[i]);
    const bool always = role == "user" || role == "system" || role == "tool" ||
                        role == "latest_reminder" || role == "direct_search_results";
    if (always || static_cast<ptrdiff_t>(i) >= last_user) {
      kept.push_back(messages[i]);
    } else if (role == "assistant") {
      kept.push_back(messages[i]);
      kept.back().erase("reasoning_content");
    }
  }
  return kept;
}

// --- rendering (chat_encoding.md 4) ---

void render_tools(const PyJson& tools, const std::string& where, ChatPrompt& prompt) {
  prompt.text += kToolsBefore;
  const char* separator = "";
  for (const PyJson& tool : tools.items()) {
    const PyJson* function = tool.find("function");
    HADAL_INPUT_CHECK(function != nullptr, where, ": a tool has no 'function'");
    prompt.text += separator;
    prompt.add_foreign(function->dump());
    separator = "\n";
  }
  prompt.text += kToolsAfter;
}

void render_tools_and_format(const PyJson& message, const std::string& where, ChatPrompt& prompt) {
  const PyJson* tools = list_member(message, "tools", where);
  if (tools != nullptr && tools->truthy()) {
    prompt.text += "\n\n";
    render_tools(*tools, where, prompt);
  }
  if (truthy(message, "response_format")) {
    prompt.text += concat("\n\n", kFormatBefore);
    prompt.add_foreign(message.find("response_format")->dump());
  }
}

std::string type_name(const PyJson& block) {
  const PyJson* type = block.find("type");
  return type != nullptr && type->is_string() ? type->text() : "None";
}

std::string tool_result_body(const PyJson& block, const std::string& where) {
  const PyJson* content = block.find("content");
  if (content == nullptr) return {};
  if (content->is_string()) return content->text();
  std::string body;
  const char* separator = "";
  for (const PyJson& part : content->items()) {
    const std::string type = type_name(part);
    body += separator;
    body += type == "text" ? text_member(part, "text", where) : concat("[Unsupported ", type, "]");
    separator = "\n\n";
  }
  return body;
}

void render_user(const PyJson& message, const std::string& where, ChatPrompt& prompt) {
  prompt.text += kUser;
  const char* separator = "";
  for (const PyJson& block : message.find(kBlocks)->items()) {
    prompt.text += separator;
    if (type_name(block) == "text") {
      prompt.add_foreign(block.find("text")->text());
    } else {
      prompt.text += "<tool_result>";
      prompt.add_foreign(tool_result_body(block, where));
      prompt.text += "</tool_result>";
    }
    separator = "\n\n";
  }
}

std::vector<ToolCall> calls_of(const PyJson& message,
                               const std::string& where,
                               const ChatOptions& options) {
  std::vector<ToolCall> calls;
  const PyJson* list = list_member(message, "tool_calls", where);
  if (list == nullptr) return calls;
  for (const PyJson& call : list->items()) {
    const PyJson* function = call.find("function");
    const PyJson* name = function == nullptr ? nullptr : function->find("name");
    const PyJson* arguments = function == nullptr ? nullptr : function->find("arguments");
    HADAL_INPUT_CHECK(name != nullptr && name->is_string(), where,
                      ": a tool call has no function name");
    // Whatever clients make of what they got is history, and rendered.
    calls.push_back({.name = name->text(),
                     .arguments = arguments == nullptr     ? std::string("{}")
                                  : arguments->is_string() ? arguments->text()
                                                           : arguments->dump()});
    if (!options.recall) continue;
    if (std::optional<RawMarkup> raw = options.recall(call_id(call), calls.back()))
      calls.back().raw = std::move(*raw);
  }
  return calls;
}

/// Renders messages that are merged, sorted and dropped.
class Renderer {
 public:
  Renderer(const std::vector<PyJson>& messages, const ChatOptions& options, bool dropping)
      : messages_(messages),
        options_(options),
        thinking_(options.thinking_mode == ThinkingMode::kThinking),
        dropping_(dropping),
        last_user_(last_user_index(messages)) {}

  /// Appends one message.
  void render(size_t index, ChatPrompt& prompt) const {
    const PyJson& message = messages_[index];
    const std::string_view role = role_of(message);
    const std::string where = concat("message ", index, " (", role, ")");
    if (role == "user") {
      render_user(message, where, prompt);
    } else {
      render_body(message, index, where, prompt);
    }
    prompt.text += transition(message, index);
  }

 private:
  void render_body(const PyJson& message,
                   size_t index,
                   const std::string& where,
                   ChatPrompt& prompt) const {
    const std::string_view role = role_of(message);
    if (role == "system") {
      prompt.add_foreign(text_member(message, "content", where));
      return render_tools_and_format(message, where, prompt);
    }
    if (role == "developer") {
      const std::string content = text_member(message, "content", where);
      HADAL_INPUT_CHECK(!content.empty(), where, ": content is empty");
      prompt.text += kUser;
      prompt.add_foreign(content);
      return render_tools_and_format(message, where, prompt);
    }
    if (role == "latest_reminder") {
      HADAL_INPUT_CHECK(message.find_set("content") != nullptr, where, ": content is absent");
      prompt.text += kLatestReminder;
      return prompt.add_foreign(text_member(message, "content", where));
    }
    HADAL_INPUT_CHECK(
        role == "assistant", where,
        ": unknown role; expected system, developer, user, assistant, tool or latest_reminder");
    render_assistant(message, index, where, prompt);
  }

  void render_assistant(const PyJson& message,
                        size_t index,
                        const std::string& where,
                        ChatPrompt& prompt) const {
    const bool after_task = index > 0 && messages_[index - 1].find_set("task") != nullptr;
    if (thinking_ && !after_task && (!dropping_ || static_cast<ptrdiff_t>(index) > last_user_)) {
      prompt.add_foreign(text_member(message, "reasoning_content", where));
      prompt.text += kThinkEnd;
    }
    prompt.add_foreign(text_member(message, "content", where));
    const std::vector<ToolCall> calls = calls_of(message, where, options_);
    if (!calls.empty()) {
      prompt.text += "\n\n";
      write_tool_calls(calls, prompt);
    }
    if (!truthy(message, "wo_eos")) prompt.text += kEos;
  }

  /// What opens the next turn: nothing inside a history, else a task token or the assistant's
  /// opener.
  std::string transition(const PyJson& message, size_t index) const {
    if (index + 1 < messages_.size()) {
      const std::string_view next = role_of(messages_[index + 1]);
      if (next != "assistant" && next != "latest_reminder") return {};
    }
    if (const PyJson* task = message.find_set("task")) {
      const auto known = std::find_if(
          kTaskTokens.begin(), kTaskTokens.end(),
          [&](const TaskToken& t) { return task->is_string() && t.task == task->text(); });
      HADAL_INPUT_CHECK(known != kTaskTokens.end(), "message ", index, ": task is ", task->dump(),
                        ", expected action, query, authority, domain, title or read_url");
      if (known->task != "action") return std::string(known->token);
      return concat(kAssistant, thinking_ ? kThinkStart : kThinkEnd, known->token);
    }
    if (!is_user_like(message)) return {};
    const bool opens = thinking_ && (!dropping_ || static_cast<ptrdiff_t>(index) >= last_user_);
    return concat(kAssistant, opens ? kThinkStart : kThinkEnd);
  }

  const std::vector<PyJson>& messages_;
  const ChatOptions& options_;
  bool thinking_;
  bool dropping_;
  ptrdiff_t last_user_;
};

}  // namespace

void ChatPrompt::add_foreign(std::string_view more) {
  if (more.empty()) return;
  foreign.push_back({text.size(), text.size() + more.size()});
  text += more;
}

ThinkingMode parse_thinking_mode(std::string_view name) {
  HADAL_INPUT_CHECK(name == "chat" || name == "thinking", "thinking mode is '", name,
                    "', expected chat or thinking");
  return name == "chat" ? ThinkingMode::kChat : ThinkingMode::kThinking;
}

ReasoningEffort parse_reasoning_effort(std::string_view name, EffortLevels levels) {
  const bool preview = levels == EffortLevels::kPreview;
  if (name.empty() || (preview && name == "none")) return ReasoningEffort::kNone;
  if (!preview && name == "low") return ReasoningEffort::kLow;
  HADAL_INPUT_CHECK(name == "high" || name == "max", "reasoning effort is '", name, "', expected ",
                    preview ? "high or max" : "low, high or max");
  return name == "high" ? ReasoningEffort::kHigh : ReasoningEffort::kMax;
}

EffortLevels parse_effort_levels(std::string_view name) {
  HADAL_INPUT_CHECK(name == "preview" || name == "0731", "effort levels are '", name,
                    "', expected preview or 0731");
  return name == "0731" ? EffortLevels::k0731 : EffortLevels::kPreview;
}

const char* effort_levels_name(EffortLevels levels) {
  return levels == EffortLevels::k0731 ? "0731" : "preview";
}

ChatPrompt render_chat(const PyJson& messages, const ChatOptions& options, const PyJson& context) {
  std::vector<PyJson> full = merge_messages(context, "context");
  size_t context_size = full.size();
  for (PyJson& message : merge_messages(messages, "messages")) full.push_back(std::move(message));
  sort_tool_results(full);
  const bool has_tools =
      std::any_of(full.begin(), full.end(), [](const PyJson& m) { return truthy(m, "tools"); });
  const bool thinking = options.thinking_mode == ThinkingMode::kThinking;
  const bool dropping = options.drop_thinking && !has_tools;
  ChatPrompt prompt;
  if (options.add_bos && context_size == 0) prompt.text = kBos;
  size_t count = full.size() - context_size;
  if (thinking && dropping) {
    const std::vector<PyJson> earlier(full.begin(),
                                      full.begin() + static_cast<ptrdiff_t>(context_size));
    full = drop_reasoning(full);
    // The context may lose messages only now that a later user follows: what it was rendered as
    // decides.
    const size_t earlier_kept = drop_reasoning(earlier).size();
    count = full.size() > earlier_kept ? full.size() - earlier_kept : 0;
  }
  const Renderer renderer(full, options, dropping);
  for (size_t index = full.size() - count; index < full.size(); ++index) {
    if (index == 0 && thinking) prompt.text += effort_prefix(options.effort, options.levels);
    renderer.render(index, prompt);
  }
  return prompt;
}

std::string encode_chat(const PyJson& messages, const ChatOptions& options, const PyJson& context) {
  return render_chat(messages, options, context).text;
}

PyJson messages_of_request(PyJson request) {
  if (request.is_array()) return request;
  HADAL_INPUT_CHECK(request.is_object(), "request is ", request.kind_name(),
                    ", expected a list of messages or an object with messages");
  const PyJson* found = request.find("messages");
  HADAL_INPUT_CHECK(found != nullptr && found->is_array(), "request has no list 'messages'");
  PyJson messages = *found;
  const PyJson* tools = request.find_set("tools");
  if (tools == nullptr) return messages;
  HADAL_INPUT_CHECK(!messages.items().empty() && messages.items()[0].is_object(),
                    "request has tools, but no message to attach them to");
  messages.items()[0].set("tools", *tools);
  return messages;
}

}  // namespace hadal::text
