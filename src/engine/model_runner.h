// Runs steps of many sequences through the model over the paged caches, and the MTP block for
// drafts.
//
// The MTP block at position p takes the main model's streams at p and the token at p + 1. run()
// only keeps the streams; draft() feeds it the positions since the last draft, those a window away
// at most. So it costs nothing where nobody drafts. What it says is only ever proposed: positions
// that it missed (after a resumption) make drafts worse and change no answer.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "engine/kv_cache.h"
#include "engine_core/runner.h"
#include "model/transformer.h"

namespace hadal::engine {

/// One sequence's part of a draft.
struct DraftStep {
  int64_t slot = 0;
  std::span<const int64_t> tokens;  ///< all so far; the state is behind the last but one
  std::span<const int64_t> pages;   ///< as for the step that will run the last
};

class ModelRunner final : public Runner {
 public:
  /// Both must outlive the runner. Drafts when the cache has room for the MTP block.
  ModelRunner(const model::Transformer& model, KvCache& cache);

  int64_t vocab_size() const override { return model_.config().vocab_size; }
  int64_t slack() const override { return cache_.options().slack; }
  /// Errors: Error for an id outside the vocabulary or a step that the cache refuses.
  void run(std::span<const SequenceStep> steps) override;
  std::span<const float> logits(int64_t sequence, int64_t token) const override;
  void visit_logits(int64_t sequence,
                    int64_t from,
                    int64_t count,
                    const VisitLogits& visit) const override;
  /// Rings are addressed by position, so nothing moves.
  void rewind(int64_t slot, int64_t pos) override;

  std::shared_ptr<const ContextView> context_view(int64_t slot) const override;
  void rest() override;

  bool drafts() const { return drafts_; }
  /// Whether the streams of the token before `pos` are there.
  bool can_draft(int64_t slot, int64_t pos) const;
  /// The MTP block's logits [steps, vocab] for the token behind each step's tokens. The slots' last
  /// step must have ended before the last of them. Error unless drafts().
  at::Tensor draft(std::span<const DraftStep> steps);

 private:
  const model::Transformer& model_;
  KvCache& cache_;
  ops::Numerics numerics_;
  at::Tensor logits_;                  // [asked-for tokens, vocab] FP32
  std::vector<int64_t> first_logits_;  // [sequences + 1]
  at::Tensor scored_;                  // [tokens, hc_mult, dim] streams of a step that is scored
  std::vector<int64_t> first_rows_;    // [sequences + 1] of the step's tokens

  at::Tensor on_device(const std::vector<int64_t>& numbers) const;
  /// Runs tokens again for the state at `pos`: each layer sees those that its windows and the
  /// layers above it need, about half of what run() would show them.
  void rerun(SequenceStep step, int64_t pos);
  /// Keeps the streams of the step just run.
  void keep_streams(std::span<const SequenceStep> steps, const at::Tensor& streams);
  /// Row of streams_ that holds position pos of a slot.
  int64_t stream_row(int64_t slot, int64_t pos) const;
  /// The selections of a slot's latest step with logits: tensors shared with the step's others.
  struct Seen {
    int64_t tokens = 0, row = 0;
    std::shared_ptr<const std::map<int64_t, at::Tensor>> selections;  ///< by layer [tokens, k] I32
  };
  std::vector<Seen> seen_;  // [slots]
  bool drafts_;
  int64_t kept_streams_;
  RowMemory streams_;  // [slots * kept, hc_mult * dim] the latest positions' streams
  struct Followed {
    int64_t next = 0;            ///< the MTP block has had every position before
    int64_t first = 0, end = 0;  ///< positions whose streams are kept
  };
  std::vector<Followed> followed_;  // [slots]
};

}  // namespace hadal::engine
