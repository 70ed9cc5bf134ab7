#include "data/text_transforms.h"

#include <algorithm>

#include "base/check.h"
#include "base/hash.h"
#include "base/philox.h"
#include "text/chat_tokens.h"
#include "text/utf8.h"

namespace hadal::data {
namespace {

bool is_punctuation(char c) {
  // Of ASCII, whatever the locale.
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
         (c >= '{' && c <= '~');
}

/// Bytes of a token before its line breaks, where it fuses punctuation with them; else 0.
size_t punctuation_before_breaks(std::string_view bytes) {
  const size_t at = bytes.find_first_of("\r\n");
  if (at == std::string_view::npos || at == 0 || !is_punctuation(bytes[at - 1])) return 0;
  return bytes.find_first_not_of("\r\n", at) == std::string_view::npos ? at : 0;
}

/// The first byte of the character that holds byte `at`.
size_t character_of(std::string_view text, size_t at) {
  while (at > 0 && at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
  return at;
}

int32_t fim_mark(const text::Tokenizer& tokenizer, std::string_view mark) {
  const auto id = tokenizer.find(mark);
  HADAL_INPUT_CHECK(id.has_value(), "fim_rate: the tokenizer has no token ", mark,
                    "; expected those of the official one: ", kFimBegin, ", ", kFimHole, ", ",
                    kFimEnd);
  return *id;
}

}  // namespace

DocumentEncoder::DocumentEncoder(const text::Tokenizer& tokenizer, const TextTransforms& transforms)
    : tokenizer_(tokenizer),
      transforms_(transforms),
      bos_(tokenizer.id_of(text::kBos)),
      eos_(tokenizer.id_of(text::kEos)) {
  if (transforms.fim_rate > 0.0) {
    fim_begin_ = fim_mark(tokenizer, kFimBegin);
    fim_hole_ = fim_mark(tokenizer, kFimHole);
    fim_end_ = fim_mark(tokenizer, kFimEnd);
  }
  if (transforms.split_rate <= 0.0) return;
  halves_.resize(static_cast<size_t>(tokenizer.vocab_size()));
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    if (tokenizer.is_added(id)) continue;
    const std::string_view bytes = tokenizer.token_bytes(id);
    const size_t at = punctuation_before_breaks(bytes);
    if (at == 0 || text::valid_utf8_prefix(bytes) != bytes.size()) continue;
    std::vector<int32_t>& halves = halves_[static_cast<size_t>(id)];
    tokenizer.encode(bytes.substr(0, at), text::SpecialTokens::kAsText, halves);
    tokenizer.encode(bytes.substr(at), text::SpecialTokens::kAsText, halves);
  }
}

std::vector<int32_t> DocumentEncoder::fused_tokens() const {
  std::vector<int32_t> ids;
  for (size_t id = 0; id < halves_.size(); ++id)
    if (!halves_[id].empty()) ids.push_back(static_cast<int32_t>(id));
  return ids;
}

Middle DocumentEncoder::middle_of(std::string_view text, int64_t number) const {
  const Middle whole{.begin = text.size(), .end = text.size()};
  if (transforms_.fim_rate <= 0.0 || text.size() < 3) return whole;
  const Philox random(transforms_.seed, fnv1a64(concat("fim ", number)));
  if (random.uniform(0) >= transforms_.fim_rate) return whole;
  const auto draw = [&](uint64_t counter) {
    const auto at =
        static_cast<size_t>(random.uniform(counter) * static_cast<double>(text.size() + 1));
    return character_of(text, std::min(at, text.size()));
  };
  const auto [begin, end] = std::minmax({draw(1), draw(2)});
  return {.begin = begin, .end = end, .chosen = true};
}

void DocumentEncoder::add(std::string_view text, int64_t number, std::vector<int32_t>& ids) const {
  const size_t first = ids.size();
  tokenizer_.encode(text, text::SpecialTokens::kAsText, ids);
  if (halves_.empty()) return;
  const Philox random(transforms_.seed, fnv1a64(concat("split ", number)));
  std::vector<int32_t> split;
  for (size_t i = first; i < ids.size(); ++i) {
    const std::vector<int32_t>& halves = halves_[static_cast<size_t>(ids[i])];
    if (!halves.empty() && random.uniform(i) < transforms_.split_rate) {
      split.insert(split.end(), halves.begin(), halves.end());
    } else {
      split.push_back(ids[i]);
    }
  }
  ids.resize(first);
  ids.insert(ids.end(), split.begin(), split.end());
}

std::vector<int32_t> DocumentEncoder::encode(std::string_view text, int64_t number) const {
  std::vector<int32_t> ids = {bos_};
  const Middle middle = middle_of(text, number);
  if (middle.chosen) {
    ids.push_back(fim_begin_);
    add(text.substr(0, middle.begin), number, ids);
    ids.push_back(fim_hole_);
    add(text.substr(middle.end), number, ids);
    ids.push_back(fim_end_);
    add(text.substr(middle.begin, middle.end - middle.begin), number, ids);
  } else {
    add(text, number, ids);
  }
  ids.push_back(eos_);
  return ids;
}

}  // namespace hadal::data
