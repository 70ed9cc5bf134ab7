// The table of a checkpoint's tensors (model.md 14.6): the parameters that model/describe.h
// declares, one by one as files hold them, with storage types. Inspection, validation, loading and
// conversion all walk it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/tensor_file.h"
#include "model/describe.h"

namespace hadal::checkpoint {

/// How a tensor is stored: matrices and experts may be quantised, the rest has one type for ever.
enum class TensorRole { kMatrix, kExpert, kBf16, kF32, kI64 };

/// What a tensor belongs to, for the census.
using model::kNumParts;
using model::Part;
const char* part_name(Part part);

struct TensorSpec {
  std::string name;  ///< official, e.g. "layers.2.attn.wq_a.weight"
  TensorRole role;
  Part part;
  int64_t block;  ///< layer index; n_layers for the MTP block or the drafter's first stage; -1 at
                  ///< the top
  std::vector<int64_t> shape;  ///< logical: [out, in] for matrices, whatever their packing
  bool trained = true;         ///< false for tid2eid, which is data and no parameter

  int64_t num_elements() const;
};

/// How the quantised tensors of a checkpoint are stored (model.md 14.6).
enum class Storage { kFp4, kFp8, kFp8F32Scales, kBf16 };
/// What a config alone says; files decide by their tensors.
Storage storage_of(const model::ModelConfig& config);

struct StoredTensor {
  Dtype dtype;
  std::vector<int64_t> shape;
};
/// The weight as it lies in a file. Packed FP4 is I8 [out, in / 2].
StoredTensor stored_weight(const TensorSpec& spec, Storage storage);
/// Its scale: [ceil(out / 128), ceil(in / 128)], or [out, in / 32] for FP4; nothing for tensors
/// without one.
std::optional<StoredTensor> stored_scale(const TensorSpec& spec, Storage storage);
/// "x.weight" -> "x.scale".
std::string scale_name(const std::string& weight_name);

/// Every tensor of the checkpoint, scales not listed, in the order of the official files: top,
/// layers, MTP block or stages of the drafter.
std::vector<TensorSpec> tensor_table(const model::ModelConfig& config);

/// One part of the census.
struct Count {
  int64_t tensors = 0;  ///< in the file, scales included
  int64_t parameters = 0;
  int64_t bytes = 0;

  Count& operator+=(const Count& other);
};

struct Census {
  Count main[kNumParts];                 ///< by Part, without the MTP block or the drafter
  Count mtp[kNumParts];                  ///< the MTP block or the drafter
  int64_t active = 0;                    ///< parameters one token uses, main model
  int64_t active_without_embedding = 0;  ///< the same without the embedding table

  Count main_total() const;
  Count mtp_total() const;
  Count total() const;
};

/// Counts the table of this config.
Census take_census(const model::ModelConfig& config, Storage storage);

}  // namespace hadal::checkpoint
