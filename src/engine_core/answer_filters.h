// From tokens to text: decoding and stop strings of real tokenizers, as the scheduler wants them.
#pragma once

#include <cstdint>
#include <memory>

#include "engine_core/sampler.h"
#include "text/tokenizer.h"

namespace hadal::engine {

class TextFilters final : public AnswerFilters {
 public:
  /// `tokenizer` must outlive it and its filters.
  explicit TextFilters(const text::Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  /// Errors: InputError for an empty stop string, or a grammar.
  std::unique_ptr<AnswerFilter> create(const Request& request) override;

 private:
  const text::Tokenizer& tokenizer_;
};

}  // namespace hadal::engine
