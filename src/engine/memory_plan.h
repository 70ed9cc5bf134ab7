// How a budget of bytes becomes slots and pages.
//
// Slots are what running sequences need, pages hold rows and kept states. Slots get an eighth of
// the budget at most, so that a small cache runs fewer sequences at once rather than remember
// nothing; a page costs its bytes and its place in the books.
#pragma once

#include <cstdint>

#include "engine/kv_cache.h"
#include "model/config.h"
#include "model/transformer.h"

namespace hadal::engine {

/// Bytes that a slot takes: its rings and, with the MTP block, the streams that drafts begin with.
int64_t slot_bytes(const model::ModelConfig& config, const KvCache& cache);

/// Fills in num_slots, at most `max_running`, and num_pages. Errors: InputError when the budget
/// does not hold one slot and two pages.
void plan_cache(const model::ModelConfig& config,
                int64_t budget,
                int64_t max_running,
                KvCacheOptions& options);

/// Pages for a sequence of so many tokens and for states to go on from, of a conversation or two.
int64_t pages_for_context(const model::ModelConfig& config,
                          int64_t tokens,
                          const KvCacheOptions& options);

/// Bytes that the model's weights take in memory.
int64_t weights_bytes(const model::Transformer& model);

/// Brings dense weights that lie in mapped files into memory.
void touch_weights(const model::Transformer& model);

}  // namespace hadal::engine
