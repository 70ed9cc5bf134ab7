#include "ops/attention/index_scores.h"

#include <limits>

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::ops {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

int64_t visible_blocks(const Batch& batch, int64_t seq, int64_t ratio) {
  return (batch.start(seq) + batch.length(seq)) / ratio;
}

int64_t max_visible(const Batch& batch, int64_t ratio) { return batch.max_end_pos() / ratio; }

}  // namespace

namespace reference {

at::Tensor index_scores(const at::Tensor& q,
                        const at::Tensor& w,
                        const BlockView& keys,
                        const Batch& batch,
                        int64_t ratio,
                        Numerics numerics) {
  const at::ScalarType type = compute_type(q);
  const int64_t columns = max_visible(batch, ratio);
  const auto round = [&](const at::Tensor& x) {
    return numerics == Numerics::kReleased ? x.to(at::kBFloat16).to(type) : x;
  };
  std::vector<at::Tensor> per_seq;
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const int64_t begin = batch.begin(seq), length = batch.length(seq);
    const int64_t visible = visible_blocks(batch, seq, ratio);
    if (visible == 0) {
      per_seq.push_back(at::full({length, columns}, kMinusInfinity, q.options().dtype(type)));
      continue;
    }
    const at::Tensor key = keys.gather(seq, 0, visible).to(type);
    const at::Tensor queries = q.narrow(0, begin, length).to(type);  // [length, heads, dim]
    const at::Tensor dots = round(at::matmul(queries, key.t()));     // [length, heads, visible]
    const at::Tensor weights = w.narrow(0, begin, length).to(type).unsqueeze(-1);
    const at::Tensor scores = round(round(at::relu(dots) * weights).sum(1));  // [length, visible]
    const at::Tensor limit =
        (batch.pos().narrow(0, begin, length) + 1).div(ratio, "floor").unsqueeze(1);
    const at::Tensor hidden = at::arange(visible, limit.options()).unsqueeze(0) >= limit;
    per_seq.push_back(at::constant_pad_nd(scores.masked_fill(hidden, kMinusInfinity),
                                          {0, columns - visible}, kMinusInfinity));
  }
  return at::cat(per_seq);
}

at::Tensor select_topk(const at::Tensor& scores, const Batch& batch, int64_t ratio, int64_t k) {
  const int64_t tokens = scores.size(0), columns = scores.size(1), taken = std::min(k, columns);
  at::Tensor result = at::full({tokens, k}, -1, scores.options().dtype(at::kInt));
  if (taken == 0) return result;
  const at::Tensor ordered = at::where(scores.isnan(), kMinusInfinity, scores.detach());
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

at::Tensor index_scores(const at::Tensor& q,
                        const at::Tensor& w,
                        const BlockView& keys,
                        const Batch& batch,
                        int64_t ratio,
                        Numerics numerics) {
  check_shape(q, {batch.num_tokens(), -1, keys.rows.size(1)}, "index_scores: q");
  check_shape(w, {batch.num_tokens(), q.size(1)}, "index_scores: w");
  return reference::index_scores(q, w, keys, batch, ratio, numerics);
}

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
  const at::NoGradGuard no_grad;
  return select_topk(index_scores(q, w, keys, batch, ratio, numerics), batch, ratio, k);
}

}  // namespace hadal::ops
