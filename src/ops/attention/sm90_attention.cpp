#include "ops/attention/sm90_attention.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"
#include "ops/attention/attn_lists_sm90.h"
#include "ops/attention/sparse_attn_sm90.h"
#include "ops/cache/rows_sm90.h"
#include "ops/cache/sm90_rows.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

/// How the rows that a step meets lie: those of rings and blocks, and its own.
AttnRows format_of(const RingView& history) {
  return history.rows.defined() && history.format.packed() ? AttnRows::kPacked : AttnRows::kBf16;
}

/// Whether cached or pooled rows are of this width and format, one after the other.
bool has_rows(const at::Tensor& rows, const RowFormat& format, int64_t width, AttnRows wanted) {
  if (!rows.defined() || !rows.is_contiguous()) return false;
  if (wanted == AttnRows::kPacked) return format == packed_latent(width);
  return !format.packed() && rows.scalar_type() == at::kBFloat16 && rows.size(1) == width;
}

const uint8_t* row_data(const at::Tensor& rows) {
  return static_cast<const uint8_t*>(rows.const_data_ptr());
}

/// The window's rows: those of the rings, and this step's, in their format, a whole number of rows
/// away, so that one base address and one row number reach both. On the CPU, whose allocations may
/// lie too far apart, the rings are copied before them.
struct WindowRows {
  at::Tensor step;  ///< memory of the step's rows
  const uint8_t* base;
  int64_t ring_row = 0, step_row = -1;  ///< step_row negative: the rings hold the step's, too
  AttnRows format;

  WindowRows(const at::Tensor& kv_any, const RingView& history) : format(format_of(history)) {
    if (history.holds_step) {
      base = row_data(history.rows);
      return;
    }
    const bool packed = kv_any.scalar_type() == at::kByte;
    const at::Tensor kv = packed ? kv_any : kernel_input(kv_any.to(at::kBFloat16));
    step_row = 0;
    if (!history.rows.defined()) {
      step = kv;
      base = row_data(step);
      return;
    }
    if (kv.is_cpu()) {
      const at::Tensor own_rows =
          packed || format == AttnRows::kBf16 ? kv : pack_rows(kv, history.format);
      step = at::cat({history.rows, own_rows});
      base = row_data(step);
      step_row = history.rows.size(0);
      return;
    }
    step = packed ? kv : rows_in_step_with(history.rows, kv.size(0));
    place(row_data(history.rows), row_data(step), step.size(1) * step.element_size());
    HADAL_CHECK(ring_row + step_row + history.rows.size(0) + kv.size(0) < INT32_MAX,
                "sparse_attn: more than 2^31 rows of latents");
    if (packed) return;
    if (format == AttnRows::kBf16) {
      step.copy_(kv);
      return;
    }
    const int64_t width = kv.size(1);
    latent_rows_sm90({.x = bf16_data(kv),
                      .weight = nullptr,
                      .cos_sin = nullptr,
                      .place = nullptr,
                      .out = step.mutable_data_ptr<uint8_t>(),
                      .rows = kv.size(0),
                      .width = width,
                      .stride = width,
                      .eps = 0.0f},
                     current_stream(kv));
  }

 private:
  /// The one base address of both.
  void place(const uint8_t* ring_rows, const uint8_t* step_rows, int64_t row_bytes) {
    const auto ring = reinterpret_cast<uintptr_t>(ring_rows);
    const auto own = reinterpret_cast<uintptr_t>(step_rows);
    const auto bytes = static_cast<uintptr_t>(row_bytes);
    const bool behind = own > ring;
    const uintptr_t apart = behind ? own - ring : ring - own;
    HADAL_CHECK(apart % bytes == 0, "sparse_attn: rows of the step not in step with the ring's");
    base = behind ? ring_rows : step_rows;
    (behind ? step_row : ring_row) = static_cast<int64_t>(apart / bytes);
  }
};

/// A token's places (attn_lists_sm90.h).
struct Lists {
  at::Tensor window, blocks, num_blocks;

