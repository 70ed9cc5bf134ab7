// A checkpoint folder, checked against its config before any tensor is used, and read under the
// official names whatever it calls its tensors (hf_names.h lists the conventions).
//
// Storage is decided by the tensors, not by the config (model.md 14.6): FP4 or FP8 experts,
// power-of-two or F32 scales, or BF16/F16/F32 matrices without scales. Accepted besides the
// official spelling: scales called `.weight_scale_inv`, U8 for I8 and for E8M0, scales beside BF16
// matrices (kept by a conversion, unused), and the copies mtp.0.emb.tok_emb.weight and
// mtp.0.head.weight, which are ignored. A file without any MTP tensor is a model without the MTP
// block or the drafter.
#pragma once

#include <map>
#include <string>

#include <ATen/core/Tensor.h>

#include "checkpoint/hf_names.h"
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
  /// Opens and checks everything but the values of weights (weight_checks.h); InputErrors list at
  /// most 20 tensors: missing, unexpected, of wrong type or shape, with NaN scales, or a tid2eid
  /// with experts out of range or repeated in a row.
  static OfficialCheckpoint open(const std::string& folder);

  /// The config of the folder, with expert_dtype, n_mtp_layers and the drafter as the tensors say.
  const model::ModelConfig& config() const { return config_; }
  Storage storage() const { return storage_; }
  Naming naming() const { return naming_; }
  const TensorReader& reader() const { return reader_; }
  /// By the official name of the weight, e.g. "layers.0.attn.wq_a.weight".
  CheckpointTensor get(const std::string& name) const;
  /// What messages call it and its scale: the names in the file.
  std::string described(const std::string& name) const;
  std::string described_scale(const std::string& name) const;

 private:
  OfficialCheckpoint(TensorReader reader, model::ModelConfig config);
  const HfPlace& place(const std::string& name) const;
  void find_places(const std::vector<TensorSpec>& table);

  TensorReader reader_;
  model::ModelConfig config_;
  Naming naming_ = Naming::kOfficial;
  Storage storage_ = Storage::kBf16;
  std::map<std::string, HfPlace> places_;  ///< by official name
};

}  // namespace hadal::checkpoint
