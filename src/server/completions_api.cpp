// POST /v1/completions: prompts as text or token ids, one or many.
#include <algorithm>

#include "server/openai_api.h"
#include "server/openai_fields.h"
#include "server/openai_types.h"
#include "text/chat_tokens.h"

namespace hadal::server {

namespace {

/// How a prompt of text becomes tokens.
struct PlainPrompt {
  bool add_bos, special;
  PlainPrompt(const Fields& body, const std::string& prompt) {
    add_bos = body.boolean_or("add_special_tokens", true);
    // Who wants no BOS or has written one writes the special tokens himself.
    const bool written = prompt.starts_with(text::kBos);
    special = body.boolean_or("special_tokens", !add_bos || written);
    if (special && written) add_bos = false;
  }
};

}  // namespace

std::vector<int64_t> plain_prompt_tokens(const Context& context,
                                         const Fields& body,
                                         const std::string& prompt) {
  const PlainPrompt plain(body, prompt);
  std::vector<int32_t> ids;
  if (plain.add_bos) ids.push_back(context.tokenizer.id_of(text::kBos));
  context.tokenizer.encode(
      prompt, plain.special ? text::SpecialTokens::kRecognise : text::SpecialTokens::kAsText, ids);
  return {ids.begin(), ids.end()};
}

namespace {

TextPrompt prompt_of_tokens(const Context& context, const Fields& body, const Json& list) {
  TextPrompt prompt;
  std::vector<int32_t> ids;
  for (const Json& item : list.items()) {
    const auto id = integer_of(item);
    if (!id || *id < 0 || *id >= context.engine.info().vocab_size)
      body.fail("prompt", "expected token ids of the vocabulary");
    prompt.tokens.push_back(*id);
    ids.push_back(static_cast<int32_t>(*id));
  }
  if (ids.empty()) body.fail("prompt", "a list of token ids is empty");
  if (body.boolean_or("echo", false)) prompt.text = context.tokenizer.decode(ids);
  return prompt;
}

std::vector<TextPrompt> read_prompts(const Context& context, const Fields& body) {
  const Json* value = body.find("prompt");
  if (value == nullptr) body.fail("prompt", "expected text or token ids, found nothing");
  const auto of_text = [&](const std::string& text) {
    TextPrompt prompt{text, plain_prompt_tokens(context, body, text),
                      PlainPrompt(body, text).add_bos ? size_t{1} : size_t{0}};
    if (prompt.tokens.empty()) body.fail("prompt", "the prompt is empty");
    return prompt;
  };
  if (value->is_string()) return {of_text(value->text())};
  const Json& list = *body.array_or_null("prompt");
  if (list.items().empty()) body.fail("prompt", "the list is empty");
  if (list.items().front().kind() == Json::Kind::kInteger)
    return {prompt_of_tokens(context, body, list)};
  if (list.items().size() > context.options.max_prompts)
    body.fail("prompt", concat("more than ", context.options.max_prompts, " prompts"));
  std::vector<TextPrompt> prompts;
  for (const Json& item : list.items()) {
    if (item.is_string()) {
      prompts.push_back(of_text(item.text()));
    } else if (item.is_array()) {
      prompts.push_back(prompt_of_tokens(context, body, item));
    } else {
      body.fail("prompt", concat("expected text or token ids, found ", item.kind_name()));
    }
  }
  return prompts;
}

/// `logprobs`: a number, or true for the token's own and the likeliest.
void read_logprobs(const Fields& body, engine_core::Request& request, OpenAiFormatOptions& format) {
  const Json* value = body.find("logprobs");
  if (value == nullptr) return;
  if (value->kind() == Json::Kind::kBool) {
    format.logprobs = value->truthy();
    format.top_logprobs = body.integer_or("top_logprobs", 1, 0, 20);
  } else {
    format.logprobs = true;
    format.top_logprobs = body.integer_or("logprobs", 0, 0, 20);
  }
  if (!format.logprobs) return;
  request.top_logprobs = format.top_logprobs;
  if (format.echo) request.prompt_logprobs = std::max(request.prompt_logprobs, format.top_logprobs);
}

/// A stream's client reads as it goes, and what waits for it is bounded.
void check_streamed_echo(const Context& context,
                         const Fields& body,
                         const OpenAiFormatOptions& format) {
  if (!format.echo || !format.logprobs) return;
  constexpr size_t kBytes = 48;  // of a token's entry in one of the lists, as a rule
  for (const TextPrompt& prompt : format.prompts) {
    const size_t bytes =
        prompt.tokens.size() * kBytes * static_cast<size_t>(format.top_logprobs + 3);
    if (bytes > context.options.max_output_bytes / 2)
      body.fail("echo", concat("the logprobs of ", prompt.tokens.size(),
                               " tokens are too much for a stream; ask for the whole answer"));
  }
}

}  // namespace

Job text_completion_job(const Context& context, const Json& json) {
  const Fields body(json, "");
  Job job;
  job.model = read_model(context, body);
  if (body.has("suffix") && !body.string("suffix").empty())
    body.fail("suffix", "insertion is not supported");
  refuse_unsupported(body, "completions");
  engine_core::Request base;
  read_sampling(context, body, base);
  read_logit_bias(context, body, base);
  base.stop = read_stop(body, "stop", context.options);
  base.max_tokens = body.integer_or("max_tokens", 16, 0, int64_t{1} << 40);
  base.n = body.integer_or("n", 1, 1, std::max<int64_t>(1, context.engine.info().max_choices));
  if (body.integer_or("best_of", base.n, 1, 1 << 20) != base.n)
    body.fail("best_of", "only as many as n are supported");
  OpenAiFormatOptions format;
  format.echo = body.boolean_or("echo", false);
  read_extensions(context, body, base, format);
  read_logprobs(body, base, format);
  // Then they are told apart by their ids, and what is held back for stop strings is other text.
  format.hide_special = body.boolean_or("skip_special_tokens", false);
  base.structured = format.hide_special;
  ChatJob holder;
  read_structure(body, holder);
  base.grammar = holder.format;
  read_stream_options(body, format);
  format.choices_per_prompt = base.n;
  format.prompts = read_prompts(context, body);
  for (const TextPrompt& prompt : format.prompts) {
    engine_core::Request request = base;
    request.prompt = prompt.tokens;
    fit_context(context, request, base.max_tokens == 0 ? Room::kNone : Room::kAnswer);
    job.requests.push_back(std::move(request));
  }
  job.stream = body.boolean_or("stream", false);
  if (job.stream) check_streamed_echo(context, body, format);
  job.keep_token_ids = format.token_ids;
  job.keep_sampled_logprobs = format.sampled_logprobs;
  job.id = random_id("cmpl-");
  job.format = text_completion_format(context.tokenizer, std::move(format));
  return job;
}

}  // namespace hadal::server
