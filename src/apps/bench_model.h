// hadal bench model: steps of a released model's layers with random weights on a GPU, through the
// engine's runner.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hadal::apps {

struct ModelBenchOptions {
  std::string preset = "v4-flash";  ///< or v4-pro
  int64_t layers = 0;               ///< of the model, from the first on; 0: as many as fit
  std::vector<int64_t> batches = {1, 8, 64};
  std::vector<int64_t> contexts = {8192};
  std::vector<int64_t> chunks = {4096};  ///< tokens of a prefill step behind each context
  std::vector<int64_t> drafts = {};      ///< tokens more in each sequence of a decode step
  int64_t steps = 30;                    ///< that are timed, of decoding; a fifth of prefill
  bool whole_prefill = false;  ///< contexts are computed, not copied from their first 8,192 tokens
  /// > 0: in place of the above, a sequence computes each context whole and goes on by so many
  /// tokens, every one of them the one drawn before.
  int64_t answer = 0;
  std::string text;  ///< with `answer`: a file whose tokens, by the shipped model's tokenizer,
                     ///< come first; random ones behind them
};

struct ModelBenchLine {
  std::string what;
  int64_t tokens = 0;       ///< of a step
  double milliseconds = 0;  ///< of a step, sampling included: median
  double layer_us = 0;      ///< that by the layers
  double host_us = 0;       ///< of it, what the host does while the device has nothing to do
};

/// A sequence from its first token to its last.
struct LongRun {
  int64_t context = 0, answer = 0;
  double prefill_seconds = 0;
  double first_chunk_ms = 0, last_chunk_ms = 0;  ///< of the context: whole ones
  double decode_ms = 0;                          ///< of a token: median
  double early_ms = 0, late_ms = 0;              ///< of the first and last tenth of the answer
  double cache_bytes = 0;                        ///< what the device holds for it
  double formula_bytes = 0;                      ///< model::decode_cost at its end
};

struct ModelBench {
  int64_t layers = 0;
  double weights_gib = 0, kv_gib = 0;  ///< cache of the largest case
  std::vector<ModelBenchLine> lines;
  std::vector<LongRun> long_runs;
};

/// Errors: InputError for an unknown preset, layers that do not fit, or no GPU.
ModelBench bench_model(const ModelBenchOptions& options);

}  // namespace hadal::apps
