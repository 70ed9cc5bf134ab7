// A model that says what a test wants: the token after each is fixed.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "model/transformer.h"

namespace hadal::testing {

/// A random model whose blocks add nothing and whose head gives token `successor[t]` nearly all of
/// the probability after token t (some arbitrary token after tokens without a successor).
/// Successors are distinct.
model::Transformer parrot_model(const model::ModelConfig& config,
                                const std::map<int64_t, int64_t>& successor);

/// The successors that make a model say these ids one after another, beginning behind `first`.
std::map<int64_t, int64_t> chain(int64_t first, const std::vector<int64_t>& ids);

}  // namespace hadal::testing
