// The shipped model's tokenizer and a compiler of grammars for it: what tests of grammars share.
#pragma once

#include <chrono>

#include "engine_core/grammar/grammar.h"
#include "text/tokenizer.h"

namespace hadal::testing {

inline const text::Tokenizer& nano_tokenizer() {
  static const text::Tokenizer nano =
      text::Tokenizer::from_file(HADAL_SOURCE_DIR "/models/hadal-nano/tokenizer.json");
  return nano;
}

inline engine_core::GrammarCompiler& nano_compiler() {
  // Sanitizers on a busy machine take many times as long.
  static engine_core::GrammarCompiler nano(nano_tokenizer(), 0, {.time = std::chrono::minutes(2)});
  return nano;
}

}  // namespace hadal::testing
