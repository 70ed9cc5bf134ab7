// Log probabilities of text completions, generated and given.
#include <algorithm>

#include "server/openai_types.h"
#include "text/utf8.h"

namespace hadal::server {
namespace {

bool continues_character(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

/// Text where the bytes are some; else the bytes one by one, so that different tokens have
/// different names.
std::string name_of(std::string_view bytes) {
  if (text::valid_utf8_prefix(bytes) == bytes.size()) return std::string(bytes);
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string name = "bytes:";
  for (const char byte : bytes) {
    const auto value = static_cast<unsigned char>(byte);
    name += "\\x";
    name += kHex[value >> 4];
    name += kHex[value & 15];
  }
  return name;
}

}  // namespace

std::string TextLogprobs::name(int64_t token) const {
  if (options_->ids_as_tokens) return concat("token_id:", token);
  return name_of(tokenizer_->token_bytes(static_cast<int32_t>(token)));
}

void TextLogprobs::add_entry(int64_t token, Json value, Json top, bool in_text) {
  const std::string_view bytes = tokenizer_->token_bytes(static_cast<int32_t>(token));
  const bool inside = in_text && !bytes.empty() && continues_character(bytes.front());
  names_.items().push_back(js(name(token)));
  values_.items().push_back(std::move(value));
  tops_.items().push_back(std::move(top));
  offsets_.items().push_back(js(std::max<int64_t>(characters_ - (inside ? 1 : 0), 0)));
  if (in_text)
    characters_ += std::ranges::count_if(bytes, [](char b) { return !continues_character(b); });
}

/// The most likely and the token itself, as OpenAI gives them.
Json TextLogprobs::top_of(int64_t token,
                          double logprob,
                          const std::vector<TokenLogprob>& top) const {
  Json object = Json::object();
  const auto add = [&](int64_t other, double value) {
    const std::string key = name(other);
    if (object.find(key) == nullptr) object.set(key, js(finite_logprob(value)));
  };
  for (size_t i = 0; i < top.size() && static_cast<int64_t>(i) < options_->top_logprobs; ++i)
    add(top[i].token, top[i].logprob);
  add(token, logprob);
  return object;
}

void TextLogprobs::add_prompt(const TextPrompt& prompt,
                              const std::vector<engine_core::TokenScore>& scores) {
  HADAL_CHECK(scores.size() == prompt.tokens.size(), "server: ", scores.size(), " scores of ",
              prompt.tokens.size(), " tokens");
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t token = prompt.tokens[i];
    const bool in_text = i >= prompt.hidden;
    if (i == 0) {
      add_entry(token, Json(), Json(), in_text);  // nothing is before it
      continue;
    }
    add_entry(token, js(finite_logprob(scores[i].logprob)),
              top_of(token, scores[i].logprob, scores[i].top), in_text);
  }
}

void TextLogprobs::add(const engine_core::OutputToken& token) {
  const bool hidden =
      std::ranges::count(options_->ends, token.token) > 0 ||
      (options_->hide_special && tokenizer_->is_added(static_cast<int32_t>(token.token)));
  add_entry(token.token, js(finite_logprob(token.logprob)),
            top_of(token.token, token.logprob, token.top), !hidden);
}

Json TextLogprobs::take() {
  if (names_.items().empty()) return {};
  const auto taken = [](Json& list) { return std::exchange(list, Json::array()); };
  return Json::object({{"tokens", taken(names_)},
                       {"token_logprobs", taken(values_)},
                       {"top_logprobs", taken(tops_)},
                       {"text_offset", taken(offsets_)}});
}

Json prompt_logprobs_json(const text::Tokenizer& tokenizer,
                          const OpenAiFormatOptions& options,
                          const TextPrompt& prompt,
                          const std::vector<engine_core::TokenScore>& scores) {
  Json list = Json::array();
  for (size_t i = 0; i < scores.size(); ++i) {
    if (i == 0) {
      list.items().emplace_back();
      continue;
    }
    const auto entry = [&](int64_t token, double logprob, int64_t rank) {
      return Json::object(
          {{"logprob", js(finite_logprob(logprob))},
           {"rank", js(rank)},
           {"decoded_token",
            js(text::repair_utf8(tokenizer.token_bytes(static_cast<int32_t>(token))))}});
    };
    Json object = Json::object();
    const int64_t token = prompt.tokens[i];
    object.set(concat(token), entry(token, scores[i].logprob, scores[i].rank));
    int64_t rank = 0;
    for (const TokenLogprob& other : scores[i].top) {
      if (++rank > options.prompt_logprobs) break;
      if (other.token != token)
        object.set(concat(other.token), entry(other.token, other.logprob, rank));
    }
    list.items().push_back(std::move(object));
  }
  return list;
}

}  // namespace hadal::server
