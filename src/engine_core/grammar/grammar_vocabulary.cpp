#include "engine_core/grammar/grammar_vocabulary.h"

#include <utility>

#include "base/check.h"

namespace hadal::engine_core {
namespace {

int8_t step_byte(int8_t state, uint8_t byte) {
  const auto in = [byte](uint8_t first, uint8_t last, int8_t next) {
    return byte >= first && byte <= last ? next : int8_t{kBroken};
  };
  switch (state) {
    case kWhole:
      if (byte < 0x80) return kWhole;
      if (byte >= 0xC2 && byte <= 0xDF) return kOne;
      if (byte == 0xE0) return kAfterE0;
      if (byte == 0xED) return kAfterEd;
      if (byte >= 0xE1 && byte <= 0xEF) return kTwo;
      if (byte == 0xF0) return kAfterF0;
      if (byte >= 0xF1 && byte <= 0xF3) return kThree;
      return byte == 0xF4 ? kAfterF4 : kBroken;
    case kOne:
      return in(0x80, 0xBF, kWhole);
    case kTwo:
      return in(0x80, 0xBF, kOne);
    case kThree:
      return in(0x80, 0xBF, kTwo);
    case kAfterE0:
      return in(0xA0, 0xBF, kOne);
    case kAfterEd:
      return in(0x80, 0x9F, kOne);
    case kAfterF0:
      return in(0x90, 0xBF, kTwo);
    case kAfterF4:
      return in(0x80, 0x8F, kTwo);
    default:
      return kBroken;
  }
}

}  // namespace

int8_t step_utf8(int8_t state, std::string_view bytes) {
  if (bytes.empty()) return state == kWhole ? kWhole : kBroken;
  for (const char byte : bytes) state = step_byte(state, static_cast<uint8_t>(byte));
  return state;
}

std::shared_ptr<const GrammarVocabulary> make_vocabulary(const text::Tokenizer& tokenizer,
                                                         int64_t size) {
  auto result = std::make_shared<GrammarVocabulary>();
  GrammarVocabulary& vocabulary = *result;
  vocabulary.size = size == 0 ? tokenizer.vocab_size() : size;
  HADAL_CHECK(vocabulary.size >= tokenizer.vocab_size(), "grammar: a vocabulary of ", size,
              " tokens, the tokenizer has ", tokenizer.vocab_size());
  vocabulary.eos = tokenizer.id_of(text::kEos);
  const std::optional<int32_t> dsml = tokenizer.find(text::kDsml);
  int32_t end = tokenizer.find(text::kThinkEnd).value_or(-1);
  if (end >= 0 && !tokenizer.is_added(end)) end = -1;
  vocabulary.think_end = end;
  vocabulary.bytes.resize(static_cast<size_t>(tokenizer.vocab_size()));
  vocabulary.thinking_mask.resize(vocabulary.mask_words());
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    if (tokenizer.is_added(id) && id != end) continue;
    const auto place = static_cast<size_t>(id);
    const std::string_view bytes = tokenizer.token_bytes(id);
    if (bytes.empty()) continue;
    vocabulary.thinking_mask[place / 32] |= 1u << place % 32;
    if (id == end) continue;
    vocabulary.bytes[place] = bytes;
  }
  for (int8_t state = 0; state < kUtf8States; ++state) {
    std::vector<uint32_t>& mask = vocabulary.utf8_masks[static_cast<uint8_t>(state)];
    mask.resize(vocabulary.mask_words());
    for (size_t place = 0; place < static_cast<size_t>(vocabulary.size); ++place) {
      const std::string_view bytes =
          place < vocabulary.bytes.size() ? vocabulary.bytes[place] : std::string_view();
      if (step_utf8(state, bytes) != kBroken) mask[place / 32] |= 1u << place % 32;
    }
  }
  vocabulary.dsml = dsml && tokenizer.is_added(*dsml) ? *dsml : -1;
  const auto info = [&](const std::vector<std::string>& bytes) {
    return xgrammar::TokenizerInfo(bytes, xgrammar::VocabType::RAW,
                                   static_cast<int>(vocabulary.size),
                                   std::vector<int32_t>{vocabulary.eos});
  };
  vocabulary.plain = info(vocabulary.bytes);
  std::vector<std::string> bytes = vocabulary.bytes;
  for (std::string& text : bytes) {
    if (text.find(kMarkerSign) != std::string::npos) text.clear();
  }
  if (vocabulary.dsml >= 0) bytes[static_cast<size_t>(vocabulary.dsml)] = kMarkerSign;
  vocabulary.with_dsml = info(bytes);
  return result;
}

}  // namespace hadal::engine_core
