#include "model/drafter.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <ATen/ATen.h>

#include "base/check.h"
#include "model/attention.h"
#include "ops/attention/heads.h"
#include "ops/attention/sparse_attn.h"
#include "ops/gemm/normalised_input.h"
#include "ops/op.h"
#include "ops/rows/embedding.h"

namespace hadal::model {
namespace {

using ops::Numerics;

/// Attention of every block over its list. `cached` are the context's rows of all sequences.
at::Tensor list_attention(const Attention& attn,
                          const ModelConfig& config,
                          const DraftPlan& plan,
                          const ops::ProductInput& x,
                          const at::Tensor& cached,
                          Numerics numerics,
                          DraftTrace* trace) {
  const auto low_rank = apply_linears({&attn.wq_a, &attn.wkv}, x);
  const ops::ProductInput q_rank = ops::normalised_input(
      low_rank[0], attn.q_norm.values_in(numerics), config.norm_eps, numerics, {.bf16 = false});
  const at::Tensor product = apply_linear(attn.wq_b, q_rank);
  const at::Tensor q =
      ops::norm_rotate_heads(product.reshape({product.size(0), config.n_heads, config.head_dim}),
                             config.norm_eps, numerics, plan.cos_sin);
  const at::Tensor kv = window_latents(attn, config, low_rank[1], plan.cos_sin, numerics);
  const at::Tensor rows = at::cat({cached.to(kv.scalar_type()), kv}).index_select(0, plan.list);
  const ops::AttentionResult result =
      ops::sparse_attn(q, kv, {}, ops::BlockView::consecutive(rows, plan.first_rows), at::Tensor(),
                       attn.attn_sink.value, plan.batch,
                       {.window = 0,
                        .scale = std::pow(static_cast<double>(config.head_dim), -0.5),
                        .ratio = plan.list_ratio,
                        .numerics = numerics,
                        .lse = false});
  const at::Tensor grouped = apply_groups(attn.wo_a, result.out, plan.cos_sin, numerics);
  at::Tensor out = apply_linear(attn.wo_b, ops::ProductInput(grouped.flatten(1), numerics));
  if (trace != nullptr) {
    trace->block_kv.push_back(kv);
    trace->attn_out.push_back(out);
  }
  return out;
}

}  // namespace

at::Tensor stream_mean(const at::Tensor& streams) {
  return ops::to_compute(streams).mean(1).to(streams.scalar_type());
}

ops::ProductInput draft_input(const Drafter& drafter,
                              const ModelConfig& config,
                              const at::Tensor& target_means,
                              Numerics numerics) {
  HADAL_CHECK(!drafter.stages.empty(), "drafter: this model has none");
  const DrafterStage& first = drafter.stages.front();
  const at::Tensor projected =
      apply_linear(first.main_proj, ops::ProductInput(target_means, numerics));
  return ops::normalised_input(projected, first.main_norm.values_in(numerics), config.norm_eps,
                               numerics, {.bf16 = false});
}

DraftPlan plan_draft(const DraftBlocks& blocks,
                     const ModelConfig& config,
                     const ops::RopeTable& window_rope) {
  const auto seqs = std::ssize(blocks.anchors);
  HADAL_CHECK(config.drafter.exists() && seqs > 0 && std::ssize(blocks.starts) == seqs &&
                  std::ssize(blocks.context) == config.drafter.n_stages,
              "drafter: blocks of ", seqs, " sequences, context of ", blocks.context.size(),
              " stages");
  const int64_t block = config.drafter.block_size;
  std::vector<int64_t> ids, pos, list, first_rows, lengths, starts;
  int64_t cached = 0;
  for (const int64_t start : blocks.starts) cached += std::min(config.window_size, start);
  for (const at::Tensor& rows : blocks.context)
    ops::check_shape(rows, {cached, config.head_dim}, "drafter: rows of the context");
  int64_t context_row = 0;
  for (int64_t s = 0; s < seqs; ++s) {
    const int64_t start = blocks.starts[static_cast<size_t>(s)];
    HADAL_CHECK(start >= 1, "drafter: nothing stands before an anchor at position ", start);
    const int64_t count = std::min(config.window_size, start);
    first_rows.push_back(std::ssize(list));
    for (int64_t i = 0; i < count; ++i) list.push_back(context_row++);
    for (int64_t i = 0; i < block; ++i) {
      ids.push_back(i == 0 ? blocks.anchors[static_cast<size_t>(s)]
                           : config.drafter.noise_token_id);
      pos.push_back(start + i);
      list.push_back(cached + s * block + i);
    }
    // Compressed blocks of `block` tokens each in front of a step of `block`: every token of the
    // step sees all of them and no more.
    lengths.push_back(block);
    starts.push_back((count + block) * block - 1);
  }
  const at::Device device = blocks.context.front().device();
  const auto upload = [&](const std::vector<int64_t>& numbers) {
    return at::tensor(numbers, at::kLong).to(device);
  };
  return {.ids = upload(ids),
          .cos_sin = window_rope.cos_sin(upload(pos), *std::ranges::max_element(pos)),
          .list = upload(list),
          .batch = ops::Batch(lengths, starts, device),
          .list_ratio = block,
          .first_rows = std::move(first_rows)};
}

at::Tensor draft_hidden(const Drafter& drafter,
                        const ModelConfig& config,
                        const DraftPlan& plan,
                        at::Tensor streams,
                        const DraftBlocks& blocks,
                        Numerics numerics,
                        DraftTrace* trace) {
  ForwardContext context;
  context.numerics = numerics;
  for (size_t stage = 0; stage < drafter.stages.size(); ++stage) {
    const Block& block = drafter.stages[stage].block;
    const auto attend = [&](const ops::ProductInput& x) -> AttentionOutput {
      return {.out = list_attention(block.attn, config, plan, x, blocks.context[stage], numerics,
                                    trace),
              .aux = {}};
    };
    streams = block_around(block, config, config.n_layers + static_cast<int64_t>(stage),
                           std::move(streams), plan.ids, context, attend)
                  .streams;
    if (trace != nullptr) trace->out.push_back(streams);
  }
  const HyperConnection& head = drafter.stages.back().hc_head;
  return ops::hc_head(streams, head.fn.value, head.base.value, head.scale.value, hc_params(config));
}

DraftScores draft_scores(const Drafter& drafter,
                         const DraftedBlocks& blocks,
                         const at::Tensor& rows,
                         const at::Tensor& previous,
                         Numerics numerics) {
  const DrafterStage& last = drafter.stages.back();
  const at::Tensor e =
      ops::embedding(previous, last.markov_w1.operand(numerics), last.markov_w1.value);
  const at::Tensor hidden = blocks.hidden.index_select(0, rows);
  return {
      .logits = blocks.logits.index_select(0, rows) + apply_linear(last.markov_w2, e, numerics),
      .confidence = apply_linear(last.confidence, at::cat({hidden, e}, 1), numerics).squeeze(1)};
}

}  // namespace hadal::model