  Lists(const WindowRows& rows,
        const RingView& history,
        const BlockView& view,
        const at::Tensor& selection_any,
        const Batch& batch,
        const AttentionParams& params) {
    const bool compressed = params.ratio > 0;
    const at::Tensor selection =
        compressed && selection_any.defined() ? selection_any.contiguous() : at::Tensor();
    const int64_t tokens = batch.num_tokens();
    const int64_t places = !compressed           ? 0
                           : selection.defined() ? selection.size(1)
                                                 : batch.max_end_pos() / params.ratio;
    const auto ints = batch.seq().options().dtype(at::kInt);
    window = at::empty({tokens, attn_window_places(params.window)}, ints);
    blocks = at::empty({tokens, places}, ints);
    num_blocks = at::empty({tokens}, ints);
    run_sm90(window, attn_lists_sm90, attn_lists_twin,
             {.pos = batch.pos().const_data_ptr<int64_t>(),
              .seq = batch.seq().const_data_ptr<int64_t>(),
              .first_row = batch.device_cu_seqlens().const_data_ptr<int32_t>(),
              .ring = history.rows.defined() ? history.table() : RingRows{},
              .step_row = rows.step_row,
              .blocks = compressed ? view.table() : BlockRows{},
              .ratio = params.ratio,
              .selection = selection.defined() ? selection.const_data_ptr<int32_t>() : nullptr,
              .window_row = window.mutable_data_ptr<int32_t>(),
              .block_row = blocks.mutable_data_ptr<int32_t>(),
              .num_blocks = num_blocks.mutable_data_ptr<int32_t>(),
              .tokens = tokens,
              .window = params.window,
              .block_places = places,
              .ring_row = rows.ring_row});
  }
};

/// A step's caches as BF16 rows of its sequences alone, one behind the other.
struct WideCaches {
  RingView history;
  BlockView blocks;
  at::Tensor kv;
};

/// Latents [*, bytes] of the rows `numbers` I32, widened.
at::Tensor widen_rows(const at::Tensor& latents, const at::Tensor& numbers) {
  at::Tensor wide =
      at::empty({numbers.numel(), kLatentDim}, latents.options().dtype(at::kBFloat16));
  widen_latents_sm90({.latents = latents.const_data_ptr<uint8_t>(),
                      .row = numbers.const_data_ptr<int32_t>(),
                      .wide = mutable_bf16_data(wide),
                      .rows = numbers.numel()},
                     current_stream(latents));
  return wide;
}

/// Blocks of each sequence that the step can see, in whole pages.
int64_t pages_seen(const BlockView& blocks, const Batch& batch, int64_t ratio) {
  return std::min(ceil_div(batch.max_end_pos() / ratio, blocks.page_blocks), blocks.pages.size(1));
}

/// Whether many tokens read the same packed rows, so that widening each of them once pays: a
/// token's share of what it saves is worth some 60 rows. Which way is taken changes no bit.
bool widening_pays(const at::Tensor& q,
                   const RingView& history,
                   const BlockView& blocks,
                   const Batch& batch,
                   const AttentionParams& params) {
  constexpr int64_t kRowsOfAToken = 60, kFewestTokens = 256;
  const int64_t tokens = batch.num_tokens();
  if (q.is_cpu() || tokens < kFewestTokens || q.size(2) != kLatentDim || q.size(1) % 64 != 0 ||
      !history.rows.defined() || !history.format.packed() || history.holds_step) {
    return false;
  }
  int64_t rows = history.ring + tokens;
  if (params.ratio > 0) {
    if (blocks.page_blocks != blocks.page_rows) return false;
    rows += pages_seen(blocks, batch, params.ratio) * blocks.page_blocks;
  }
  return rows * batch.num_seqs() <= kRowsOfAToken * tokens;
}

