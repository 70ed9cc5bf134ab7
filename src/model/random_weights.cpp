#include "model/random_weights.h"

#include <tuple>
#include <vector>

#include <ATen/ATen.h>

#include "ops/gemm/sm90_random.h"

namespace hadal::model {
namespace {

using ops::WeightFormat;

WeightFormat packed_format(const Parameter& parameter) {
  switch (parameter.storage) {
    case Storage::kFp8:
      return WeightFormat::kFp8;
    case Storage::kFp4:
      return WeightFormat::kFp4;
    default:
      return WeightFormat::kBf16;
  }
}

at::Tensor random_value(const Parameter& parameter, const ModelConfig& config, at::Device device) {
  const auto floats = at::TensorOptions(device).dtype(at::kFloat);
  switch (parameter.kind) {
    case ParamKind::kEmbedding:
      return at::randn(parameter.local_shape(), floats.dtype(at::kBFloat16));
    case ParamKind::kHashTable:
      return std::get<1>(at::rand({parameter.shape[0], config.n_routed_experts}, floats)
                             .topk(parameter.shape[1], 1))
          .contiguous();
    case ParamKind::kNorm:
      return at::ones(parameter.local_shape(), floats);
    default:
      return at::randn(parameter.local_shape(), floats).mul_(0.02);
  }
}

}  // namespace

void fill_random_packed(Transformer& model, at::Device device, uint64_t seed) {
  model.visit([&](Parameter& parameter) {
    // What no form but FP32 holds, an FP32 product multiplies (`hc_*` are no matrices).
    parameter.as_stored = true;  // they stand for a checkpoint's
    if (!parameter.is_matrix() && parameter.kind != ParamKind::kHead)
      return parameter.hold(random_value(parameter, model.config(), device));
    const WeightFormat format = packed_format(parameter);
    const int64_t matrices = parameter.local_matrices();
    const std::vector<int64_t> shape = parameter.local_shape();
    const bool experts = parameter.kind == ParamKind::kExperts;
    parameter.hold(ops::Weight(ops::random_sm90(
        {.format = format,
         .widened = format == WeightFormat::kFp8 && parameter.role == ops::GemmRole::kBf16,
         .matrices = matrices,
         .out = experts ? shape[1] : shape[0] / matrices,
         .in = shape.back(),
         .seed = seed++},
        device)));
  });
}

}  // namespace hadal::model
