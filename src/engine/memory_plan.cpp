#include "engine/memory_plan.h"

#include <algorithm>

#include "base/check.h"
#include "base/math.h"
#include "engine_core/prefix/sequence_cache.h"

namespace hadal::engine {
namespace {

constexpr int64_t kSlotsShare = 8;     ///< slots take one in so many bytes at most
constexpr int64_t kContextStates = 8;  ///< kept where pages are counted by a context

/// One page and one slot, for their sizes.
KvCache smallest(const model::ModelConfig& config, KvCacheOptions options) {
  options.num_pages = options.num_slots = 1;
  options.device = at::kCPU;
  return KvCache(config, options);
}

}  // namespace

int64_t slot_bytes(const model::ModelConfig& config, const KvCache& cache) {
  int64_t bytes = cache.state_bytes();
  if (cache.options().with_mtp && config.n_mtp_layers > 0) {
    const int64_t element = cache.options().numerics == ops::Numerics::kIdeal ? 4 : 2;
    bytes += (config.window_size + cache.options().slack) * config.hc_mult * config.dim * element;
  }
  return bytes;
}

void plan_cache(const model::ModelConfig& config,
                int64_t budget,
                int64_t max_running,
                KvCacheOptions& options) {
  const KvCache one = smallest(config, options);
  const int64_t slot = slot_bytes(config, one);
  const int64_t page = one.page_bytes() + engine_core::SequenceCache::book_bytes(one.page_tokens());
  options.num_slots = std::clamp<int64_t>(budget / kSlotsShare / slot, 1, max_running);
  options.num_pages = (budget - options.num_slots * slot) / page;
  HADAL_INPUT_CHECK(options.num_pages >= 2, "engine: a cache of ", budget,
                    " bytes does not hold one slot of ", slot, " bytes and two pages of ", page,
                    "; expected at least ", slot + 2 * page);
}

int64_t pages_for_context(const model::ModelConfig& config,
                          int64_t tokens,
                          const KvCacheOptions& options) {
  const KvCache one = smallest(config, options);
  // One page more than the tokens have: a shared last page is copied before it is written.
  const int64_t state = ceil_div(one.state_bytes(), std::max<int64_t>(one.page_bytes(), 1));
  return ceil_div(tokens, one.page_tokens()) + 1 + kContextStates * state;
}

int64_t weights_bytes(const model::Transformer& model) {
  int64_t bytes = 0;
  model.visit([&](const model::Parameter& parameter) { bytes += parameter.num_bytes(); });
  return bytes;
}

void touch_weights(const model::Transformer& model) {
  constexpr size_t kPage = 4096;
  model.visit([&](const model::Parameter& parameter) {
    if (!parameter.value.defined() || !parameter.value.is_cpu()) return;
    const auto* bytes = static_cast<const volatile char*>(parameter.value.const_data_ptr());
    for (size_t at = 0; at < parameter.value.nbytes(); at += kPage) (void)bytes[at];
  });
}

}  // namespace hadal::engine
