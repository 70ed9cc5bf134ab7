#include "ops/attention/compress.h"

#include <limits>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/gemm/embedding.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

/// x at every position of every new block, [num_blocks, ratio, width], from the step or its
/// history.
at::Tensor block_rows(const at::Tensor& x,
                      const RingView& history,
                      const Batch& batch,
                      int64_t ratio) {
  const BlockPlan& plan = batch.blocks(ratio);
  const std::vector<int64_t> shape = {plan.num_blocks(), ratio, x.size(1)};
  if (plan.device_rows.defined()) return gather_distinct_rows(x, plan.device_rows).reshape(shape);
  HADAL_CHECK(history.rows.defined(), "compress: a sequence continues without a history");
  const int64_t offset = history.rows.size(0);
  std::vector<int64_t> rows;
  for (size_t seq = 0; seq + 1 < plan.cu_blocks.size(); ++seq) {
    for (int64_t i = plan.cu_blocks[seq] * ratio; i < plan.cu_blocks[seq + 1] * ratio; ++i) {
      const int64_t row = plan.rows[static_cast<size_t>(i)];
      rows.push_back(row >= 0 ? offset + row : history.first_row[seq] + (-1 - row) % history.ring);
    }
  }
  return at::cat({history.rows, x})
      .index_select(0, at::tensor(rows, at::kLong).to(x.device()))
      .reshape(shape);
}

/// The first half of the block before each sequence's first new one, [num_seqs, ratio, d]; `absent`
/// at position 0.
at::Tensor leading_rows(const at::Tensor& x,
                        const RingView& history,
                        const Batch& batch,
                        int64_t ratio,
                        int64_t d,
                        double absent) {
  const BlockPlan& plan = batch.blocks(ratio);
  at::Tensor result = at::full({batch.num_seqs(), ratio, d}, absent, x.options());
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const int64_t first = plan.first_block[static_cast<size_t>(seq)];
    const bool any =
        plan.cu_blocks[static_cast<size_t>(seq) + 1] > plan.cu_blocks[static_cast<size_t>(seq)];
    if (first == 0 || !any) continue;
    HADAL_CHECK(history.rows.defined(), "compress: sequence ", seq, " continues without a history");
    std::vector<int64_t> rows;
    for (int64_t pos = (first - 1) * ratio; pos < first * ratio; ++pos) {
      rows.push_back(history.first_row[static_cast<size_t>(seq)] + pos % history.ring);
    }
    result[seq].copy_(
        history.rows.index_select(0, at::tensor(rows, at::kLong).to(x.device())).narrow(1, 0, d));
  }
  return result;
}

/// Candidates of every block, [num_blocks, ratio or 2 ratio, d].
at::Tensor candidates(const at::Tensor& x,
                      const RingView& history,
                      const Batch& batch,
                      int64_t ratio,
                      double absent) {
  const at::Tensor blocks = block_rows(x, history, batch, ratio);
  if (ratio != 4) return blocks;
  const int64_t d = x.size(1) / 2;
  const at::Tensor first_halves =
      at::cat({leading_rows(x, history, batch, ratio, d, absent), blocks.narrow(2, 0, d)});
  const at::Tensor previous = gather_distinct_rows(first_halves, batch.blocks(ratio).previous);
  return at::cat({previous, blocks.narrow(2, d, d)}, 1);
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
  const at::Tensor position = batch.pos().remainder(ratio);
  const at::Tensor score = gate + gather_rows(ape.to(gate.scalar_type()), position);
  const at::Tensor values = candidates(kv, kv_history, batch, ratio, 0.0);
  const at::Tensor scores =
      candidates(score, score_history, batch, ratio, -std::numeric_limits<double>::infinity());
  return {.pooled = (at::softmax(scores, 1) * values).sum(1), .score = score};
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
