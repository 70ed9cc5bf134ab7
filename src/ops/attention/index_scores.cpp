#include "ops/attention/index_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/attention/attention_cpu.h"

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

constinit CpuSlot<void(const IndexScoresCpuParams&)> index_scores_cpu;

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

/// Scores every token's visible blocks and hands them to use(token, scores, count).
template <typename Use>
void score_tokens(const std::vector<at::Tensor>& in,
                  const BlockView& keys,
                  const Batch& batch,
                  int64_t ratio,
                  Numerics numerics,
                  Use&& use) {
  const at::Tensor q = in[0].contiguous(), w = in[1].to(q.scalar_type()).contiguous(),
                   rows = in[2].to(q.scalar_type()).contiguous();
  const int64_t heads = q.size(1), dim = q.size(2), bytes = q.element_size();
  const auto* q_data = static_cast<const char*>(q.const_data_ptr());
  const auto* w_data = static_cast<const char*>(w.const_data_ptr());
  const auto* row_data = static_cast<const char*>(rows.const_data_ptr());
  parallel_for(batch.num_tokens(), 1, [&](int64_t begin, int64_t end) {
    std::vector<const void*> key_rows;
    std::vector<float> scores;
    int64_t seq = 0, known = 0;
    for (int64_t token = begin; token < end; ++token) {
      while (batch.end(seq) <= token) {
        ++seq;
        known = 0;
      }
      const int64_t visible = (batch.host_pos()[static_cast<size_t>(token)] + 1) / ratio;
      key_rows.resize(static_cast<size_t>(visible));
      for (; known < visible; ++known) {
        key_rows[static_cast<size_t>(known)] = row_data + keys.row(seq, known) * dim * bytes;
      }
      scores.resize(static_cast<size_t>(visible));
      index_scores_cpu({.q = q_data + token * heads * dim * bytes,
                        .w = w_data + token * heads * bytes,
                        .rows = key_rows.data(),
                        .scores = scores.data(),
                        .heads = heads,
                        .dim = dim,
                        .num_keys = visible,
                        .dtype = element_type(q),
                        .round_bf16 = numerics == Numerics::kReleased});
      use(token, scores.data(), visible);
    }
  });
}

}  // namespace

at::Tensor index_scores(const at::Tensor& q,
                        const at::Tensor& w,
                        const BlockView& keys,
                        const Batch& batch,
                        int64_t ratio,
                        Numerics numerics) {
  check_shape(q, {batch.num_tokens(), -1, keys.rows.size(1)}, "index_scores: q");
  check_shape(w, {batch.num_tokens(), q.size(1)}, "index_scores: w");
  if (use_cpu_kernel(q)) {
    return with_reference_gradient(
        [&](const auto& in) {
          const int64_t columns = max_visible(batch, ratio);
          at::Tensor scores = at::full({batch.num_tokens(), columns}, kMinusInfinity, at::kFloat);
          float* out = scores.mutable_data_ptr<float>();
          score_tokens(in, keys, batch, ratio, numerics,
                       [&](int64_t token, const float* row, int64_t count) {
                         std::copy(row, row + count, out + token * columns);
                       });
          return std::vector{scores};
        },
        [keys, step = &batch, ratio, numerics](const auto& in) {
          BlockView view = keys;
          view.rows = in[2];
          return std::vector{reference::index_scores(in[0], in[1], view, *step, ratio, numerics)};
        },
        {q, w, keys.rows})[0];
  }
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
  return select_topk(index_scores(q, w, keys, batch, ratio, numerics), batch, ratio, k);
}

}  // namespace hadal::ops
