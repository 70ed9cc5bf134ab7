#include "ops/attention/compress.h"

#include <limits>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

/// Rows of the positions [from, to) of a sequence, from the chunk or its history; `from` may lie
/// before position 0, where rows are `absent`.
at::Tensor rows_of(const at::Tensor& chunk,
                   const RingView& history,
                   const Batch& batch,
                   int64_t seq,
                   int64_t from,
                   int64_t to,
                   double absent) {
  std::vector<at::Tensor> parts;
  if (from < 0) parts.push_back(at::full({-from, chunk.size(1)}, absent, chunk.options()));
  const int64_t start = batch.start(seq);
  if (std::max<int64_t>(from, 0) < start) {
    HADAL_CHECK(history.rows.defined(), "compress: sequence ", seq, " starts at ", start,
                " without a history");
    std::vector<int64_t> rows;
    for (int64_t pos = std::max<int64_t>(from, 0); pos < std::min(start, to); ++pos) {
      rows.push_back(history.first_row[static_cast<size_t>(seq)] + pos % history.ring);
    }
    parts.push_back(history.rows.index_select(0, at::tensor(rows, at::kLong).to(chunk.device())));
  }
  if (to > start) {
    const int64_t first = std::max(from, start);
    parts.push_back(chunk.narrow(0, batch.begin(seq) + first - start, to - first));
  }
  return at::cat(parts);
}

}  // namespace

namespace reference {

Compressed compress(const at::Tensor& kv,
                    const at::Tensor& gate,
                    const at::Tensor& ape,
                    const RingView& kv_history,
                    const RingView& score_history,
                    const Batch& batch,
                    int64_t ratio) {
  const int64_t overlap = ratio == 4 ? 2 : 1, d = kv.size(1) / overlap;
  const at::Tensor score =
      gate + ape.to(gate.scalar_type()).index_select(0, batch.pos().remainder(ratio));
  const BlockPlan& plan = batch.blocks(ratio);
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  std::vector<at::Tensor> pooled;
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const size_t s = static_cast<size_t>(seq);
    const int64_t first = plan.first_block[s], count = plan.cu_blocks[s + 1] - plan.cu_blocks[s];
    if (count == 0) continue;
    const int64_t from = (first - (overlap - 1)) * ratio, to = (first + count) * ratio;
    const at::Tensor k = rows_of(kv, kv_history, batch, seq, from, to, 0.0)
                             .reshape({-1, ratio, overlap, d});  // [count + overlap - 1, m, o, d]
    const at::Tensor g = rows_of(score, score_history, batch, seq, from, to, minus_infinity)
                             .reshape({-1, ratio, overlap, d});
    at::Tensor values, scores;
    if (overlap == 2) {
      values = at::cat({k.narrow(0, 0, count).select(2, 0), k.narrow(0, 1, count).select(2, 1)}, 1);
      scores = at::cat({g.narrow(0, 0, count).select(2, 0), g.narrow(0, 1, count).select(2, 1)}, 1);
    } else {
      values = k.select(2, 0);
      scores = g.select(2, 0);
    }
    pooled.push_back((at::softmax(scores, 1) * values).sum(1));
  }
  return {.pooled = pooled.empty() ? at::empty({0, d}, kv.options()) : at::cat(pooled),
          .score = score};
}

}  // namespace reference

Compressed compress(const at::Tensor& kv,
                    const at::Tensor& gate,
                    const at::Tensor& ape,
                    const RingView& kv_history,
                    const RingView& score_history,
                    const Batch& batch,
                    int64_t ratio) {
  HADAL_CHECK(ratio > 0, "compress: ratio ", ratio);
  check_shape(kv, {batch.num_tokens(), -1}, "compress: kv");
  check_shape(gate, {batch.num_tokens(), kv.size(1)}, "compress: gate");
  check_shape(ape, {ratio, kv.size(1)}, "compress: ape");
  return reference::compress(kv, gate, ape, kv_history, score_history, batch, ratio);
}

}  // namespace hadal::ops
