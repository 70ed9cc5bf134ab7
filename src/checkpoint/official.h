// A checkpoint folder in the official layout, checked against its config before any tensor is used.
//
// Storage is decided by the tensors, not by the config (model.md 4.6): FP4 or FP8 experts,
// power-of-two or F32 scales, or BF16/F32 matrices without scales. Accepted besides the official
// spelling: scales called
// `.weight_scale_inv`, U8 for I8 and for E8M0, scales beside BF16 matrices (kept by a conversion,
// unused), and the copies mtp.0.emb.tok_emb.weight and mtp.0.head.weight, which are ignored. A file
// without any MTP tensor is a model without the MTP block.
#pragma once

#include <string>

#include <ATen/core/Tensor.h>

#include "checkpoint/names.h"
#include "checkpoint/safetensors.h"
#include "model/config.h"

namespace hadal::checkpoint {

/// Views of the mapped files; never written to.
struct CheckpointTensor {
  at::Tensor data;   ///< as stored: packed FP4 is kChar or kByte [out, in / 2]
  at::Tensor scale;  ///< E8M0 bytes (kByte) or kFloat; undefined when the tensor has none
};

class OfficialCheckpoint {
 public:
  /// Opens and checks everything; InputErrors list at most 20 tensors: missing, unexpected, of
  /// wrong type or shape, with NaN scales, or a tid2eid with experts out of range or repeated in a
  /// row.
  static OfficialCheckpoint open(const std::string& folder);

  /// The config of the folder, with expert_dtype and n_mtp_layers as the tensors say.
  const model::ModelConfig& config() const { return config_; }
  Storage storage() const { return storage_; }
  const TensorReader& reader() const { return reader_; }
  /// By the official name of the weight, e.g. "layers.0.attn.wq_a.weight".
  CheckpointTensor get(const std::string& name) const;

 private:
  OfficialCheckpoint(TensorReader reader, model::ModelConfig config);

  TensorReader reader_;
  model::ModelConfig config_;
  Storage storage_;
};

/// How the quantised tensors of these files are stored.
Storage detect_storage(const TensorReader& reader);

}  // namespace hadal::checkpoint
