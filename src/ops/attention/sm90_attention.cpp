#include "ops/attention/sm90_attention.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/attention/attn_lists_sm90.h"
#include "ops/attention/sparse_attn_sm90.h"
#include "ops/cache/rows_sm90.h"
#include "ops/cache/sm90_rows.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

bool is_packed_latent(const RowFormat& format) {
  return format.kind == RowKind::kLatent && format.width == kLatentDim &&
         format.rotary == kRotaryDim;
}

/// The window's rows: those of the rings, and this step's, packed, a whole number of rows away, so
/// that one base address and one row number reach both.
struct WindowRows {
  at::Tensor step;  ///< memory of the step's rows
  const uint8_t* base;
  int64_t ring_row = 0, step_row = -1;  ///< step_row negative: the rings hold the step's, too

  WindowRows(const at::Tensor& kv_any, const RingView& history)
      : base(history.rows.const_data_ptr<uint8_t>()) {
    if (history.holds_step) return;
    const bool packed = kv_any.scalar_type() == at::kByte;
    const at::Tensor kv = packed ? kv_any : kernel_input(kv_any);
    step = packed ? kv : rows_in_step_with(history.rows, kv.size(0));
    const auto ring = reinterpret_cast<uintptr_t>(base);
    const auto own = reinterpret_cast<uintptr_t>(step.const_data_ptr<uint8_t>());
    constexpr auto kBytes = static_cast<uintptr_t>(kLatentRowBytes);
    const bool behind = own > ring;
    const uintptr_t apart = behind ? own - ring : ring - own;
    HADAL_CHECK(apart % kBytes == 0, "sparse_attn: rows of the step not in step with the ring's");
    if (!behind) base = step.const_data_ptr<uint8_t>();
    (behind ? step_row : ring_row) = static_cast<int64_t>(apart / kBytes);
    if (!behind) step_row = 0;
    HADAL_CHECK(ring_row + step_row + history.rows.size(0) + kv.size(0) < INT32_MAX,
                "sparse_attn: more than 2^31 rows of latents");
    if (packed) return;
    latent_rows_sm90({.x = bf16_data(kv),
                      .weight = nullptr,
                      .cos_sin = nullptr,
                      .place = nullptr,
                      .out = step.mutable_data_ptr<uint8_t>(),
                      .rows = kv.size(0),
                      .width = kLatentDim,
                      .stride = kLatentDim,
                      .eps = 0.0f},
                     current_stream(kv));
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
    window = at::empty({tokens, params.window}, ints);
    blocks = at::empty({tokens, places}, ints);
    num_blocks = at::empty({tokens}, ints);
    attn_lists_sm90(
        {.pos = batch.pos().const_data_ptr<int64_t>(),
         .seq = batch.seq().const_data_ptr<int64_t>(),
         .first_row = batch.device_cu_seqlens().const_data_ptr<int32_t>(),
         .ring = history.table(),
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
         .ring_row = rows.ring_row},
        current_stream(window));
  }
};

}  // namespace

bool serves_latents_sm90(const RowFormat& format, int64_t heads, int64_t window) {
  return is_packed_latent(format) && heads % 64 == 0 && window % kAttnChunk == 0;
}

bool serves_attention_sm90(const at::Tensor& q,
                           const RingView& history,
                           const BlockView& blocks,
                           const AttentionParams& params) {
  return params.numerics == Numerics::kReleased && q.size(2) == kLatentDim &&
         history.rows.defined() && serves_latents_sm90(history.format, q.size(1), params.window) &&
         (params.ratio == 0 || is_packed_latent(blocks.format)) && use_sm90(q);
}

AttentionResult attention_on_sm90(const at::Tensor& q_any,
                                  const at::Tensor& kv,
                                  const RingView& history,
                                  const BlockView& blocks,
                                  const at::Tensor& selection,
                                  const at::Tensor& sink_any,
                                  const Batch& batch,
                                  const AttentionParams& params) {
  const at::Tensor q = kernel_input(q_any), sink = fp32_input(sink_any);
  const WindowRows rows(kv, history);
  const Lists lists(rows, history, blocks, selection, batch, params);
  const at::Tensor out = at::empty_like(q);
  at::Tensor stats;
  if (params.lse) stats = at::empty({q.size(0), q.size(1), 2}, sink.options());
  SparseAttnSm90Params p{
      .q = bf16_data(q),
      .sink = sink.const_data_ptr<float>(),
      .window = rows.base,
      .blocks = params.ratio > 0 ? blocks.rows.const_data_ptr<uint8_t>() : rows.base,
      .window_row = lists.window.const_data_ptr<int32_t>(),
      .block_row = lists.blocks.const_data_ptr<int32_t>(),
      .num_blocks = lists.num_blocks.const_data_ptr<int32_t>(),
      .tokens = q.size(0),
      .heads = q.size(1),
      .window_places = params.window,
      .block_places = lists.blocks.size(1),
      .scale = static_cast<float>(params.scale),
      .out = mutable_bf16_data(out),
      .stats = stats.defined() ? stats.mutable_data_ptr<float>() : nullptr,
      .scratch = nullptr,
      .wide_window = nullptr,
      .wide_blocks = nullptr};
  const at::Tensor scratch = at::empty({sparse_attn_scratch_floats(p)}, sink.options());
  p.scratch = scratch.mutable_data_ptr<float>();
  sparse_attn_sm90(p, current_stream(q));
  AttentionResult result{.out = out, .lse = {}};
  if (params.lse) result.lse = stats.select(2, 0) + stats.select(2, 1).log();
  return result;
}

}  // namespace hadal::ops
