// A model with its tokenizer, as every command loads it; one sequence that grows, and the loop that
// continues it, over the reference cache: for generate and the evaluations.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "apps/effort_choice.h"
#include "checkpoint/load_model.h"
#include "engine_core/answer/generation_defaults.h"
#include "model/contiguous_kv.h"
#include "ops/sampling/sample.h"
#include "text/tokenizer.h"

namespace hadal::apps {

/// A checkpoint folder ready to run.
struct LoadedModel {
  std::string folder;
  ops::Numerics numerics;
  model::Transformer model;
  text::Tokenizer tokenizer;
  engine::GenerationDefaults defaults;  ///< the folder's
  EffortChoice effort;  ///< the levels of reasoning effort that the model was taught

  const model::ModelConfig& config() const { return model.config(); }
};

/// `folder_flag`: --model, or empty for the default one (model_folder.h). `numerics_flag`:
/// --numerics, or empty for what the checkpoint's scales say. InputError when the tokenizer knows
/// ids that the model does not.
LoadedModel load_with_tokenizer(const std::string& folder_flag, const std::string& numerics_flag);

/// The engine's parameters as the sampler's.
ops::SamplingParams sampling_params(const engine::Sampling& sampling);

using StopFunction = std::function<bool()>;

/// The tokens of one sequence, their cached state, and the logits after the last of them.
class Sequence {
 public:
  /// `loaded` must outlive the sequence.
  explicit Sequence(const LoadedModel& loaded);

  /// Adds tokens, in chunks. `stop` is asked between chunks; false when it ended the work early,
  /// after which length() counts what was done.
  bool append(const std::vector<int64_t>& ids, const StopFunction& stop = {});
  /// Makes `ids` the whole sequence and computes what is not there yet: the part after the longest
  /// common prefix, or everything when that lies further back than the cache can go.
  void set_tokens(const std::vector<int64_t>& ids);
  /// Forgets everything.
  void reset();

  const std::vector<int64_t>& tokens() const { return tokens_; }
  int64_t length() const { return kv_.length(0); }
  /// [vocab] FP32, of the last token.
  const at::Tensor& logits() const { return logits_; }

 private:
  const LoadedModel& loaded_;
  model::ContiguousKv kv_;
  std::vector<int64_t> tokens_;
  at::Tensor logits_;
};

enum class Finish { kStop, kLength, kInterrupted };
/// "stop", "length", "interrupted".
const char* finish_name(Finish finish);

/// Samples token after token, at most max_tokens, until EOS, the model's last position, or `stop`.
/// `on_token` gets every token, EOS included; false ends the loop as EOS does. Tokens are keyed by
/// seed and position: the same sequence and seed give the same tokens.
Finish decode(const LoadedModel& loaded,
              Sequence& sequence,
              const ops::SamplingParams& sampling,
              int64_t max_tokens,
              const std::function<bool(int64_t token)>& on_token,
              const StopFunction& stop);

}  // namespace hadal::apps
