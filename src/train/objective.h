// The training loss over packed rows: next token, MTP, router balance and the indexer's own loss
// (model.md 17.5 to 17.7, 17.9), and what a step measures on the way.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/row_part.h"
#include "model/stage_split.h"
#include "model/transformer.h"
#include "ops/cache/batch.h"
#include "ops/tape.h"
#include "train/step_sums.h"
#include "train/token_loss.h"

namespace hadal::train {

/// Packed rows of equal length: tokens of several samples, none of which sees another.
struct PackedRows {
  int64_t rows = 0;
  int64_t row_length = 0;
  std::vector<int32_t> tokens;  ///< [rows * row_length]
  std::vector<uint8_t> scored;  ///< [rows * row_length] 1: this token counts as a target
  std::vector<int64_t>
      sample_lengths;  ///< in order; no sample crosses a row; they sum to rows * row_length
};

/// Rows ready for the model, with targets; everything on one device.
struct MicroBatch {
  MicroBatch(const PackedRows& rows, at::Device device);

  ops::Batch batch;
  int64_t rows = 0;
  at::Tensor ids;  ///< [tokens]
  at::Tensor
      targets;  ///< [tokens] the next token, -1 where the sample ends or the token is not scored
  at::Tensor next_ids;     ///< [tokens] input of the MTP block; 0 at the end of a sample
  at::Tensor mtp_targets;  ///< [tokens] the token after the next, -1 likewise
  int64_t num_targets = 0, num_mtp_targets = 0;
  /// On the CPU, of several rows: each of them alone, as a pass takes it.
  std::vector<MicroBatch> each_row;

  /// Of one row, what a member of a group that shares it computes; counts stay those of the row.
  MicroBatch part(const model::RowPart& part) const;

 private:
  struct Labels;
  MicroBatch(const PackedRows& rows, Labels labels, at::Device device);
};

struct ObjectiveParams {
  double mtp_weight = 0.3;
  double balance_weight = 1e-4;
  double index_weight = 0.01;
  model::AttentionMode mode = model::AttentionMode::kDense;
  ops::Numerics numerics = ops::Numerics::kBf16;
  bool count_clamps = false;  ///< fill StepMeasures::clamped
  /// Blocks are computed again by the backward pass: the same bits in less memory.
  bool recompute = false;
  /// Which tensors are, and who is told; null: none (ops/tape.h).
  std::shared_ptr<const ops::TapeOptions> tape = nullptr;
  /// Indexer warm-up trains nothing but the indexer: the language losses are measured, not
  /// differentiated.
  bool language_loss() const { return mode != model::AttentionMode::kIndexerWarmup; }
  bool index_loss() const { return mode != model::AttentionMode::kDense; }
};

/// Whether a step under these rules trains the parameter, be it without a gradient in all its rows.
bool is_trained(const model::Parameter& parameter, const ObjectiveParams& params);

/// Totals over the micro-batches of one step; the losses are divided by them.
struct StepCounts {
  int64_t targets = 0, mtp_targets = 0, rows = 0;
  std::vector<int64_t> index_queries;  ///< per block; 0 for blocks without an indexer
  void add(const MicroBatch& micro, const model::ModelConfig& config);
};

/// What a stage of a pipeline hands to the next one with a row; undefined in front of the first.
struct StageBorder {
  at::Tensor streams;         ///< [tokens, hc_mult, dim]
  at::Tensor balance, index;  ///< [] sums over the blocks so far; undefined where none has one
};

/// A pass over the layers of one stage, from its forward to its backward pass.
struct StagePass {
  StageBorder in;   ///< streams: a leaf that requires a gradient
  StageBorder out;  ///< of the last stage undefined
  /// [tokens, dim] rows of the embedding that the MTP block reads, where that is on another stage:
  /// the first stage's results, a leaf of the last one. Undefined elsewhere.
  at::Tensor mtp_rows;
  at::Tensor total;  ///< the terms of the loss that arise here; undefined where none does
  /// What this stage knows: losses the last one, of all stages.
  StepMeasures measures;
};

/// Whether the last stage reads rows of the embedding that the first one has to send.
bool sends_mtp_rows(const model::ModelConfig& config, const ObjectiveParams& params);

/// `in` and `mtp_rows`: what arrived, without a graph. On the whole model's layers neither is read
/// and this is the forward pass of one process. `part`: of a row that several ranks share, of which
/// `micro` is this one's part; measures are then the whole row's on every member. It stays where it
/// is until the backward pass is over.
StagePass stage_forward(const model::Transformer& model,
                        const model::LayerRun& layers,
                        const MicroBatch& micro,
                        const StepCounts& counts,
                        const ObjectiveParams& params,
                        StageBorder in = {},
                        const at::Tensor& mtp_rows = {},
                        PartPass* part = nullptr);
/// Gradients go to the parameters and to the pass's leaves. `grad_streams` and `grad_mtp_rows` are
/// those of out.streams and of the first stage's mtp_rows; undefined: none.
void stage_backward(StagePass& pass,
                    const at::Tensor& grad_streams = {},
                    const at::Tensor& grad_mtp_rows = {});

/// Forward and backward of one micro-batch: on the CPU a pass for each of its rows, elsewhere one
/// for all. On the CPU a step has the same bits however its rows are cut into micro-batches.
void accumulate(const model::Transformer& model,
                const MicroBatch& micro,
                const StepCounts& counts,
                const ObjectiveParams& params,
                StepSums& sums);
/// The same of a step that is one micro-batch: gradients are in the parameters afterwards.
void accumulate(const model::Transformer& model,
                const MicroBatch& micro,
                const StepCounts& counts,
                const ObjectiveParams& params,
                StepMeasures& measures);

/// What a model makes of rows it is not trained on, summed over micro-batches.
struct Evaluation {
  double loss_sum = 0.0;  ///< nats over all targets
  int64_t targets = 0;
  double mass_sum = 0.0;       ///< share of the block mass that the indexer selects (model.md 17.5)
  double best_mass_sum = 0.0;  ///< the same for the best choice of as many blocks
  int64_t mass_queries = 0;

  double loss() const { return loss_sum / static_cast<double>(targets); }
  double selected_mass() const { return mass_sum / static_cast<double>(mass_queries); }
  double best_mass() const { return best_mass_sum / static_cast<double>(mass_queries); }
};

/// Adds a micro-batch, without gradients. The mass is measured where the mode selects.
void evaluate(const model::Transformer& model,
              const MicroBatch& micro,
              model::AttentionMode mode,
              ops::Numerics numerics,
              Evaluation& result);

/// What a stage hands to the next one where nothing is differentiated.
struct EvaluationBorder {
  at::Tensor streams;     ///< [tokens, hc_mult, dim]
  at::Tensor mass, best;  ///< [] sums over the blocks so far; undefined where none has one
  int64_t mass_queries = 0;
};
/// The layers of one stage, of a micro-batch that is one pass. `border`: what the stage before
/// handed over, then what goes to the next one. The last stage adds to `result`.
void evaluate_stage(const model::Transformer& model,
                    const model::LayerRun& layers,
                    const MicroBatch& micro,
                    model::AttentionMode mode,
                    ops::Numerics numerics,
                    EvaluationBorder& border,
                    Evaluation& result);

/// Router biases after a step: bias += speed * sign(mean load - load) (model.md 17.6).
void update_router_bias(model::Transformer& model, const StepMeasures& measures, double speed);

}  // namespace hadal::train
