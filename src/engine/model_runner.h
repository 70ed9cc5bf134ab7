// Runs steps of many sequences through the model over the paged caches, and the MTP block or the
// DSpark drafter for drafts.
//
// On the CPU a step is computed in collect(), so that what its caller does meanwhile is done first.
// On a GPU launch() sends it there: steps of few tokens as recorded graphs, and tokens are drawn
// there where the sampler can (DeviceSampler).
//
// The MTP block at position p takes the main model's streams at p and the token at p + 1. A step
// only keeps the streams; draft() feeds it the positions since the last draft, those a window away
// at most. So it costs nothing where nobody drafts. What it says is only ever proposed: positions
// that it missed (after a resumption) make drafts worse and change no answer.
//
// The DSpark drafter's context rows are made in every step, of all its tokens, in rings like any
// window: kept, stored and rebuilt with the rest. Those of rejected drafts lie behind the position
// that the sequence goes back to, where nothing reads them before they are made anew.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "engine/kv_cache.h"
#include "engine/recorded_steps.h"
#include "engine/sampler.h"
#include "engine_core/runner.h"
#include "model/transformer.h"

namespace hadal::engine {

/// One sequence's part of a draft.
struct DraftStep {
  int64_t slot = 0;
  std::span<const int64_t> tokens;  ///< all so far; the state is behind the last but one
  std::span<const int64_t> pages;   ///< as for the step that will run the last
};

class ModelRunner final : public engine_core::Runner {
 public:
  /// All must outlive the runner. Drafts when the cache has room for the MTP block. Rows of logits
  /// on a GPU stay there for a sampler that is a DeviceSampler, too.
  ModelRunner(const model::Transformer& model, KvCache& cache, engine_core::Sampler& sampler);

  int64_t vocab_size() const override { return model_->config().vocab_size; }
  int64_t slack() const override { return cache_.options().slack; }
  /// Errors: Error for an id outside the vocabulary or a draw outside its sequence's rows.
  Ticket launch(std::span<const engine_core::SequenceStep> steps) override;
  /// Errors: Error for a step that the cache refuses.
  engine_core::StepResult collect(Ticket ticket) override;
  std::span<const float> logits(int64_t sequence, int64_t token) const override;
  /// Rings are addressed by position, so nothing moves.
  void rewind(int64_t slot, int64_t pos) override;

  std::shared_ptr<const engine_core::ContextView> context_view(int64_t slot) const override;
  void rest() override;

  bool can_rebuild() const override { return true; }
  int64_t rebuild_start(int64_t pos) const override;
  /// Each layer sees the tokens that its windows and the layers above it need, about half of what a
  /// step would show them.
  void rebuild(int64_t slot,
               std::span<const int64_t> tokens,
               std::span<const int64_t> pages,
               int64_t start,
               int64_t count) override;

  /// Another model of the same configuration, which must outlive the runner: for sequences that
  /// begin from now on. Errors: Error while a step runs, and for another configuration.
  void set_model(const model::Transformer& model);

  bool drafts() const { return drafts_; }
  /// Whether what drafts are made of is there for the token behind `pos`.
  bool can_draft(int64_t slot, int64_t pos) const;
  /// The MTP block's logits [steps, vocab] for the token behind each step's tokens. The slots' last
  /// step must have ended before the last of them. Error unless drafts().
  at::Tensor draft(std::span<const DraftStep> steps);
  /// Tokens of a block of the DSpark drafter; 0 where the runner does not draft with one.
  int64_t block_size() const { return drafts_ ? model_->config().drafter.block_size : 0; }
  /// A block behind each step's last token. Error unless block_size() > 0.
  model::DraftedBlocks draft_blocks(std::span<const DraftStep> steps);
  /// Transformer::draft_scores() of rows of them, on the host.
  model::DraftScores draft_scores(const model::DraftedBlocks& blocks,
                                  const std::vector<int64_t>& rows,
                                  const std::vector<int64_t>& previous) const;

 private:
  const model::Transformer* model_;
  KvCache& cache_;
  engine_core::Sampler& sampler_;
  DeviceSampler* device_sampler_;  // the same; null: draws on the host
  ops::Numerics numerics_;
  std::unique_ptr<RecordedSteps> recorded_;  // null: no step is recorded
  Ticket ticket_ = 0;
  std::vector<engine_core::SequenceStep> in_flight_;
  std::vector<engine_core::SequenceStep> latest_;      // of the step whose logits are there
  StepOutput output_;                                  // of the step in flight or the latest
  at::Tensor logits_;                                  // output_.logits on the host; or undefined
  std::vector<int64_t> first_logits_;                  // [sequences + 1]
  engine_core::StepResult result_;                     // of the step in flight
  std::unique_ptr<DeviceSampler::Launched> launched_;  // draws that the device makes behind it
  std::vector<DeviceDraw> masked_draws_;               // there, too, once their masks are set
  std::vector<DeviceDraw> host_draws_;

  at::Tensor on_device(const std::vector<int64_t>& numbers) const;
  bool on_host() const { return cache_.options().device.is_cpu(); }
  /// Sends the step to the device, or computes it: output_.
  void run_step(std::span<const engine_core::SequenceStep> steps);
  /// Whether its kind is one to be recorded: few tokens, and logits of all of them.
  bool recordable(std::span<const engine_core::SequenceStep> steps) const;
  /// `asked`: rows whose logits are wanted; null: all.
  StepOutput forward(const ops::Batch& batch, const std::vector<int64_t>* asked) const;
  /// Notes what blocks the sequences' last rows saw.
  void note_seen(std::span<const engine_core::SequenceStep> steps);
  /// Brings logits to the host.
  void fetch_logits();
  std::span<const float> row(size_t sequence, int64_t token) const;
  /// Sorts the step's draws by where they are made, and begins those that the device can make now.
  void begin_draws(std::span<const engine_core::SequenceStep> steps);
  /// The rest of them, and all answers.
  void finish_draws();
  /// Piece by piece, so that no more than a piece's rows of logits exist at once.
  void score(const engine_core::ScoredTokens& scored,
             const at::Tensor& streams,
             engine_core::SequenceResult& result) const;
  /// Keeps the streams of the step just run.
  void keep_streams(std::span<const engine_core::SequenceStep> steps,
                    const ops::Batch& batch,
                    const at::Tensor& streams);
  bool drafts_by_mtp() const { return drafts_ && block_size() == 0; }
  /// Row of streams_ that holds position pos of a slot.
  int64_t stream_row(int64_t slot, int64_t pos) const;
  /// The selections of a slot's latest step with logits: tensors shared with the step's others. Of
  /// a recorded step they last until the next one of its kind.
  struct Seen {
    int64_t tokens = 0, row = 0;
    std::shared_ptr<const std::map<int64_t, at::Tensor>> selections;  ///< by layer [rows, k] I32
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
