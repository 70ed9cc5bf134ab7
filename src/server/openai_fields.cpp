#include "server/openai_fields.h"

#include <algorithm>
#include <array>
#include <charconv>

#include "server/cache_key.h"

namespace hadal::server {
namespace {

/// A field that is fine while it says what happens anyway.
struct Unsupported {
  std::string_view name;
  std::string_view harmless;  ///< values as JSON, separated by '|'; null and absence always are
  std::string_view why;
  std::string_view where = "chat completions responses";
};

constexpr std::string_view kNoBeams = "beams are not searched";
constexpr std::string_view kNotSampled = "this way of sampling is not supported";
constexpr std::string_view kOwnEncoding = "the model's own chat encoding is used";
constexpr std::array kUnsupported = {
    Unsupported{"use_beam_search", "false", kNoBeams},
    Unsupported{"length_penalty", "1|1.0|0|0.0", kNoBeams},
    Unsupported{"early_stopping", "false", kNoBeams},
    Unsupported{"include_stop_str_in_output", "false", "an answer ends before its stop string"},
    Unsupported{"no_stop_trim", "false", "an answer ends before its stop string"},
    Unsupported{"stop_regex", "[]|\"\"", "stop takes strings"},
    Unsupported{"bad_words", "[]", "use logit_bias"},
    Unsupported{"allowed_token_ids", "", "use a grammar or logit_bias"},
    Unsupported{"logits_processors", "[]", "no code of a client's is run"},
    Unsupported{"custom_logit_processor", "\"\"", "no code of a client's is run"},
    Unsupported{"custom_params", "{}", "no code of a client's is run"},
    Unsupported{"truncate_prompt_tokens", "", "prompts are never cut"},
    Unsupported{"prompt_embeds", "[]", "prompts are text or token ids"},
    Unsupported{"input_embeds", "[]", "prompts are text or token ids"},
    Unsupported{"lora_path", "\"\"", "there are no adapters"},
    Unsupported{"session_params", "{}", "the prefix cache needs none"},
    Unsupported{"kv_transfer_params", "{}", "the cache belongs to this server"},
    Unsupported{"vllm_xargs", "{}", "no code of a client's is run"},
    Unsupported{"return_hidden_states", "false", "hidden states are not returned"},
    Unsupported{"return_routed_experts", "false", "routing is not returned"},
    Unsupported{"guided_whitespace_pattern", "", "white space in JSON is bounded already"},
    Unsupported{"typical_p", "1|1.0", kNotSampled},
    Unsupported{"top_a", "0|0.0", kNotSampled},
    Unsupported{"tfs_z", "1|1.0", kNotSampled},
    Unsupported{"mirostat", "0", kNotSampled},
    Unsupported{"mirostat_mode", "0", kNotSampled},
    Unsupported{"dynatemp_range", "0|0.0", kNotSampled},
    Unsupported{"xtc_probability", "0|0.0", kNotSampled},
    Unsupported{"dry_multiplier", "0|0.0", kNotSampled},
    Unsupported{"no_repeat_ngram_size", "0", kNotSampled},
    Unsupported{"best_of", "1", "use n", "chat responses"},
    Unsupported{"stream_reasoning", "true", "reasoning streams as it comes", "chat"},
    Unsupported{"echo", "false", "only /v1/completions repeats its prompt", "chat responses"},
    Unsupported{"chat_template", "", kOwnEncoding, "chat"},
    Unsupported{"documents", "[]", "put them into a message", "chat"},
    Unsupported{"mm_processor_kwargs", "{}", "this model reads text", "chat"},
    Unsupported{"separate_reasoning", "true", "reasoning is always apart", "chat"},
    Unsupported{"include_reasoning", "true", "reasoning is always given", "chat"},
    Unsupported{"skip_special_tokens", "true", "markup becomes fields of the answer", "chat"},
    Unsupported{"modalities", "[\"text\"]|[]", "this model writes text", "chat"},
    Unsupported{"audio", "", "this model writes text", "chat"},
    Unsupported{"functions", "[]", "use tools", "chat"},
    Unsupported{"function_call", "\"none\"|\"auto\"", "use tool_choice", "chat"},
    Unsupported{"prompt_logprobs", "", "only chats and completions have them", "responses"},
    Unsupported{"conversation", "", "conversations are not stored; send the items", "responses"},
    Unsupported{"prompt", "", "prompts are not stored; send the items", "responses"},
    Unsupported{"max_tool_calls", "", "there are no tools that the server calls", "responses"},
    Unsupported{"truncation", "\"disabled\"", "inputs are never cut", "responses"},
    Unsupported{"context_management", "[]", "inputs are never compacted", "responses"},
};

bool is_harmless(std::string_view value, std::string_view list) {
  while (!list.empty()) {
    const size_t end = std::min(list.find('|'), list.size());
    if (list.substr(0, end) == value) return true;
    list.remove_prefix(std::min(end + 1, list.size()));
  }
  return false;
}

}  // namespace

void refuse_unsupported(const Fields& body, std::string_view where) {
  for (const Unsupported& field : kUnsupported) {
    if (field.where.find(where) == std::string_view::npos) continue;
    const Json* value = body.find(field.name);
    if (value != nullptr && !is_harmless(value->dump(), field.harmless))
      body.fail(field.name, concat("not supported: ", field.why));
  }
}

void read_extensions(const Context& context,
                     const Fields& body,
                     engine_core::Request& request,
                     OpenAiFormatOptions& format) {
  const int64_t vocab = context.engine.info().vocab_size;
  if (const Json* list = body.array_or_null("stop_token_ids")) {
    if (list->items().size() > 1024) body.fail("stop_token_ids", "more than 1024 tokens");
    for (const Json& item : list->items()) {
      const auto id = integer_of(item);
      if (!id || *id < 0 || *id >= vocab)
        body.fail("stop_token_ids", "expected token ids of the vocabulary");
      request.stop_tokens.push_back(*id);
    }
  }
  request.min_tokens = body.integer_or("min_tokens", 0, 0, int64_t{1} << 40);
  if (request.max_tokens > 0 && request.min_tokens > request.max_tokens)
    body.fail("min_tokens", concat("more than the ", request.max_tokens, " tokens at most"));
  if (request.min_tokens > 0 && !request.stop.empty())
    body.fail("min_tokens", "cannot put off a stop string; use stop_token_ids");
  format.prompt_logprobs = body.integer_or("prompt_logprobs", -1, 0, 20);
  request.prompt_logprobs = format.prompt_logprobs;
  if (format.prompt_logprobs >= 0 && body.boolean_or("stream", false))
    body.fail("prompt_logprobs", "not in a stream; ask for the whole answer");
  format.token_ids = body.boolean_or("return_token_ids", false);
  format.ids_as_tokens = body.boolean_or("return_tokens_as_token_ids", false);
  format.sampled_logprobs = body.boolean_or("return_sampled_logprobs", false);
  request.sampled_logprobs = format.sampled_logprobs;
  // Who salts the cache wants to share with nobody else.
  if (!body.string_or("cache_salt", "").empty()) request.use_prefix_cache = false;
  request.cache_key = read_cache_key(body);
  const engine_core::EngineInfo& info = context.engine.info();
  format.ends = request.stop_tokens;
  if (!request.ignore_eos) format.ends.push_back(info.eos_token);
}

namespace {

/// One of the answers, literally.
engine_core::Grammar choice_grammar(const Fields& fields, std::string_view key) {
  const Json* list = fields.array_or_null(key);
  if (list == nullptr || list->items().empty()) fields.fail(key, "expected at least one answer");
  std::string rule = "root ::= ";
  for (size_t i = 0; i < list->items().size(); ++i) {
    const Json& item = list->items()[i];
    if (!item.is_string() || item.text().empty())
      fields.fail(key, "expected answers, each a text of at least one character");
    rule += concat(i > 0 ? " | " : "", text::quote_json(item.text()));
  }
  return {engine_core::Grammar::Kind::kEbnf, std::move(rule)};
}

/// A schema as an object or as the text of one.
void read_schema(const Fields& fields, std::string_view key, ChatJob& chat) {
  const Json* value = fields.find(key);
  Json schema = *value;
  if (value->is_string()) {
    try {
      schema = Json::parse(value->text(), fields.path(key));
    } catch (const InputError& error) {
      fields.fail(key, error.what());
    }
  }
  if (!schema.is_object()) fields.fail(key, "expected a JSON schema");
  chat.format = {engine_core::Grammar::Kind::kJsonSchema, schema.dump()};
  chat.format_schema = std::move(schema);
}

void read_constraint(const Fields& fields,
                     std::string_view key,
                     std::string_view kind,
                     ChatJob& chat) {
  using Kind = engine_core::Grammar::Kind;
  if (kind == "json") {
    read_schema(fields, key, chat);
  } else if (kind == "regex") {
    chat.format = {Kind::kRegex, fields.string(key)};
  } else if (kind == "grammar") {
    chat.format = {Kind::kEbnf, fields.string(key)};
  } else if (kind == "choice") {
    chat.format = choice_grammar(fields, key);
  } else if (fields.boolean_or(key, false)) {
    chat.format = {Kind::kJsonObject, ""};
  }
}

}  // namespace

void read_structure(const Fields& body, ChatJob& chat) {
  struct Way {
    std::string_view key, kind;
  };
  constexpr std::array<Way, 8> kWays = {{{"guided_json", "json"},
                                         {"guided_regex", "regex"},
                                         {"guided_choice", "choice"},
                                         {"guided_grammar", "grammar"},
                                         {"guided_json_object", "json_object"},
                                         {"regex", "regex"},
                                         {"ebnf", "grammar"},
                                         {"json_schema", "json"}}};
  std::string_view first;
  const auto only = [&](std::string_view key) {
    if (!first.empty()) body.fail(key, concat("the answer has a form already, by ", first));
    first = key;
  };
  if (body.has("response_format")) {
    const Fields format = body.object("response_format");
    const bool nested = format.string("type") == "json_schema";
    read_format(format, nested ? format.object("json_schema") : format, chat);
    if (chat.format.kind != engine_core::Grammar::Kind::kNone) only("response_format");
  }
  for (const Way& way : kWays) {
    if (!body.has(way.key)) continue;
    only(way.key);
    read_constraint(body, way.key, way.kind, chat);
  }
  if (!body.has("structured_outputs")) return;
  const Fields outputs = body.object("structured_outputs");
  for (const std::string_view kind : {"json", "regex", "choice", "grammar", "json_object"}) {
    if (!outputs.has(kind)) continue;
    only("structured_outputs");
    read_constraint(outputs, kind, kind, chat);
  }
  for (const std::string_view key : {"structural_tag", "whitespace_pattern"}) {
    if (outputs.has(key)) outputs.fail(key, "not supported");
  }
}

void read_logit_bias(const Context& context, const Fields& body, engine_core::Request& request) {
  const Json* bias = body.object_or_null("logit_bias");
  if (bias == nullptr) return;
  if (bias->members().size() > 1024) body.fail("logit_bias", "more than 1024 tokens");
  const Fields fields(*bias, "logit_bias");
  for (const auto& [key, value] : bias->members()) {
    int64_t token = -1;
    const auto end = std::from_chars(key.data(), key.data() + key.size(), token);
    if (end.ec != std::errc() || end.ptr != key.data() + key.size() || token < 0 ||
        token >= context.engine.info().vocab_size)
      body.fail("logit_bias", concat("'", key.substr(0, 40), "' is no token id"));
    request.sampling.logit_bias.emplace_back(token, fields.number_or(key, 0, -100, 100));
  }
}

void read_stream_options(const Fields& body, OpenAiFormatOptions& format) {
  if (!body.has("stream_options")) return;
  const Fields options = body.object("stream_options");
  format.include_usage = options.boolean_or("include_usage", false);
  format.usage_in_chunks =
      format.include_usage && options.boolean_or("continuous_usage_stats", false);
}

}  // namespace hadal::server
