#include "testing/parrot_model.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "testing/tiny_model.h"

namespace hadal::testing {

model::Transformer parrot_model(const model::ModelConfig& config,
                                const std::map<int64_t, int64_t>& successor) {
  model::Transformer model = random_model(config, 5, at::kFloat);
  at::Tensor embedding;
  model.visit([&](model::Parameter& parameter) {
    const bool writes_back =
        parameter.name.ends_with("wo_b.weight") || parameter.name.ends_with("w2.weight");
    if (writes_back) parameter.value = at::zeros_like(parameter.value);
    if (parameter.name == "norm.weight") parameter.value = at::ones_like(parameter.value);
    if (parameter.kind == model::ParamKind::kEmbedding) {
      parameter.value = at::randn(parameter.shape);
      embedding = parameter.value;
    }
    if (parameter.kind != model::ParamKind::kHead) return;
    parameter.value = at::zeros_like(parameter.value);
    for (const auto& [token, next] : successor) parameter.value[next].add_(embedding[token]);
  });
  return model;
}

std::map<int64_t, int64_t> chain(int64_t first, const std::vector<int64_t>& ids) {
  std::map<int64_t, int64_t> successor;
  for (const int64_t id : ids) {
    HADAL_CHECK(!successor.contains(first), "chain: token ", first, " appears twice");
    successor[first] = id;
    first = id;
  }
  return successor;
}

}  // namespace hadal::testing
