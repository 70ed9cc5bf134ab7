#include "checkpoint/load_model.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "checkpoint/dequantise.h"
#include "checkpoint/weight_checks.h"

namespace hadal::checkpoint {
namespace {

using model::Parameter;
using model::ParamKind;

/// The stored matrices of a parameter: one for each expert, else one.
std::vector<CheckpointTensor> stored(const OfficialCheckpoint& checkpoint,
                                     const Parameter& parameter) {
  const size_t star = parameter.name.find('*');
  if (star == std::string::npos) return {checkpoint.get(parameter.name)};
  std::vector<CheckpointTensor> experts;
  for (int64_t expert = 0; expert < parameter.shape[0]; ++expert) {
    std::string name = parameter.name;
    name.replace(star, 1, std::to_string(expert));
    experts.push_back(checkpoint.get(name));
  }
  return experts;
}

bool is_fp8(const CheckpointTensor& tensor) {
  return tensor.data.scalar_type() == at::kFloat8_e4m3fn;
}
bool is_fp4(const CheckpointTensor& tensor) {
  return tensor.data.scalar_type() == at::kByte || tensor.data.scalar_type() == at::kChar;
}

at::Tensor dense_values(const CheckpointTensor& tensor) {
  if (is_fp8(tensor)) return dequantise_fp8(tensor.data, tensor.scale);
  if (is_fp4(tensor)) return dequantise_fp4(tensor.data, tensor.scale);
  return tensor.data;
}

/// FP8 and FP4 values have an exact BF16 form, which is half of their FP32 one; what is stored in
/// a float type stays in it.
at::Tensor dense_values(const std::vector<CheckpointTensor>& tensors, const Parameter& parameter) {
  if (parameter.kind != ParamKind::kExperts) return dense_values(tensors[0]);
  std::vector<at::Tensor> experts;
  bool all_bf16 = true;
  for (const CheckpointTensor& tensor : tensors) {
    const at::Tensor value = dense_values(tensor);
    const bool codes = is_fp8(tensor) || is_fp4(tensor);
    experts.push_back(codes ? value.to(at::kBFloat16) : value);
    all_bf16 = all_bf16 && experts.back().scalar_type() == at::kBFloat16;
  }
  if (!all_bf16)
    for (at::Tensor& expert : experts) expert = expert.to(at::kFloat);
  return at::stack(experts);
}

/// FP8 and FP4 as they are stored; nullopt for other storage and for what has no packed form.
std::optional<ops::Panels> packed_values(const std::vector<CheckpointTensor>& tensors,
                                         const Parameter& parameter) {
  std::vector<at::Tensor> data, scale;
  for (const CheckpointTensor& tensor : tensors) {
    if (!is_fp8(tensor) && !is_fp4(tensor)) return std::nullopt;
    if (parameter.kind != ParamKind::kGroups) {
      data.push_back(tensor.data);
      scale.push_back(tensor.scale);
      continue;
    }
    // The matrices of wo_a share one grid of scales, which must not cut through a group.
    const int64_t out = parameter.shape[0] / parameter.units;
    if (!is_fp8(tensor) || out % 128 != 0) return std::nullopt;
    for (int64_t group = 0; group < parameter.units; ++group) {
      data.push_back(tensor.data.narrow(0, group * out, out));
      scale.push_back(tensor.scale.narrow(0, group * out / 128, out / 128));
    }
  }
  return is_fp8(tensors[0]) ? ops::pack_fp8(data, scale) : ops::pack_fp4(data, scale);
}

bool serves_packed(const Parameter& parameter) {
  return parameter.is_matrix() || parameter.kind == ParamKind::kHead;
}

/// Whether a numerics other than `ideal` holds these values in BF16: a matrix that is stored so, or
/// in codes. One stored in F32 stays it, because no numerics rounds what is stored. Rows of the
/// embedding are activations.
bool in_bf16(const Parameter& parameter, const CheckpointTensor& stored) {
  if (parameter.kind == ParamKind::kEmbedding) return true;
  const bool matrix = parameter.is_matrix() || parameter.kind == ParamKind::kHead;
  return matrix && stored.data.scalar_type() != at::kFloat &&
         stored.data.scalar_type() != at::kHalf;
}

}  // namespace

ops::Numerics default_numerics(const OfficialCheckpoint& checkpoint) {
  return checkpoint.storage() == Storage::kBf16 ? ops::Numerics::kIdeal : ops::Numerics::kReleased;
}

model::Transformer load_model(const OfficialCheckpoint& checkpoint,
                              ops::Numerics numerics,
                              Held held) {
  if (numerics == ops::Numerics::kReleased) checkpoint.config().check_released();
  HADAL_INPUT_CHECK(checkpoint.storage() != Storage::kFp8F32Scales, checkpoint.reader().path(),
                    ": FP8 with F32 scales (a -Base checkpoint) cannot be run as it is: its values "
                    "have no exact BF16 "
                    "form");
  check_weights(checkpoint);
  model::Transformer model(checkpoint.config());
  model.visit([&](Parameter& parameter) {
    const std::vector<CheckpointTensor> tensors = stored(checkpoint, parameter);
    const bool packs = held == Held::kPacked && serves_packed(parameter);
    if (packs && numerics != ops::Numerics::kIdeal) {
      if (auto panels = packed_values(tensors, parameter)) {
        parameter.hold_packed(std::move(*panels));
        return;
      }
    }
    at::Tensor value = dense_values(tensors, parameter);
    HADAL_CHECK(value.sizes() == at::IntArrayRef(parameter.shape), "load_model: ", parameter.name,
                " is ", value.sizes(), ", expected ", at::IntArrayRef(parameter.shape));
    if (value.is_floating_point()) {
      const bool low =
          numerics != ops::Numerics::kIdeal && in_bf16(parameter, tensors[0]) &&
          (parameter.kind != ParamKind::kExperts || value.scalar_type() == at::kBFloat16);
      value = value.to(low ? at::kBFloat16 : at::kFloat).contiguous();
      parameter.as_stored = numerics != ops::Numerics::kIdeal;
    }
    if (!packs) {
      parameter.value = value;
      return;
    }
    const bool groups = parameter.kind == ParamKind::kGroups;
    parameter.hold_packed(ops::pack_panels(
        groups ? value.reshape({parameter.units, -1, parameter.shape.back()}) : value));
  });
  return model;
}

}  // namespace hadal::checkpoint
