#include "ops/moe/gate.h"

#include <limits>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

Routing route(const at::Tensor& affinity, const at::Tensor& experts, double route_scale) {
  const at::Tensor ascending = std::get<0>(experts.sort(1));
  const at::Tensor chosen = affinity.gather(1, ascending);
  return {.experts = ascending,
          .weights = chosen / chosen.sum(1, /*keepdim=*/true) * route_scale,
          .affinity = affinity};
}

}  // namespace

at::Tensor sqrt_softplus(const at::Tensor& logits) {
  return at::sqrt(at::softplus(logits, /*beta=*/1, /*threshold=*/20));
}

Routing gate(const at::Tensor& logits, const at::Tensor& bias, int64_t topk, double route_scale) {
  check_shape(logits, {-1, -1}, "gate: logits");
  check_shape(bias, {logits.size(1)}, "gate: bias");
  HADAL_CHECK(topk >= 1 && topk <= logits.size(1), "gate: top ", topk, " of ", logits.size(1));
  const at::Tensor affinity = sqrt_softplus(logits);
  const at::Tensor score = affinity.detach() + bias.to(affinity.scalar_type());
  const at::Tensor ordered =
      at::where(score.isnan(), -std::numeric_limits<double>::infinity(), score);
  const at::Tensor order =
      std::get<1>(at::sort(ordered, /*stable=*/true, /*dim=*/1, /*descending=*/true));
  return route(affinity, order.narrow(1, 0, topk), route_scale);
}

Routing gate_fixed(const at::Tensor& logits, const at::Tensor& experts, double route_scale) {
  check_shape(logits, {-1, -1}, "gate: logits");
  check_shape(experts, {logits.size(0), -1}, "gate: experts");
  return route(sqrt_softplus(logits), experts, route_scale);
}

}  // namespace hadal::ops
