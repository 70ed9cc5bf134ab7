// From tokens to text: decoding, stop strings and grammars over a real tokenizer, as the scheduler
// wants them.
#pragma once

#include <cstdint>
#include <memory>

#include "engine_core/grammar/grammar.h"
#include "engine_core/sampler.h"
#include "text/tokenizer.h"

namespace hadal::engine {

class TextFilters final : public AnswerFilters {
 public:
  /// `tokenizer` must outlive it and its filters.
  explicit TextFilters(const text::Tokenizer& tokenizer)
      : tokenizer_(tokenizer), compiler_(tokenizer) {}
  /// Errors: InputError for an empty stop string, or a grammar that cannot be.
  std::unique_ptr<AnswerFilter> create(const Request& request) override;

 private:
  const text::Tokenizer& tokenizer_;
  GrammarCompiler compiler_;
};

}  // namespace hadal::engine
