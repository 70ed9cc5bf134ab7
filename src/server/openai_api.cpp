#include "server/openai_api.h"

#include <algorithm>

#include "server/openai_fields.h"
#include "server/openai_reading.h"
#include "server/openai_types.h"
#include "text/chat_tokens.h"

namespace hadal::server {
ChatJob read_chat_completion(const Context& context,
                             const Fields& body,
                             Notes* notes,
                             std::set<std::string>* custom_tools) {
  ChatJob chat;
  chat.default_thinking = context.options.default_thinking;
  read_chat_messages(context, body, chat);
  ToolNames names;
  Notes left_out;
  read_openai_tools(context, body, true, chat, names, left_out);
  for (const auto& [name, tool] : names) {
    if (tool.custom && custom_tools != nullptr) custom_tools->insert(name);
  }
  read_openai_tool_choice(body, true, chat, left_out);
  if (body.has("web_search_options"))
    left_out.emplace_back("web_search_options: nothing is searched here");
  read_thinking(body, chat);
  if (std::string note = settle_thinking(context, chat); !note.empty())
    left_out.push_back(std::move(note));
  if (notes != nullptr) *notes = std::move(left_out);
  chat.task = body.string_or("task", "");
  if (!chat.task.empty()) {
    const auto& known = text::kTaskTokens;
    if (std::none_of(known.begin(), known.end(),
                     [&](const text::TaskToken& t) { return t.task == chat.task; }))
      body.fail("task", "expected action, query, authority, domain, title or read_url");
    if (chat.messages.back().find("role")->text() != "user")
      body.fail("task", "the last message must be a user's");
  }
  read_structure(body, chat);
  return chat;
}

Job chat_completion_job(const Context& context, const Json& json) {
  const Fields body(json, "");
  const std::string model = read_model(context, body);
  refuse_unsupported(body, "chat");
  OpenAiFormatOptions format;
  ChatJob chat = read_chat_completion(context, body, &format.notes, &format.custom_tools);
  engine_core::Request& request = chat.base;
  read_sampling(context, body, request);
  read_logit_bias(context, body, request);
  request.stop = read_stop(body, "stop", context.options);
  const int64_t new_limit = read_max_tokens(body, "max_completion_tokens");
  const int64_t old_limit = read_max_tokens(body, "max_tokens");
  request.max_tokens = new_limit > 0 ? new_limit : old_limit;
  request.n = body.integer_or("n", 1, 1, std::max<int64_t>(1, context.engine.info().max_choices));
  format.logprobs = body.boolean_or("logprobs", false);
  const int64_t top = body.integer_or("top_logprobs", 0, 0, 20);
  if (top > 0 && !format.logprobs) body.fail("top_logprobs", "needs logprobs to be true");
  if (format.logprobs) request.top_logprobs = top;
  const bool stream = body.boolean_or("stream", false);
  read_stream_options(body, format);
  read_extensions(context, body, request, format);
  format.choices_per_prompt = request.n;
  Job job = make_chat_job(context, std::move(chat));
  if (format.token_ids || format.prompt_logprobs >= 0)
    format.prompts.push_back({"", job.requests.front().prompt});
  job.keep_token_ids = format.token_ids;
  job.keep_sampled_logprobs = format.sampled_logprobs;
  job.stream = stream;
  job.id = random_id("chatcmpl-");
  job.model = model;
  job.format = chat_completion_format(context.tokenizer, std::move(format));
  return job;
}

}  // namespace hadal::server
