// Which rank holds the master and the moments of which piece of a parameter, and moves it
// (docs/parallelism.md).
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "dist/mesh.h"
#include "model/stage_split.h"
#include "model/transformer.h"
#include "train/step_share.h"
#include "train/zero_plan.h"

namespace hadal::train {

/// Which rule moves a parameter.
enum class UpdateRule { kMuon, kAdamDecay, kAdam, kNone };
UpdateRule update_rule(model::ParamKind kind);
UpdateRule update_rule(const model::Parameter& parameter);

/// A parameter as the plan sees it; `shape` and `units` as in model::Parameter. Experts are told
/// apart by the official names of their matrices: w2 is down, w3 up, w1 gate. Error: HADAL_CHECK
/// for a kind without a rule.
PlanItem plan_item(const std::string& name,
                   model::ParamKind kind,
                   const std::vector<int64_t>& shape,
                   int64_t units);

/// Whether forward passes in these numerics read such a parameter through Parameter::operand, which
/// rounds its FP32 values.
bool is_rounded(model::ParamKind kind, model::Storage storage, ops::Numerics numerics);

/// Bytes of FP32 master and moments of an element.
int64_t state_bytes(UpdateRule rule);

/// Bytes of masters and moments a rank holds.
struct StateLoad {
  int64_t most = 0, total = 0;
};

class Ownership {
 public:
  /// One rank owns all.
  Ownership() = default;
  /// The pieces of plan_zero for the model's parameters that take a gradient, in the model's order:
  /// a piece's item counts these. Where the plan has several groups the first one's ranks hold the
  /// dense matrices. `cap` 0: dense_cap. A function of the model's shapes and the numbers.
  Ownership(const model::Transformer& model, int64_t ranks, int64_t rank, int64_t cap = 0);
  /// The same on a mesh: the parameters of a stage are shared out among the ranks of that stage.
  Ownership(const model::Transformer& model,
            const dist::Mesh& mesh,
            int64_t rank,
            const model::StageSplit& split,
            int64_t cap = 0);

  const std::vector<PlanPiece>& pieces() const { return pieces_; }
  bool here(const PlanPiece& piece) const { return piece.owner == rank_; }
  int64_t ranks() const { return mesh_.ranks(); }
  const dist::Mesh& mesh() const { return mesh_; }
  /// Which of the ranks that pass a data rank's rows has the gradients of a piece in them.
  int64_t holder(const PlanPiece& piece, int64_t data) const {
    return mesh_.rank({.pipeline = stages_[piece.item], .data = data, .context = collector(piece)});
  }
  /// The member of every group that shares rows who has the whole row's gradient of a piece: where
  /// the owner stands in his.
  int64_t collector(const PlanPiece& piece) const { return mesh_.place(piece.owner).context; }
  /// Whether this rank has the gradients of a piece of its rows.
  bool collects(const PlanPiece& piece) const {
    return reads(piece) && mesh_.place(rank_).context == collector(piece);
  }
  /// The stage that has a parameter which takes a gradient.
  int64_t stage_of(size_t item) const { return stages_.at(item); }
  /// The ranks whose passes read a piece: [begin, end).
  Span readers(const PlanPiece& piece) const;
  bool reads(const PlanPiece& piece) const;
  const StateLoad& load() const { return load_; }
  /// The pieces among `indices` (ascending) by what travels in one message: large ones alone, small
  /// ones of one owner and one element size together. The same on every rank.
  struct Message {
    size_t piece;
    int64_t elements, element_bytes;
  };
  std::vector<std::vector<size_t>> bundles(const std::vector<Message>& messages) const;

 private:
  std::vector<PlanPiece> pieces_;
  std::vector<int64_t> stages_;  ///< by item
  dist::Mesh mesh_;
  int64_t rank_ = 0;
  StateLoad load_;
};

/// A piece of a tensor that has all of a parameter's elements: flat, of the tensor's memory.
at::Tensor piece_of(const at::Tensor& whole, const PlanPiece& piece);

/// Flat tensors of a bundle as one, and one of their total size as views of them; alone, itself.
at::Tensor bundled(const std::vector<at::Tensor>& tensors);
std::vector<at::Tensor> unbundled(const at::Tensor& bundle, const std::vector<int64_t>& sizes);

}  // namespace hadal::train
