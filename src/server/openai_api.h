// OpenAI's requests to jobs: chat completions, text completions, responses.
#pragma once

#include <set>
#include <string>

#include "server/chat_job.h"

namespace hadal::server {

/// POST /v1/chat/completions. Beyond OpenAI's fields: `thinking` ({"type": "enabled"} or a
/// boolean), `task` (quick instruction), min_p, top_k, repetition_penalty, priority, ignore_eos,
/// use_prefix_cache, `prefix` on a last assistant message that is to be continued.
Job chat_completion_job(const Context& context, const Json& body);
/// The conversation of such a body (also of /tokenize).
/// `notes`, if there, gets what is left out, `custom_tools` the names of those that take one text.
ChatJob read_chat_completion(const Context& context,
                             const Fields& body,
                             std::vector<std::string>* notes = nullptr,
                             std::set<std::string>* custom_tools = nullptr);

/// POST /v1/completions. Prompts are plain text behind BOS. A text that begins with BOS, and any
/// with `add_special_tokens` false, gets none, and its special tokens are recognised;
/// `special_tokens` says whether they are, either way. Lists of token ids are taken as they are.
Job text_completion_job(const Context& context, const Json& body);
/// Tokens of a plain prompt as /v1/completions and /tokenize read it.
std::vector<int64_t> plain_prompt_tokens(const Context& context,
                                         const Fields& body,
                                         const std::string& prompt);

/// POST /v1/responses, stateless: nothing is stored, so previous_response_id is refused.
Job response_job(const Context& context, const Json& body);

}  // namespace hadal::server
