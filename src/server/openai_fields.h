// Fields that OpenAI's APIs share, and those of vLLM and SGLang beside them: honoured, or refused
// where they would change the answer. What changes nothing is ignored.
#pragma once

#include "server/chat_job.h"
#include "server/openai_types.h"

namespace hadal::server {

/// Errors: RequestError 400 naming the first field that asks for what this server does not do.
/// `where` is "chat", "completions" or "responses".
void refuse_unsupported(const Fields& body, std::string_view where);

/// stop_token_ids, min_tokens, prompt_logprobs, return_token_ids, cache_salt, ... into `request`
/// and `format`. Behind request.stop, request.max_tokens and request.ignore_eos.
void read_extensions(const Context& context,
                     const Fields& body,
                     engine_core::Request& request,
                     OpenAiFormatOptions& format);

/// What the answer's text must be, in any of the ways clients say it (response_format,
/// structured_outputs, guided_*, regex, ebnf, json_schema): one of them, into chat.format.
void read_structure(const Fields& body, ChatJob& chat);

void read_logit_bias(const Context& context, const Fields& body, engine_core::Request& request);
void read_stream_options(const Fields& body, OpenAiFormatOptions& format);

}  // namespace hadal::server
