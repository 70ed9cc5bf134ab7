// What a run's backward passes compute again: the policies, what each needs, and the choice that
// fits a budget (docs/decisions/0025-recomputed-tensors.md).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "train/objective.h"
#include "train/pass_memory.h"

namespace hadal::train {

enum class RecomputePolicy {
  kUnset,  ///< nothing is computed again, predicted or measured
  kNone,   ///< nothing is computed again
  kNorms,  ///< what norms make: inputs of products, heads, latents, compressed rows
  kBlock,  ///< whole blocks (model/recompute.h)
  kAuto,   ///< what fits a budget in the least time
};
/// "none", "norms", "block" or "auto"; InputError for anything else, which begins with `where`.
RecomputePolicy parse_recompute_policy(const std::string& name, const std::string& where);
const char* recompute_policy_name(RecomputePolicy policy);

struct RecomputeSpec {
  RecomputePolicy policy = RecomputePolicy::kUnset;
  int64_t budget_bytes = 0;  ///< of `auto`: the most that a step's tensors may hold
};

/// What a step of rows [begin, end) holds beside a pass, in bytes.
struct StepMemory {
  int64_t before = 0;     ///< weights, moments and what else is there between steps
  int64_t rows = 0;       ///< the step's rows as tensors
  int64_t gradients = 0;  ///< one set
  int64_t sets = 0;       ///< the most that wait while a pass runs
  int64_t update = 0;     ///< what the optimizer adds to a set of gradients

  int64_t during_pass(int64_t pass) const { return before + rows + sets * gradients + pass; }
  int64_t during_update() const { return before + rows + gradients + update; }
  int64_t peak(int64_t pass) const;
};

/// The most sets of gradients that a step of rows [begin, end) holds while it runs a pass: its sums
/// are a binary tree (StepSums).
int64_t waiting_sets(int64_t begin, int64_t end);
/// Of Muon and AdamW for one step, from the shapes of what they move.
int64_t update_bytes(const model::Transformer& model);

/// How a run's passes are to recompute.
struct RecomputePlan {
  RecomputePolicy policy = RecomputePolicy::kUnset;
  bool blocks = false;
  std::shared_ptr<const ops::TapeOptions> tape;  ///< null: no tensors
  int64_t pass_bytes = 0;                        ///< predicted peak of the passes under way
  int64_t plain_pass_bytes = 0;  ///< of one that keeps everything; 0 where nobody asked
  double seconds_again = 0.0, seconds_plain = 0.0;  ///< of a pass: what runs again, and the rest
  int64_t chosen = 0, candidates = 0;               ///< functions that run again, of how many

  void apply(ObjectiveParams& params) const;
};

/// Where a run's passes are: on which layers, and how many rows are between their forward and their
/// backward pass while another one's runs, this one among them.
struct PassPlace {
  model::LayerRun layers;
  int64_t under_way = 1;
};

/// One pass over `row` with everything recomputed, bit by bit compared with the first time; its
/// gradients are dropped. A stage of a pipeline makes up what the others would send it. Then the
/// policy's choice. `memory` is that of the largest step, and the plan's bytes are those of all
/// rows under way, without the messages between stages. For the CPU; count_tensor_memory() must
/// have been called before the model was made. InputErrors begin with `where`: a budget that
/// nothing fits, with the least that does.
RecomputePlan plan_recompute(const model::Transformer& model,
                             const PassPlace& place,
                             const MicroBatch& row,
                             const ObjectiveParams& objective,
                             const RecomputeSpec& spec,
                             const StepMemory& memory,
                             const std::string& where);

/// "auto: 120 of 400 functions run again, ..."; what a step of so many rows is to hold.
std::string describe(const RecomputePlan& plan, const StepMemory& memory);

}  // namespace hadal::train
