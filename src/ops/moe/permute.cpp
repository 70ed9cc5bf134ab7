#include "ops/moe/permute.h"

#include <ATen/ATen.h>

#include "ops/gemm/embedding.h"
#include "ops/op.h"

namespace hadal::ops {

Permutation permute_by_expert(const at::Tensor& experts, int64_t num_experts) {
  check_shape(experts, {-1, -1}, "permute: experts");
  const auto [sorted, slot] =
      at::sort(experts.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor bounds = at::arange(num_experts + 1, experts.options());
  at::Tensor place = at::empty_like(slot);
  place.scatter_(0, slot, at::arange(slot.size(0), slot.options()));
  return {.token = slot.div(experts.size(1), "floor"),
          .slot = slot,
          .place = place,
          .offsets = at::searchsorted(sorted, bounds)};
}

at::Tensor combine(const at::Tensor& rows, const Permutation& order, const at::Tensor& shared) {
  const int64_t tokens = shared.size(0), topk = order.place.size(0) / tokens;
  check_shape(rows, {tokens * topk, shared.size(1)}, "combine: rows");
  const at::Tensor by_token =
      gather_rows(to_compute(rows), order.place).reshape({tokens, topk, -1});
  at::Tensor sum = by_token.select(1, 0);
  for (int64_t k = 1; k < topk; ++k) sum = sum + by_token.select(1, k);
  return (sum + to_compute(shared)).to(shared.scalar_type());
}

}  // namespace hadal::ops
