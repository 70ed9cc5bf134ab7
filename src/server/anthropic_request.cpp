#include "server/anthropic_request.h"

#include <utility>

#include "server/sealed_text.h"

namespace hadal::server {
namespace {

/// Claude Code begins its system prompt with a line for Anthropic's accounts that differs in every
/// request. It tells the model nothing and would make every prompt new from its first token on.
constexpr std::string_view kBillingLine = "x-anthropic-billing-header:";

void append(std::string& text, std::string_view more) {
  if (more.empty()) return;
  if (!text.empty()) text += "\n\n";
  text += more;
}

std::string shown(std::string_view name) { return std::string(name.substr(0, 60)); }

Json message_of(const char* role, std::string text) {
  return Json::object({{"role", js(role)}, {"content", Json::string(std::move(text))}});
}

std::string parts_text(const Fields& object, std::string_view key);

/// Text of a document or of what a search found, if it came as text.
std::string document_text(const Fields& block, const std::string& type) {
  std::string text;
  const Json* source = block.find("source");
  if (type == "document" && source != nullptr && source->is_object()) {
    const Fields fields(*source, block.path("source"));
    const std::string kind = fields.string_or("type", "");
    if (kind == "text") text = fields.string_or("data", "");
    if (kind == "content") text = parts_text(fields, "content");
  } else if (type == "search_result") {
    text = parts_text(block, "content");
    if (source != nullptr && source->is_string()) text = concat(source->text(), "\n\n", text);
  }
  if (text.empty()) return {};
  const std::string title = block.string_or("title", "");
  return title.empty() ? text : concat(title, "\n\n", text);
}

/// What the prompt holds of one block of a user's content or of a tool's result.
std::string block_text(const Fields& block) {
  const std::string type = block.string("type");
  if (type == "text") return block.string("text");
  if (type == "document" || type == "search_result") {
    if (std::string text = document_text(block, type); !text.empty()) return text;
  }
  if (type == "tool_reference" && block.has("tool_name"))
    return concat("[Tool ", block.string("tool_name"), "]");
  return concat("[Unsupported ", shown(type), "]");
}

/// A string, or the blocks of a list.
std::string parts_text(const Fields& object, std::string_view key) {
  const Json* content = object.find(key);
  if (content == nullptr) return {};
  if (content->is_string()) return content->text();
  const Json& blocks = *object.array_or_null(key);
  std::string text;
  for (size_t i = 0; i < blocks.items().size(); ++i)
    append(text, block_text(Fields(blocks.items()[i], concat(object.path(key), "[", i, "]"))));
  return text;
}

std::string without_billing_line(std::string text) {
  if (!text.starts_with(kBillingLine)) return text;
  const size_t end = text.find('\n');
  return end == std::string::npos ? std::string() : text.substr(end + 1);
}

std::string system_text(const Fields& body) {
  const Json* system = body.find("system");
  if (system == nullptr) return {};
  if (system->is_string()) return without_billing_line(system->text());
  const Json& blocks = *body.array_or_null("system");
  std::string text;
  for (size_t i = 0; i < blocks.items().size(); ++i)
    append(text,
           without_billing_line(block_text(Fields(blocks.items()[i], concat("system[", i, "]")))));
  return text;
}

void read_user(const Fields& message, const Json& content, std::vector<Json>& out) {
  const size_t before = out.size();
  for (size_t i = 0; i < content.items().size(); ++i) {
    const Fields block(content.items()[i], concat(message.path("content"), "[", i, "]"));
    if (block.string("type") == "tool_result") {
      std::string result = parts_text(block, "content");
      if (block.boolean_or("is_error", false)) result.insert(0, "Error: ");
      Json tool = message_of("tool", std::move(result));
      tool.set("tool_call_id", js(block.string_or("tool_use_id", "")));
      out.push_back(std::move(tool));
    } else if (std::string text = block_text(block); !text.empty()) {
      out.push_back(message_of("user", std::move(text)));
    }
  }
  // A message that says nothing is a turn all the same.
  if (out.size() == before) out.push_back(message_of("user", ""));
}

/// Reasoning that this server wrote, from what the client was given in its place.
std::string unsealed(const Fields& block, std::string_view key) {
  const Json* sealed = block.find(key);
  if (sealed == nullptr || !sealed->is_string()) return {};
  return unseal_text(sealed->text()).value_or("");
}

Json read_tool_use(const Fields& block) {
  const Json* input = block.find("input");
  std::string arguments = "{}";
  if (input != nullptr) arguments = input->is_string() ? input->text() : input->dump();
  return Json::object({{"id", js(block.string_or("id", ""))},
                       {"type", js("function")},
                       {"function", Json::object({{"name", js(block.string("name"))},
                                                  {"arguments", js(arguments)}})}});
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
      const std::string plain = block.string_or("thinking", "");
      append(reasoning, plain.empty() ? unsealed(block, "signature") : plain);
    } else if (type == "redacted_thinking") {
      append(reasoning, unsealed(block, "data"));
    } else if (type == "tool_use") {
      calls.items().push_back(read_tool_use(block));
    } else if (type == "compaction") {
      append(text, block.string_or("content", ""));
    }
    // Other blocks are the traces of tools that ran on another server; the model wrote none of it.
  }
  Json out = message_of("assistant", std::move(text));
  if (!reasoning.empty()) out.set("reasoning_content", js(reasoning));
  if (!calls.items().empty()) out.set("tool_calls", std::move(calls));
  return out;
}

/// The role of a message, checked.
std::string role_of(const Fields& message) {
  std::string role = message.string("role");
  if (role != "user" && role != "assistant" && role != "system")
    message.fail("role", "expected user, assistant or system");
  return role;
}

