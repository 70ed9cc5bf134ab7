// A named weight of the model and the arithmetic that its role asks for.
//
// The same Parameter serves an official checkpoint, training (FP32 master, a leaf of autograd) and
// tests (FP64). A matrix that only serves requests on the CPU holds its values packed and no dense
// ones: FP4 and FP8 stay four and eight bits a weight in memory. Names are the official ones; the
// stacked matrices of a layer's routed experts carry `*` for the expert number.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/gemm/linear.h"

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
enum class Storage { kFp8, kFp4, kBf16, kF32, kI64 };

struct Parameter {
  std::string name;  ///< official name, ".weight" included where the checkpoint has it
  ParamKind kind = ParamKind::kMatrix;
  ops::GemmRole role = ops::GemmRole::kBf16;  ///< of matrices; unused for the rest
  Storage storage = Storage::kBf16;
  std::vector<int64_t> shape;
  /// Logically independent matrices stacked along the first dimension: groups of wo_a, the two
  /// halves of a CSA compressor, experts. Muon orthogonalises each by itself (model.md 17.1).
  int64_t units = 1;
  at::Tensor value;  ///< dense values; undefined until initialised or loaded, or while packed
  /// FP32 values are a checkpoint's own and no master: no numerics rounds them.
  bool as_stored = false;

  /// Held instead of `value`, or made of it by panels(): [units, out, in] for wo_a, else as
  /// `shape`.
  mutable std::shared_ptr<const ops::Panels> packed;
  mutable at::Tensor packed_value;  ///< the value that `packed` was made of; undefined: none

  bool is_matrix() const {
    return kind == ParamKind::kMatrix || kind == ParamKind::kGroups || kind == ParamKind::kExperts;
  }
  /// Moved by gradients of a language or indexer loss.
  bool trainable() const { return kind != ParamKind::kGateBias && kind != ParamKind::kHashTable; }

  /// Replaces the dense values by packed ones.
  void hold_packed(ops::Panels panels);
  /// Makes packed values dense again and drops the packed ones: before training, or before moving
  /// to another device.
  void hold_dense();

  /// What the matrix products use: the values themselves in `ideal`; BF16 in `bf16`; in `released`
  /// the values that the official storage would hold, with a straight-through gradient, when the
  /// values are FP32 masters. Packed values are made dense for the call.
  at::Tensor operand(ops::Numerics numerics) const;

  /// The operand packed for the CPU kernel; of dense values it is made once. Null where x needs
  /// another kernel, for masters under training, which change every step, and for masters that are
  /// rounded on the way.
  const ops::Panels* panels(const at::Tensor& x, ops::Numerics numerics) const;
};

/// y = x w^T with the parameter's role; x already through ops::quantise_input.
at::Tensor apply_linear(const Parameter& w, const at::Tensor& x, ops::Numerics numerics);
/// Stacked experts: rows of x sorted by expert (ops::grouped_linear).
at::Tensor apply_experts(const Parameter& w,
                         const at::Tensor& x,
                         const at::Tensor& offsets,
                         ops::Numerics numerics);
/// wo_a: x [tokens, groups, in], group g times matrix g (ops::group_linear).
at::Tensor apply_groups(const Parameter& w, const at::Tensor& x, ops::Numerics numerics);

/// The values that official FP8 (128x128 blocks) or FP4 (1x32 blocks) storage would hold, in BF16.
///   w  [..., out, in]
at::Tensor official_rounding(const at::Tensor& w, Storage storage);

}  // namespace hadal::model
