#include "ops/attention/sm90_attention.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/attention/attn_lists_sm90.h"
#include "ops/attention/sparse_attn_sm90.h"
#include "ops/cache/rows_sm90.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

bool is_packed_latent(const RowFormat& format) {
  return format.kind == RowKind::kLatent && format.width == kLatentDim &&
         format.rotary == kRotaryDim;
}

/// The window's rows: those of the rings, and this step's, packed, a whole number of rows away, so
/// that one base address and one row number reach both. On the CPU, whose allocations may lie too
/// far apart, the rings are copied before them.
struct WindowRows {
  at::Tensor step;  ///< memory of the step's rows
  const uint8_t* base;
  int64_t ring_row, step_row;

  WindowRows(const at::Tensor& kv_any, const RingView& history) {
    const at::Tensor kv = kernel_input(kv_any);
    if (kv.is_cpu()) {
      step = at::cat({history.rows, pack_rows(kv, history.format)});
      base = step.const_data_ptr<uint8_t>();
      ring_row = 0;
      step_row = history.rows.size(0);
      return;
    }
    step = at::empty({(kv.size(0) + 1) * kLatentRowBytes}, history.rows.options());
    const auto ring = reinterpret_cast<uintptr_t>(history.rows.const_data_ptr<uint8_t>());
    const auto own = reinterpret_cast<uintptr_t>(step.const_data_ptr<uint8_t>());
    constexpr auto kBytes = static_cast<uintptr_t>(kLatentRowBytes);
    const bool behind = own > ring;
    const uintptr_t skip =
        behind ? (kBytes - (own - ring) % kBytes) % kBytes : (ring - own) % kBytes;
    uint8_t* rows = step.mutable_data_ptr<uint8_t>() + skip;
    base = behind ? history.rows.const_data_ptr<uint8_t>() : rows;
    ring_row = behind ? 0 : static_cast<int64_t>((ring - own - skip) / kBytes);
    step_row = behind ? static_cast<int64_t>((own + skip - ring) / kBytes) : 0;
    HADAL_CHECK(ring_row + step_row + history.rows.size(0) + kv.size(0) < INT32_MAX,
                "sparse_attn: more than 2^31 rows of latents");
    latent_rows_sm90({.x = bf16_data(kv),
                      .weight = nullptr,
                      .cos_sin = nullptr,
                      .place = nullptr,
                      .out = rows,
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
    run_sm90(
        window, attn_lists_sm90, attn_lists_twin,
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
         .ring_row = rows.ring_row});
  }
};

}  // namespace

bool serves_attention_sm90(const at::Tensor& q,
                           const RingView& history,
                           const BlockView& blocks,
                           const AttentionParams& params) {
  return params.numerics == Numerics::kReleased && q.size(2) == kLatentDim && q.size(1) % 64 == 0 &&
         params.window % kAttnChunk == 0 && history.rows.defined() &&
         is_packed_latent(history.format) &&
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
  const at::Tensor stats = at::empty({q.size(0), q.size(1), 2}, sink.options());
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
      .stats = stats.mutable_data_ptr<float>(),
      .scratch = nullptr,
      .wide_window = nullptr,
      .wide_blocks = nullptr};
  const at::Tensor scratch = at::empty({sparse_attn_scratch_floats(p)}, sink.options());
  p.scratch = scratch.mutable_data_ptr<float>();
  const auto kernel = [](const auto& task, Stream stream) { sparse_attn_sm90(task, stream); };
  run_sm90(q, kernel, sparse_attn_step_twin, p);
  return {.out = out, .lse = stats.select(2, 0) + stats.select(2, 1).log()};
}

}  // namespace hadal::ops