/// Whether the first message behind `index` that is no system message is a user's.
bool user_follows(const Json& messages, size_t index) {
  for (size_t i = index + 1; i < messages.items().size(); ++i) {
    const std::string role = role_of(Fields(messages.items()[i], concat("messages[", i, "]")));
    if (role != "system") return role == "user";
  }
  return false;
}

void read_system(const Fields& message,
                 bool before_user,
                 std::vector<Json>& out,
                 std::string& leading) {
  std::string text = parts_text(message, "content");
  const std::string last = out.empty() ? std::string() : out.back().find("role")->text();
  if (out.empty()) {
    append(leading, text);
  } else if (before_user && last == "assistant") {
    out.push_back(message_of("system", std::move(text)));
  } else if (before_user && last == "system") {
    std::string joined = out.back().find("content")->text();
    append(joined, text);
    out.back().set("content", js(joined));
  } else {
    out.push_back(message_of("user", std::move(text)));
  }
}

void read_messages(const Context& context, const Fields& body, ChatJob& chat) {
  const Json* messages = body.array_or_null("messages");
  if (messages == nullptr || messages->items().empty())
    body.fail("messages", "expected at least one message");
  if (messages->items().size() > context.options.max_messages)
    body.fail("messages", concat("more than ", context.options.max_messages, " messages"));
  std::string leading = system_text(body);
  std::vector<Json>& out = chat.messages;
  for (size_t i = 0; i < messages->items().size(); ++i) {
    const Fields message(messages->items()[i], concat("messages[", i, "]"));
    const std::string role = role_of(message);
    const Json* content = message.find("content");
    if (content == nullptr) message.fail("content", "expected text, found nothing");
    if (role == "system") {
      read_system(message, user_follows(*messages, i), out, leading);
    } else if (content->is_string()) {
      out.push_back(message_of(role.c_str(), content->text()));
    } else if (role == "user") {
      read_user(message, *message.array_or_null("content"), out);
    } else {
      out.push_back(read_assistant(message, *message.array_or_null("content")));
    }
  }
  // Nobody spoke but the system: the model answers that.
  if (out.empty()) out.push_back(message_of("user", ""));
  const Json& last = out.back();
  if (last.find("role")->text() == "assistant" && last.find("tool_calls") != nullptr)
    body.fail("messages", "the last message has tool calls without their results");
  if (body.has("system") || !leading.empty())
    out.insert(out.begin(), message_of("system", std::move(leading)));
}

void read_tool_choice(const Fields& body, ChatJob& chat) {
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

void read_tools(const Context& context, const Fields& body, MessagesRequest& out) {
  const auto leave_out = [&](const std::string& where, std::string_view what) {
    out.notes.push_back(concat(where, ": ", what, " does not run here and was left out"));
  };
  if (const Json* tools = body.array_or_null("tools")) {
    if (tools->items().size() > context.options.max_tools)
      body.fail("tools", concat("more than ", context.options.max_tools, " tools"));
    for (size_t i = 0; i < tools->items().size(); ++i) {
      const Fields tool(tools->items()[i], concat("tools[", i, "]"));
      const std::string type = tool.string_or("type", "custom");
      if (type != "custom") {
        leave_out(concat("tools[", i, "]"), concat("'", shown(type), "'"));
        continue;
      }
      Json function = Json::object({{"name", js(tool.string("name"))}});
      if (tool.has("description")) function.set("description", js(tool.string("description")));
      if (const Json* schema = tool.object_or_null("input_schema"))
        function.set("parameters", *schema);
      if (tool.boolean_or("strict", false)) function.set("strict", js(true));
      out.chat.tools.push_back(read_function(Fields(function, concat("tools[", i, "]"))));
    }
  }
  if (const Json* servers = body.array_or_null("mcp_servers");
      servers != nullptr && !servers->items().empty())
    leave_out("mcp_servers", "MCP");
  read_tool_choice(body, out.chat);
}

void read_thinking(const Context& context, const Fields& body, MessagesRequest& out) {
  if (body.has("thinking")) {
    const Fields thinking = body.object("thinking");
    const std::string type = thinking.string("type");
    if (type != "enabled" && type != "disabled" && type != "adaptive")
      thinking.fail("type", "expected enabled, disabled or adaptive");
    out.chat.thinking = type != "disabled";
    // As much as the model sees fit: one that was not taught to think, nothing.
    if (type == "adaptive" && !context.options.default_thinking) out.chat.thinking = false;
    out.omit_thinking = thinking.string_or("display", "") == "omitted";
    if (thinking.has("budget_tokens"))
      out.chat.thinking_budget = thinking.integer_or("budget_tokens", 0, 1, int64_t{1} << 40);
  }
  if (!body.has("output_config")) return;
  const Fields config = body.object("output_config");
  // Effort says how much to think, not whether to.
  if (config.has("effort") && !out.chat.thinking) out.chat.thinking = false;
  out.chat.effort = config.string_or("effort", "");
}

}  // namespace

MessagesRequest read_messages_request(const Context& context, const Fields& body) {
  MessagesRequest out;
  out.chat.default_thinking = false;
  read_messages(context, body, out.chat);
  read_tools(context, body, out);
  read_thinking(context, body, out);
  if (std::string note = settle_thinking(context, out.chat); !note.empty())
    out.notes.push_back(std::move(note));
  const auto take_format = [&](const Fields& holder, std::string_view key) {
    if (!holder.has(key)) return;
    const Fields format = holder.object(key);
    read_format(format, format, out.chat);
  };
  if (body.has("output_config")) take_format(body.object("output_config"), "format");
  take_format(body, "output_format");
  out.context_edits = body.has("context_management");
  return out;
}

}  // namespace hadal::server
