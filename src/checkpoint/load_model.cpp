#include "checkpoint/load_model.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "checkpoint/dequantise.h"

namespace hadal::checkpoint {
namespace {

using model::Parameter;
using model::ParamKind;

at::Tensor dense_values(const OfficialCheckpoint& checkpoint, const std::string& name) {
  const CheckpointTensor stored = checkpoint.get(name);
  const at::ScalarType type = stored.data.scalar_type();
  if (type == at::kFloat8_e4m3fn) return dequantise_fp8(stored.data, stored.scale);
  if (type == at::kByte || type == at::kChar) return dequantise_fp4(stored.data, stored.scale);
  return stored.data;
}

at::Tensor all_values(const OfficialCheckpoint& checkpoint, const Parameter& parameter) {
  const size_t star = parameter.name.find('*');
  if (star == std::string::npos) return dense_values(checkpoint, parameter.name);
  std::vector<at::Tensor> experts;
  for (int64_t expert = 0; expert < parameter.shape[0]; ++expert) {
    std::string name = parameter.name;
    name.replace(star, 1, std::to_string(expert));
    experts.push_back(dense_values(checkpoint, name).to(at::kBFloat16));
  }
  return at::stack(experts);
}

bool in_bf16(const Parameter& parameter) {
  return parameter.is_matrix() || parameter.kind == ParamKind::kEmbedding ||
         parameter.kind == ParamKind::kHead;
}

}  // namespace

ops::Numerics default_numerics(const OfficialCheckpoint& checkpoint) {
  return checkpoint.storage() == Storage::kBf16 ? ops::Numerics::kIdeal : ops::Numerics::kReleased;
}

model::Transformer load_model(const OfficialCheckpoint& checkpoint, ops::Numerics numerics) {
  if (numerics == ops::Numerics::kReleased) checkpoint.config().check_released();
  HADAL_INPUT_CHECK(checkpoint.storage() != Storage::kFp8F32Scales, checkpoint.reader().path(),
                    ": FP8 with F32 scales (a -Base checkpoint) cannot be run as it is: its values "
                    "have no exact BF16 "
                    "form");
  model::Transformer model(checkpoint.config());
  model.visit([&](Parameter& parameter) {
    at::Tensor value = all_values(checkpoint, parameter);
    HADAL_CHECK(value.sizes() == at::IntArrayRef(parameter.shape), "load_model: ", parameter.name,
                " is ", value.sizes(), ", expected ", at::IntArrayRef(parameter.shape));
    if (value.is_floating_point()) {
      const bool low = numerics != ops::Numerics::kIdeal && in_bf16(parameter);
      value = value.to(low ? at::kBFloat16 : at::kFloat).contiguous();
    }
    parameter.value = value;
  });
  return model;
}

}  // namespace hadal::checkpoint
