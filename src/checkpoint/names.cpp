#include "checkpoint/names.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/math.h"

namespace hadal::checkpoint {
namespace {

using model::ModelConfig;

constexpr int64_t kBlock = 128;    // edge of an FP8 weight block
constexpr int64_t kFp4Group = 32;  // inputs that share an FP4 scale

TensorRole role_of(const model::Field& field) {
  switch (field.storage) {
    case model::Storage::kI64:
      return TensorRole::kI64;
    case model::Storage::kF32:
      return TensorRole::kF32;
    case model::Storage::kBf16:
      return TensorRole::kBf16;
    case model::Storage::kFp4:
    case model::Storage::kFp8:
      break;
  }
  return field.kind == model::ParamKind::kExperts ? TensorRole::kExpert : TensorRole::kMatrix;
}

bool is_stacked(const model::Field& field) { return field.kind == model::ParamKind::kExperts; }

TensorSpec spec_of(const model::Field& field) {
  const TensorRole role = role_of(field);
  return {.name = field.name,
          .role = role,
          .part = field.part,
          .block = field.block,
          .shape = field.shape,
          .trained = role != TensorRole::kI64};
}

/// One expert's matrix of a stack.
TensorSpec spec_of_expert(const model::Field& field, int64_t expert) {
  TensorSpec spec = spec_of(field);
  spec.name.replace(spec.name.find('*'), 1, std::to_string(expert));
  spec.shape.erase(spec.shape.begin());
  return spec;
}

}  // namespace

const char* part_name(Part part) {
  constexpr const char* kNames[kNumParts] = {
      "embedding", "head",   "attention",     "compressors",    "indexers",       "norms",
      "mHC",       "router", "shared expert", "routed experts", "MTP projections"};
  return kNames[static_cast<int>(part)];
}

int64_t TensorSpec::num_elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

Storage storage_of(const ModelConfig& config) {
  if (!config.quantized) return Storage::kBf16;
  return config.expert_dtype == model::ExpertDtype::kFp4 ? Storage::kFp4 : Storage::kFp8F32Scales;
}

StoredTensor stored_weight(const TensorSpec& spec, Storage storage) {
  switch (spec.role) {
    case TensorRole::kF32:
      return {Dtype::kF32, spec.shape};
    case TensorRole::kI64:
      return {Dtype::kI64, spec.shape};
    case TensorRole::kBf16:
      return {Dtype::kBf16, spec.shape};
    case TensorRole::kExpert:
      if (storage == Storage::kFp4)
        return {Dtype::kI8, {spec.shape[0], ceil_div(spec.shape[1], 2)}};
      [[fallthrough]];
    case TensorRole::kMatrix:
      return {storage == Storage::kBf16 ? Dtype::kBf16 : Dtype::kF8E4M3, spec.shape};
  }
  throw Error("stored_weight: no such role");
}

std::optional<StoredTensor> stored_scale(const TensorSpec& spec, Storage storage) {
  const bool quantised = spec.role == TensorRole::kMatrix || spec.role == TensorRole::kExpert;
  if (!quantised || storage == Storage::kBf16) return std::nullopt;
  if (spec.role == TensorRole::kExpert && storage == Storage::kFp4)
    return StoredTensor{Dtype::kF8E8M0, {spec.shape[0], ceil_div(spec.shape[1], kFp4Group)}};
  return StoredTensor{storage == Storage::kFp8F32Scales ? Dtype::kF32 : Dtype::kF8E8M0,
                      {ceil_div(spec.shape[0], kBlock), ceil_div(spec.shape[1], kBlock)}};
}

std::string scale_name(const std::string& weight_name) {
  HADAL_CHECK(weight_name.ends_with(".weight"), "scale_name: ", weight_name, " is no weight");
  return weight_name.substr(0, weight_name.size() - 6) + "scale";
}

std::vector<TensorSpec> tensor_table(const ModelConfig& config) {
  const std::vector<model::Field> fields = model::declared_in_file_order(config);
  std::vector<TensorSpec> table;
  for (auto field = fields.begin(); field != fields.end();) {
    // Files hold all matrices of an expert, then those of the next.
    const auto stacks_end = std::find_if_not(field, fields.end(), is_stacked);
    const int64_t experts = stacks_end == field ? 0 : field->shape.front();
    for (int64_t expert = 0; expert < experts; ++expert) {
      for (auto stack = field; stack != stacks_end; ++stack)
        table.push_back(spec_of_expert(*stack, expert));
    }
    field = stacks_end;
    if (field != fields.end()) table.push_back(spec_of(*field++));
  }
  return table;
}

Count& Count::operator+=(const Count& other) {
  tensors += other.tensors;
  parameters += other.parameters;
  bytes += other.bytes;
  return *this;
}

Count Census::main_total() const {
  Count sum;
  for (const Count& count : main) sum += count;
  return sum;
}

Count Census::mtp_total() const {
  Count sum;
  for (const Count& count : mtp) sum += count;
  return sum;
}

Count Census::total() const {
  Count sum = main_total();
  return sum += mtp_total();
}

Census take_census(const ModelConfig& config, Storage storage) {
  const auto num_bytes = [](const StoredTensor& tensor) {
    int64_t bytes = dtype_bytes(tensor.dtype);
    for (const int64_t size : tensor.shape) bytes *= size;
    return bytes;
  };
  Census census;
  for (const TensorSpec& spec : tensor_table(config)) {
    Count count{1, spec.trained ? spec.num_elements() : 0, num_bytes(stored_weight(spec, storage))};
    if (const auto scale = stored_scale(spec, storage)) {
      ++count.tensors;
      count.bytes += num_bytes(*scale);
    }
    const auto part = static_cast<size_t>(spec.part);
    (spec.block >= config.n_layers ? census.mtp : census.main)[part] += count;
  }
  const int64_t routed = census.main[static_cast<size_t>(Part::kExperts)].parameters;
  census.active = census.main_total().parameters - routed +
                  routed / config.n_routed_experts * config.n_activated_experts;
  census.active_without_embedding =
      census.active - census.main[static_cast<size_t>(Part::kEmbedding)].parameters;
  return census;
}

}  // namespace hadal::checkpoint