WideCaches widen_caches(const at::Tensor& kv,
                        const RingView& history,
                        const BlockView& blocks,
                        const Batch& batch,
                        int64_t ratio) {
  const int64_t sequences = batch.num_seqs();
  const auto ints = history.slots.options().dtype(at::kInt);
  const at::Tensor numbers = at::arange(sequences, ints);
  const auto spread = [](const at::Tensor& firsts, int64_t each) {
    return (firsts.reshape({-1, 1}) + at::arange(each, firsts.options())).flatten().to(at::kInt);
  };
  WideCaches wide;
  wide.history = {
      .rows = widen_rows(history.rows, spread(history.slots * history.ring, history.ring)),
      .slots = numbers,
      .ring = history.ring};
  wide.kv = kv.scalar_type() == at::kByte ? widen_rows(kv, at::arange(kv.size(0), ints)) : kv;
  if (ratio == 0) return wide;
  const int64_t pages = pages_seen(blocks, batch, ratio), each = pages * blocks.page_blocks;
  const at::Tensor lines = blocks.pages.narrow(1, 0, pages).index_select(0, blocks.slots);
  wide.blocks = {
      .rows = widen_rows(blocks.rows, spread(lines * blocks.page_rows, blocks.page_blocks)),
      .slots = numbers,
      .pages = (numbers * each).unsqueeze(1)};
  return wide;
}

}  // namespace

bool serves_latents_sm90(const RowFormat& format) {
  return format.kind == RowKind::kLatent && format == packed_latent(format.width) &&
         serves_attn_width(format.width);
}

bool serves_attention_sm90(const at::Tensor& q,
                           const RingView& history,
                           const BlockView& blocks,
                           const AttentionParams& params) {
  const int64_t width = q.size(2);
  const AttnRows format = format_of(history);
  return rounds_probabilities(params.numerics) && serves_attn_width(width) &&
         (!history.rows.defined() || has_rows(history.rows, history.format, width, format)) &&
         (params.ratio == 0 || has_rows(blocks.rows, blocks.format, width, format)) && use_sm90(q);
}

void refuse_attention_as_hopper(const at::Tensor& q, const AttentionParams& params) {
  if (!as_hopper()) return;
  refuse_as_hopper(q, concat("sparse_attn of ", q.size(1), " heads of ", q.size(2), " in `",
                             numerics_name(params.numerics), "`"));
}

AttentionResult attention_on_sm90(const at::Tensor& q_any,
                                  const at::Tensor& kv,
                                  const RingView& history,
                                  const BlockView& blocks,
                                  const at::Tensor& selection,
                                  const at::Tensor& sink_any,
                                  const Batch& batch,
                                  const AttentionParams& params) {
  if (widening_pays(q_any, history, blocks, batch, params)) {
    const WideCaches wide = widen_caches(kv, history, blocks, batch, params.ratio);
    return attention_on_sm90(q_any, wide.kv, wide.history, wide.blocks, selection, sink_any, batch,
                             params);
  }
  const at::Tensor q = kernel_input(q_any), sink = fp32_input(sink_any);
  const WindowRows rows(kv, history);
  const Lists lists(rows, history, blocks, selection, batch, params);
  const at::Tensor out = at::empty_like(q);
  at::Tensor stats;
  if (params.lse) stats = at::empty({q.size(0), q.size(1), 2}, sink.options());
  SparseAttnSm90Params p{.q = bf16_data(q),
                         .sink = sink.const_data_ptr<float>(),
                         .window = rows.base,
                         .blocks = params.ratio > 0 ? row_data(blocks.rows) : rows.base,
                         .window_row = lists.window.const_data_ptr<int32_t>(),
                         .block_row = lists.blocks.const_data_ptr<int32_t>(),
                         .num_blocks = lists.num_blocks.const_data_ptr<int32_t>(),
                         .tokens = q.size(0),
                         .heads = q.size(1),
                         .window_places = lists.window.size(1),
                         .block_places = lists.blocks.size(1),
                         .scale = static_cast<float>(params.scale),
                         .out = mutable_bf16_data(out),
                         .stats = stats.defined() ? stats.mutable_data_ptr<float>() : nullptr,
                         .scratch = nullptr,
                         .wide_window = nullptr,
                         .wide_blocks = nullptr,
                         .width = q.size(2),
                         .format = rows.format};
  const at::Tensor scratch = at::empty({sparse_attn_scratch_floats(p)}, sink.options());
  p.scratch = scratch.mutable_data_ptr<float>();
  const auto kernel = [](const auto& task, Stream stream) { sparse_attn_sm90(task, stream); };
  run_sm90(q, kernel, sparse_attn_step_twin, p);
  AttentionResult result{.out = out, .lse = {}};
  if (params.lse) result.lse = stats.select(2, 0) + stats.select(2, 1).log();
  return result;
}

}  // namespace hadal::ops
