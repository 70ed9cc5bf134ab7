// The engine as everybody above it sees it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "engine_core/request.h"

namespace hadal::engine_core {

enum class Submitted : uint8_t { kAccepted, kQueueFull, kStopping };

struct EngineStats {
  int64_t running = 0, waiting = 0;
  int64_t pages_total = 0, pages_free = 0, pages_cached = 0;  ///< cached: held by the tree alone
  int64_t state_slots_total = 0, state_slots_free = 0;
  int64_t states = 0, snapshot_pages = 0, snapshot_bytes = 0;  ///< kept: in pages of the pool
  int64_t states_evicted = 0;
  int64_t pinned_keys = 0, pinned_pages = 0;  ///< keys and what they hold (prefix_pins.h)
  int64_t prompt_tokens = 0, cached_tokens = 0, disk_tokens = 0, generated_tokens = 0;  ///< ever
  int64_t preemptions = 0, steps = 0, finished = 0, cancelled = 0, failed = 0;
  int64_t drafted = 0, accepted = 0;
  int64_t weights_bytes = 0;    ///< EngineInfo's
  int64_t cache_bytes = 0;      ///< pages, slots, the books of both and the tokens of answers
  int64_t workspace_bytes = 0;  ///< of the process at rest beside them; 0: nobody measured it
  int64_t grammar_bytes = 0, grammar_bytes_most = 0;  ///< of compiled grammars that are remembered
  int64_t context_tokens = 0;  ///< that all pages together hold, without states
  int64_t disk_bytes = 0, disk_hits = 0, disk_misses = 0, disk_errors = 0;
  double model_seconds = 0, sampling_seconds = 0;
  double overhead_seconds = 0;  ///< of steps, outside model and sampler
  /// The same in processor time of the engine's thread: without what other threads took from it.
  double overhead_cpu_seconds = 0;
};

/// What a server must know to check requests before it submits them.
struct EngineInfo {
  std::string model_name;
  int64_t vocab_size = 0;   ///< ids of the tokenizer
  int64_t max_context = 0;  ///< prompt and answer together
  int64_t max_choices = 0;  ///< n
  int64_t eos_token = 0;
  int64_t weights_bytes = 0;  ///< in memory
  std::string weights = {};   ///< a digest of those it began with; empty: nobody made one
};

/// Other weights of the same model.
struct WeightsUpdate {
  WeightsVersion version;
  /// Puts them in the place of those before, which stay if it throws. Called on the engine's thread
  /// while nothing of a request is in memory.
  std::function<void()> swap;
};

/// Thread-safe.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual const EngineInfo& info() const = 0;
  /// Queues a valid request (InputError names what is not). On kAccepted `*id` is its number.
  virtual Submitted submit(Request request, std::shared_ptr<Sink> sink, uint64_t* id) = 0;
  /// All choices end with kCancelled within one step; unknown and finished ids are ignored.
  virtual void cancel(uint64_t id) = 0;
  virtual EngineStats stats() const = 0;
  /// Other weights: requests that have begun are answered by the old ones to their end, all that
  /// wait or come later by the new ones, and no prefix that the old ones computed is used again
  /// (docs/decisions/0013-runner.md). Blocks until they are in place; not from within an update.
  /// Errors: InputError for a version that is not above the one in use; what swap() throws; Error
  /// when the engine stops before, or has weights that nobody can change.
  virtual void update_weights(const WeightsUpdate& /*update*/) {
    throw Error("engine: its weights cannot be changed");
  }
  /// A prompt that was made of text, with the answers in it cut into tokens as they were written
  /// (answer_cuts.h).
  virtual std::vector<int64_t> as_written(std::vector<int64_t> prompt) const { return prompt; }
};

}  // namespace hadal::engine_core
