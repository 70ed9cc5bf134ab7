// Anthropic's /v1/messages: requests to jobs, answers to messages and their streaming events.
#pragma once

#include "server/chat_job.h"

namespace hadal::server {

/// POST /v1/messages. Thinking is off unless asked for, as that API has it. Images, documents and
/// tools that run on a server are refused.
Job message_job(const Context& context, const Json& body);
/// POST /v1/messages/count_tokens.
int64_t count_message_tokens(const Context& context, const Json& body);
HttpResponse anthropic_error(const RequestError& error);

}  // namespace hadal::server
