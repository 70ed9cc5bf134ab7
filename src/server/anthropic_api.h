// Anthropic's /v1/messages: requests to jobs, answers to messages and their streaming events.
#pragma once

#include "server/chat_job.h"

namespace hadal::server {

/// POST /v1/messages. Thinking is off unless asked for, as that API has it. What the model cannot
/// read and tools that would run on a server are left out, and the answer says so.
Job message_job(const Context& context, const Json& body);
/// POST /v1/messages/count_tokens.
int64_t count_message_tokens(const Context& context, const Json& body);
HttpResponse anthropic_error(const RequestError& error, const std::string& request_id);

}  // namespace hadal::server
