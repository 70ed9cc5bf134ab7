// A named weight of the model and the arithmetic that its role asks for.
//
// The same Parameter serves an official checkpoint, training (FP32 master, a leaf of autograd) and
// tests (FP64). A matrix that only serves requests holds a Weight and no master: panels of the CPU,
// or FP8 and FP4 with scales as an accelerator reads them, four and eight bits a weight in memory.
// Names are the official ones; the stacked matrices of a layer's routed experts carry `*` for the
// expert number.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/shard.h"
#include "ops/gemm/product_input.h"
#include "ops/gemm/weight.h"
#include "ops/quant/official_storage.h"

namespace hadal::ops {
struct Permutation;
}  // namespace hadal::ops

namespace hadal::model {

enum class ParamKind {
  kMatrix,     ///< [out, in]
  kGroups,     ///< wo_a: [groups * out, in], applied per group
  kExperts,    ///< [experts, out, in]
  kEmbedding,  ///< [vocab, dim]
  kHead,       ///< [vocab, dim]
  kNorm,       ///< RMSNorm weight
  kHcFn,       ///< mHC mixing matrix, FP32
  kHcBase,     ///< mHC static biases, FP32
  kHcScale,    ///< mHC gating factors, FP32
  kSink,       ///< [heads] FP32
  kApe,        ///< [ratio, width] FP32
  kGateBias,   ///< [experts] FP32; moved by the load balancer, not by gradients
  kHashTable,  ///< [vocab, topk] I64
};

/// How the official checkpoint stores a parameter.
using Storage = ops::OfficialStorage;

struct Parameter {
  std::string name;  ///< official name, ".weight" included where the checkpoint has it
  ParamKind kind = ParamKind::kMatrix;
  ops::GemmRole role = ops::GemmRole::kBf16;  ///< of matrices; unused for the rest
  Storage storage = Storage::kBf16;
  std::vector<int64_t> shape;  ///< of the whole parameter
  /// Logically independent matrices stacked along the first dimension: groups of wo_a, the two
  /// halves of a CSA compressor, experts. Muon orthogonalises each by itself (model.md 17.1).
  int64_t units = 1;
  Shard shard;  ///< what of it this process holds
  /// Another stage of a pipeline has it: there are no values here, and nothing makes any.
  bool elsewhere = false;

  /// The master: dense values of the shard, which training moves and which all but matrices compute
  /// with. Undefined until initialised or loaded, and while `weight` holds the values instead.
  at::Tensor value;
  /// FP32 values are a checkpoint's own and no master: no numerics rounds them.
  bool as_stored = false;
  /// Of matrices and the head that only serve requests: panels or sm90, [units, out, in] for wo_a.
  ops::Weight weight;
  /// Panels of a master that is constant.
  std::shared_ptr<ops::PanelCache> kept_panels = std::make_shared<ops::PanelCache>();

  bool is_matrix() const {
    return kind == ParamKind::kMatrix || kind == ParamKind::kGroups || kind == ParamKind::kExperts;
  }
  /// Moved by gradients of a language or indexer loss.
  bool trainable() const { return kind != ParamKind::kGateBias && kind != ParamKind::kHashTable; }

  /// Storage and role in these numerics: its own, but `fp8` has E4M3 where the release has FP4.
  Storage storage_in(ops::Numerics numerics) const;
  ops::GemmRole role_in(ops::Numerics numerics) const;

  /// Shape and units of the shard. Error where it cuts through a unit of several rows.
  std::vector<int64_t> local_shape() const { return shard.of(shape); }
  int64_t local_units() const;
  /// Matrices that one product multiplies: experts, groups of wo_a, else 1.
  int64_t local_matrices() const;

  /// Gives it values of the shard's shape: dense, or a weight, whichever the other then is dropped.
  void hold(at::Tensor values);
  void hold(ops::Weight packed);
  /// Makes a weight's values the master and drops the weight: before training.
  void hold_dense();
  /// Bytes in memory, kept panels included.
  int64_t num_bytes() const;

  /// The dense operand: the values themselves in `ideal`; BF16 in `bf16`; in `released` and `fp8`
  /// the values that storage_in() would hold, with a straight-through gradient, when the values are
  /// FP32 masters. A weight's values are made dense for the call.
  at::Tensor operand(ops::Numerics numerics) const;
  /// What a pass reads of a parameter that no product multiplies by (norms, sinks, mHC factors,
  /// `ape`): the values themselves; in `released` and `fp8`, whose models are served from official
  /// files, those that such files hold in BF16 (norms) rounded to it, in the values' own type and
  /// with a straight-through gradient, when they are masters.
  at::Tensor values_in(ops::Numerics numerics) const;
  /// The operand's values as a product reads them: the weight that it holds, or its operand, for
  /// whose panels the CPU's kernel keeps a place where the operand is the constant master itself.
  ops::Weight product_operand(ops::Numerics numerics) const;
};

/// y = x w^T with the parameter's role; a tensor x already through ops::quantise_input.
at::Tensor apply_linear(const Parameter& w, const at::Tensor& x, ops::Numerics numerics);
at::Tensor apply_linear(const Parameter& w, const ops::ProductInput& x);
/// Of several parameters with the same rows.
std::vector<at::Tensor> apply_linears(const std::vector<const Parameter*>& weights,
                                      const ops::ProductInput& x);
/// Makes the forms of x that these products take, if nobody did: for products on an
/// ops::SideBranch.
void make_operands(const std::vector<const Parameter*>& weights, const ops::ProductInput& x);
/// Stacked experts: rows of x in the order of ops::permute_rows (ops::grouped_linear).
at::Tensor apply_experts(const Parameter& w,
                         const at::Tensor& x,
                         const ops::Permutation& order,
                         ops::Numerics numerics);
/// wo_a: results of attention x [tokens, heads, head_dim], rotated back; group g's heads times
/// matrix g (ops::group_linear): [tokens, groups, out].
at::Tensor apply_groups(const Parameter& w,
                        const at::Tensor& x,
                        const at::Tensor& cos_sin,
                        ops::Numerics numerics);

}  // namespace hadal::model
