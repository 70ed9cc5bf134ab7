// From tokens to text: decoding, stop strings and grammars over a real tokenizer, as the scheduler
// wants them.
#pragma once

#include <cstdint>
#include <memory>

#include "engine_core/grammar/grammar.h"
#include "engine_core/sampler.h"
#include "text/tokenizer.h"

namespace hadal::engine_core {

class TextFilters final : public AnswerFilters {
 public:
  /// `tokenizer` must outlive it and its filters.
  explicit TextFilters(const text::Tokenizer& tokenizer, const GrammarLimits& limits = {})
      : tokenizer_(tokenizer), limits_(limits), compiler_(tokenizer, 0, limits) {}
  /// Errors: InputError for an empty stop string, or a grammar that cannot be.
  std::unique_ptr<AnswerFilter> create(const Request& request) override;
  int64_t kept_bytes() const override { return static_cast<int64_t>(compiler_.stats().bytes); }
  int64_t most_kept_bytes() const override { return static_cast<int64_t>(limits_.cache_bytes); }

 private:
  const text::Tokenizer& tokenizer_;
  const GrammarLimits limits_;
  GrammarCompiler compiler_;
};

}  // namespace hadal::engine_core
