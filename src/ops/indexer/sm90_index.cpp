#include "ops/indexer/sm90_index.h"

#include <algorithm>
#include <limits>

#include <ATen/ATen.h>

#include "base/math.h"
#include "ops/indexer/index_bf16_sm90.h"
#include "ops/indexer/index_scores_sm90.h"
#include "ops/indexer/visible_blocks.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

struct Scores {
  at::Tensor scores;  ///< [tokens, stride], written up to `visible`; of packed keys BF16, else FP32
  at::Tensor visible;  ///< [tokens] I32

  Scores(const Batch& batch, int64_t ratio, const at::TensorOptions& options)
      : scores(at::empty(
            {batch.num_tokens(), align_up(std::max<int64_t>(max_visible(batch, ratio), 1), 8)},
            options)),
        visible(batch.visible(ratio)) {}
};

constexpr RowFormat kKeyFormat{.kind = RowKind::kIndexKey, .width = kIndexDim};

/// The keys of a step without a cache, which went through their round trip, as a cache holds them:
/// packed, every sequence's from a page of its own on.
BlockView pack_step(const BlockView& keys, const Batch& batch, int64_t ratio) {
  const std::vector<int64_t>& cu_blocks = batch.blocks(ratio).cu_blocks;
  std::vector<int64_t> rows;
  std::vector<std::vector<int64_t>> pages;
  for (size_t s = 0; s + 1 < cu_blocks.size(); ++s) {
    pages.emplace_back();
    for (int64_t first = cu_blocks[s]; first < cu_blocks[s + 1]; first += kIndexPageRows) {
      pages.back().push_back(std::ssize(rows) / kIndexPageRows);
      for (int64_t row = first; row < first + kIndexPageRows; ++row)
        rows.push_back(std::min(row, cu_blocks[s + 1] - 1));  // nobody reads what lies behind
    }
  }
  const at::Tensor packed = pack_rows(keys.rows, kKeyFormat);
  BlockView view =
      BlockView::paged(packed.index_select(0, at::tensor(rows, at::kLong).to(packed.device())),
                       pages, kIndexPageRows);
  view.format = kKeyFormat;
  return view;
}

/// Packed keys.
Scores score_packed(const at::Tensor& q_any,
                    const at::Tensor& w_any,
                    const BlockView& keys,
                    const Batch& batch,
                    int64_t ratio) {
  const int64_t tokens = q_any.size(0), heads = q_any.size(1);
  const bool packed = q_any.scalar_type() == at::kByte;
  const at::Tensor q =
      packed ? q_any : pack_rows(q_any.reshape({tokens * heads, kIndexDim}), keys.format);
  const at::Tensor w = kernel_input(w_any);
  // Lines of the page table.
  const at::Tensor line = keys.slots.is_same(batch.slots())
                              ? batch.token_slots()
                              : keys.slots.index_select(0, batch.seq());
  Scores result(batch, ratio, w.options());
  run_sm90(q, index_scores_sm90, index_scores_twin,
           {.q = q.const_data_ptr<uint8_t>(),
            .w = bf16_data(w),
            .keys = keys.rows.const_data_ptr<uint8_t>(),
            .pages = keys.pages.const_data_ptr<int32_t>(),
            .sequence = line.const_data_ptr<int32_t>(),
            .visible = result.visible.const_data_ptr<int32_t>(),
            .scores = mutable_bf16_data(result.scores),
            .tokens = tokens,
            .heads = heads,
            .max_pages = keys.pages.stride(0),
            .stride = result.scores.size(1)});
  return result;
}

/// BF16 keys.
Scores score_dense(const at::Tensor& q_any,
                   const at::Tensor& w_any,
                   const BlockView& keys,
                   const Batch& batch,
                   int64_t ratio) {
  const at::Tensor q = kernel_input(q_any), w = kernel_input(w_any);
  Scores result(batch, ratio, w.options().dtype(at::kFloat));
  run_sm90(q, index_scores_bf16_sm90, index_scores_bf16_twin,
           {.q = bf16_data(q),
            .w = bf16_data(w),
            .keys = bf16_data(keys.rows),
            .rows = keys.table(),
            .seq = batch.seq().const_data_ptr<int64_t>(),
            .visible = result.visible.const_data_ptr<int32_t>(),
            .scores = result.scores.mutable_data_ptr<float>(),
            .tokens = q.size(0),
            .heads = q.size(1),
            .stride = result.scores.size(1)});
  return result;
}

Scores score(const at::Tensor& q,
             const at::Tensor& w,
             const BlockView& keys,
             const Batch& batch,
             int64_t ratio,
             Numerics numerics) {
  if (numerics != Numerics::kReleased) return score_dense(q, w, keys, batch, ratio);
  return score_packed(q, w, keys.format.packed() ? keys : pack_step(keys, batch, ratio), batch,
                      ratio);
}

bool serves_packed(const BlockView& keys) {
  return keys.format == kKeyFormat && keys.page_blocks == kIndexPageRows &&
         keys.page_rows == kIndexPageRows;
}

bool serves_dense(const BlockView& keys) {
  return !keys.format.packed() && keys.rows.defined() && keys.rows.scalar_type() == at::kBFloat16 &&
         keys.rows.is_contiguous() && keys.rows.size(1) == kIndexDim;
}

}  // namespace

bool serves_index_sm90(const at::Tensor& q,
                       const at::Tensor& w,
                       const BlockView& keys,
                       Numerics numerics) {
  const bool serves = numerics == Numerics::kReleased
                          ? serves_packed(keys) || (keys.of_step && serves_dense(keys))
                          : numerics == Numerics::kBf16 && serves_dense(keys);
  return serves && serves_index_heads(q.size(1)) && use_sm90(q) && use_sm90(w);
}

at::Tensor index_scores_on_sm90(const at::Tensor& q,
                                const at::Tensor& w,
                                const BlockView& keys,
                                const Batch& batch,
                                int64_t ratio,
                                Numerics numerics) {
  const Scores s = score(q, w, keys, batch, ratio, numerics);
  const int64_t columns = max_visible(batch, ratio);
  const at::Tensor hidden =
      at::arange(columns, s.visible.options()).unsqueeze(0) >= s.visible.unsqueeze(1);
  return s.scores.narrow(1, 0, columns)
      .to(at::kFloat)
      .masked_fill(hidden, -std::numeric_limits<double>::infinity());
}

at::Tensor index_topk_on_sm90(const at::Tensor& q,
                              const at::Tensor& w,
                              const BlockView& keys,
                              const Batch& batch,
                              int64_t ratio,
                              int64_t k,
                              Numerics numerics) {
  const Scores s = score(q, w, keys, batch, ratio, numerics);
  at::Tensor selection = at::empty({q.size(0), k}, s.visible.options());
  const auto* visible = s.visible.const_data_ptr<int32_t>();
  auto* blocks = selection.mutable_data_ptr<int32_t>();
  const int64_t tokens = q.size(0), stride = s.scores.size(1);
  if (s.scores.scalar_type() == at::kFloat) {
    run_sm90(q, index_topk_f32_sm90, index_topk_f32_twin,
             {s.scores.const_data_ptr<float>(), visible, blocks, tokens, stride, k});
  } else {
    run_sm90(q, index_topk_sm90, index_topk_twin,
             {bf16_data(s.scores), visible, blocks, tokens, stride, k});
  }
  return selection;
}

}  // namespace hadal::ops
