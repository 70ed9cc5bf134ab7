// Messages of chats, as clients send them, in the form the chat encoding takes.
#include <algorithm>

#include "server/openai_reading.h"

namespace hadal::server {
namespace {

/// A call of the history: whatever clients make of its arguments is rendered.
Json read_call(const Fields& call) {
  const bool custom = call.string_or("type", "function") == "custom";
  const Fields inner = call.object(custom ? "custom" : "function");
  Json arguments = custom ? custom_arguments(inner.string_or("input", "")) : js("{}");
  if (!custom && inner.has("arguments")) arguments = *inner.find("arguments");
  return Json::object({{"id", js(call.string_or("id", ""))},
                       {"type", js("function")},
                       {"function", Json::object({{"name", js(inner.string("name"))},
                                                  {"arguments", std::move(arguments)}})}});
}

Json read_assistant(const Fields& message) {
  Json out = Json::object(
      {{"role", js("assistant")},
       {"content", js(read_text(message, "content", {"text", "output_text", "refusal"}))}});
  for (const std::string_view key : {"reasoning_content", "reasoning"}) {
    const Json* reasoning = message.find(key);
    if (reasoning == nullptr || !reasoning->is_string() || reasoning->text().empty()) continue;
    out.set("reasoning_content", *reasoning);
    break;
  }
  Json list = Json::array();
  if (const Json* calls = message.array_or_null("tool_calls")) {
    for (size_t i = 0; i < calls->items().size(); ++i) {
      list.items().push_back(
          read_call(Fields(calls->items()[i], concat(message.path("tool_calls"), "[", i, "]"))));
    }
  } else if (message.has("function_call")) {
    list.items().push_back(
        Json::object({{"type", js("function")}, {"function", *message.find("function_call")}}));
  }
  if (!list.items().empty()) out.set("tool_calls", std::move(list));
  return out;
}

/// One of a client's messages.
Json read_message(const Fields& message) {
  const std::string role = message.string("role");
  const auto of_text = [&](std::string_view as) {
    return Json::object(
        {{"role", js(as)}, {"content", js(read_text(message, "content", {"text", "input_text"}))}});
  };
  // OpenAI's developer messages are what system messages were.
  if (role == "system" || role == "developer") return of_text("system");
  if (role == "latest_reminder") return of_text(role);
  if (role == "user") {
    if (!message.has("content")) message.fail("content", "expected text, found nothing");
    return of_text(role);
  }
  if (role == "tool" || role == "function") {
    Json out = of_text("tool");
    out.set("tool_call_id", js(message.string_or("tool_call_id", "")));
    return out;
  }
  if (role != "assistant")
    message.fail("role", "expected system, developer, user, assistant, tool or latest_reminder");
  return read_assistant(message);
}

/// Whether the answer goes on from the last message, and whether there is an answer to be opened.
void read_ending(const Fields& body, const Fields& last, ChatJob& chat) {
  const bool assistant = chat.messages.back().find("role")->text() == "assistant";
  const bool prefix = last.boolean_or("prefix", false);
  const bool continued = body.boolean_or("continue_final_message", false);
  chat.opens_turn = body.boolean_or("add_generation_prompt", !continued);
  if (continued && chat.opens_turn)
    body.fail("continue_final_message", "cannot be set beside add_generation_prompt");
  if (continued && !assistant)
    body.fail("continue_final_message", "the last message is not the assistant's");
  chat.continues = assistant && (prefix || continued);
  if (!assistant) return;
  if (!chat.continues && chat.opens_turn) {
    last.fail("role",
              "the last message is the assistant's; set prefix (or continue_final_message) to have "
              "it continued");
  }
  if (chat.continues && last.has("tool_calls"))
    last.fail("tool_calls", "a prefix cannot have tool calls");
}

}  // namespace

void read_chat_messages(const Context& context, const Fields& body, ChatJob& chat) {
  const Json* messages = body.array_or_null("messages");
  if (messages == nullptr || messages->items().empty())
    body.fail("messages", "expected at least one message");
  if (messages->items().size() > context.options.max_messages)
    body.fail("messages", concat("more than ", context.options.max_messages, " messages"));
  for (size_t i = 0; i < messages->items().size(); ++i) {
    const Fields message(messages->items()[i], concat("messages[", i, "]"));
    chat.messages.push_back(read_message(message));
  }
  read_ending(body,
              Fields(messages->items().back(), concat("messages[", chat.messages.size() - 1, "]")),
              chat);
  settle_system_messages(chat.messages);
}

}  // namespace hadal::server
