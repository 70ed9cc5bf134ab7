#include "ops/indexer/index_topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "ops/indexer/index_scores.h"
#include "ops/indexer/sm90_index.h"
#include "ops/indexer/visible_blocks.h"
#include "ops/sm90.h"

namespace hadal::ops {

namespace reference {

at::Tensor select_topk(const at::Tensor& scores, const Batch& batch, int64_t ratio, int64_t k) {
  const int64_t tokens = scores.size(0), columns = scores.size(1), taken = std::min(k, columns);
  at::Tensor result = at::full({tokens, k}, -1, scores.options().dtype(at::kInt));
  if (taken == 0) return result;
  const at::Tensor ordered =
      at::where(scores.isnan(), -std::numeric_limits<double>::infinity(), scores.detach());
  const at::Tensor order =
      std::get<1>(at::sort(ordered, /*stable=*/true, /*dim=*/1, /*descending=*/true));
  const at::Tensor limit = (batch.pos() + 1).div(ratio, "floor").unsqueeze(1);
  at::Tensor chosen = order.narrow(1, 0, taken);
  // Blocks beyond the visible ones sort last, so that -1 fills the tail of the ascending list.
  chosen = std::get<0>(at::where(chosen < limit, chosen, columns).sort(1));
  result.narrow(1, 0, taken).copy_(at::where(chosen < columns, chosen, -1));
  return result;
}

}  // namespace reference

namespace {

/// The k best of count scores, ties to the lower index, ascending, then -1.
void choose(
    const float* scores, int64_t count, int64_t k, std::vector<int32_t>& order, int32_t* chosen) {
  const int64_t taken = std::min(k, count);
  order.resize(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  const auto better = [scores](int32_t a, int32_t b) {
    const float x = std::isnan(scores[a]) ? -INFINITY : scores[a];
    const float y = std::isnan(scores[b]) ? -INFINITY : scores[b];
    return x > y || (x == y && a < b);
  };
  if (taken < count) {
    std::nth_element(order.begin(), order.begin() + taken, order.end(), better);
  }
  std::sort(order.begin(), order.begin() + taken);
  std::copy(order.begin(), order.begin() + taken, chosen);
  std::fill(chosen + taken, chosen + k, -1);
}

}  // namespace

at::Tensor select_topk(const at::Tensor& scores, const Batch& batch, int64_t ratio, int64_t k) {
  check_shape(scores, {batch.num_tokens(), -1}, "select_topk: scores");
  HADAL_CHECK(k > 0, "select_topk: k is ", k);
  return reference::select_topk(scores, batch, ratio, k);
}

at::Tensor index_topk(const at::Tensor& q,
                      const at::Tensor& w,
                      const BlockView& keys,
                      const Batch& batch,
                      int64_t ratio,
                      int64_t k,
                      Numerics numerics) {
  // Asked before gradients are off: a block that is computed a second time for its gradients must
  // choose as it did the first time, by the scores that training takes.
  const bool on_sm90 = serves_index_sm90(q, w, keys, numerics);
  const at::NoGradGuard no_grad;
  if (on_sm90) return index_topk_on_sm90(q, w, keys, batch, ratio, k, numerics);
  refuse_as_hopper(q, "index_topk");
  if (use_cpu_kernel(q)) {
    at::Tensor selection = at::empty({batch.num_tokens(), k}, at::kInt);
    int32_t* chosen = selection.mutable_data_ptr<int32_t>();
    score_tokens({q, w, keys.rows}, keys, batch, ratio, numerics,
                 [&](int64_t token, const float* row, int64_t count) {
                   thread_local std::vector<int32_t> order;
                   choose(row, count, k, order, chosen + token * k);
                 });
    return selection;
  }
  const DifferentiableGuard training;
  return select_topk(index_scores(q, w, keys, batch, ratio, numerics), batch, ratio, k);
}

}  // namespace hadal::ops
