// Parts of OpenAI's requests that more than one of its APIs has.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "server/chat_job.h"

namespace hadal::server {

/// The messages of a chat. Errors: RequestError.
void read_chat_messages(const Context& context, const Fields& body, ChatJob& chat);

/// How tools are called in a prompt and what clients call them.
struct ToolName {
  std::string name, space;  ///< `space`: the namespace; empty: none
  bool custom = false;      ///< one text instead of JSON
};
using ToolNames = std::map<std::string, ToolName>;  ///< by the name in the prompt

/// What was asked for and is left out.
using Notes = std::vector<std::string>;

/// `nested`: {"type": "function", "function": {...}} as chats have it; else flat, with namespaces,
/// as /v1/responses has it. Tools that would run on the server are left out.
void read_openai_tools(const Context& context,
                       const Fields& body,
                       bool nested,
                       ChatJob& chat,
                       ToolNames& names,
                       Notes& notes);
void read_openai_tool_choice(const Fields& body, bool nested, ChatJob& chat, Notes& notes);
/// The name in the prompt of what a client calls `name` in `space`.
std::string prompt_name(std::string_view space, std::string_view name);
/// Arguments of a custom tool, as the model sees them.
Json custom_arguments(std::string_view input);
/// The text of a custom tool's call.
std::string custom_input(const CallRecord& call);

/// thinking, enable_thinking, reasoning, reasoning_effort, budgets, chat_template_kwargs.
void read_thinking(const Fields& body, ChatJob& chat);

}  // namespace hadal::server
