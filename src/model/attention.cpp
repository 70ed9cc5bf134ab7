#include "model/attention.h"

#include <cmath>
#include <utility>

#include <ATen/ATen.h>

#include "ops/attention/sparse_attn.h"
#include "ops/compressor/compress.h"
#include "ops/indexer/hadamard.h"
#include "ops/indexer/index_kl.h"
#include "ops/indexer/index_scores.h"
#include "ops/indexer/index_topk.h"
#include "ops/norm/rms_norm.h"
#include "ops/quant/round_trip.h"

namespace hadal::model {
namespace {

using ops::GemmRole;
using ops::Numerics;

/// The FP8 round trip of a latent: all but its rotary channels, groups of 64 (model.md 6).
at::Tensor quantise_latent(const at::Tensor& latent, int64_t rope_head_dim, Numerics numerics) {
  if (numerics != Numerics::kReleased) return latent;
  return ops::fp8_round_trip_leading(latent, latent.size(-1) - rope_head_dim, 64);
}

/// Rotation and FP4 round trip of indexer queries and keys; the orthonormal rotation stays in every
/// numerics.
at::Tensor quantise_index(const at::Tensor& x, Numerics numerics) {
  const at::Tensor rotated = ops::hadamard(x);
  return numerics == Numerics::kReleased ? ops::fp4_round_trip(rotated, 32) : rotated;
}

struct CompressorRings {
  RingKind kv, score;
  BlockKind blocks;
};
constexpr CompressorRings kMainRings{RingKind::kKv, RingKind::kScore, BlockKind::kCompressed};
constexpr CompressorRings kIndexRings{RingKind::kIndexKv, RingKind::kIndexScore,
                                      BlockKind::kIndexKeys};

/// Compresses this step's tokens and returns every visible block of the batch.
ops::BlockView compress_step(const Compressor& compressor,
                             const CompressorRings& rings,
                             const ModelConfig& config,
                             int64_t block,
                             const at::Tensor& x,
                             const ops::RopeTable& rope_table,
                             const ForwardContext& context) {
  const ops::Batch& batch = *context.batch;
  const int64_t ratio = config.ratio(block);
  const at::Tensor kv = apply_linear(compressor.wkv, x, context.numerics);
  const at::Tensor gate = apply_linear(compressor.wgate, x, context.numerics);
  ops::RingView kv_history, score_history;
  if (context.kv != nullptr) {
    kv_history = context.kv->ring(block, rings.kv);
    score_history = context.kv->ring(block, rings.score);
  }
  const ops::Compressed result = ops::compress(kv, gate, compressor.ape.value, kv_history,
                                               score_history, batch, ratio, context.numerics);
  const ops::BlockPlan& plan = batch.blocks(ratio);
  at::Tensor rows = result.pooled;
  // A step that completes no block, as most decode steps, has nothing to compute here.
  if (plan.num_blocks() > 0 || context.kv == nullptr) {
    rows = ops::rms_norm(rows.to(x.scalar_type()), compressor.norm.value, config.norm_eps);
    rows = ops::rope(rows, rope_table.cos_sin(plan.pos, plan.max_pos));
    rows = rings.blocks == BlockKind::kIndexKeys
               ? quantise_index(rows, context.numerics)
               : quantise_latent(rows, config.rope_head_dim, context.numerics);
  }
  if (context.kv == nullptr) return ops::step_blocks(rows, batch, ratio);
  const ops::BlockView view = context.kv->append_blocks(block, rings.blocks, rows);
  context.kv->commit(block, rings.kv, kv);
  context.kv->commit(block, rings.score, result.score);
  return view;
}

/// What the indexer says about a step.
struct IndexerStep {
  at::Tensor scores;     ///< [tokens, columns]; undefined when nobody needs them
  at::Tensor selection;  ///< [tokens, k]; undefined when every query takes every visible block
};

/// Inputs are detached: the indexer learns from its own loss alone, the rest of the model never
/// from it.
IndexerStep run_indexer(const Indexer& indexer,
                        const ModelConfig& config,
                        int64_t block,
                        const at::Tensor& x,
                        const at::Tensor& q_rank_rounded,
                        const ops::RopeTable& rope_table,
                        const ForwardContext& context) {
  const ops::Batch& batch = *context.batch;
  const int64_t tokens = batch.num_tokens(), ratio = config.ratio(block);
  IndexerStep step{.scores = {}, .selection = context.forced_of(block).selection};
  const bool selects = !step.selection.defined() && context.mode == AttentionMode::kSparse &&
                       batch.max_end_pos() / ratio > config.index_topk;
  const bool scores = context.request.index_loss || context.request.index_scores;
  const bool asked = selects || scores;
  if (!asked && context.kv == nullptr) return step;
  // In a cache the keys must exist, so that a later step may select.
  const ops::BlockView keys =
      compress_step(indexer.compressor, kIndexRings, config, block, x, rope_table, context);
  if (!asked) return step;
  at::Tensor q = apply_linear(indexer.wq_b, q_rank_rounded, context.numerics)
                     .reshape({tokens, config.index_n_heads, config.index_head_dim});
  q = quantise_index(ops::rope(q, context.rope_compressed), context.numerics);
  const double factor = std::pow(static_cast<double>(config.index_head_dim), -0.5) *
                        std::pow(static_cast<double>(config.index_n_heads), -0.5);
  const at::Tensor projected = apply_linear(indexer.weights_proj, x, context.numerics);
  const at::Tensor weights = (ops::to_compute(projected) * factor).to(projected.scalar_type());
  if (scores) {
    step.scores = ops::index_scores(q, weights, keys, batch, ratio, context.numerics);
    if (selects) {
      step.selection = ops::select_topk(step.scores.detach(), batch, ratio, config.index_topk);
    }
  } else {
    step.selection =
        ops::index_topk(q, weights, keys, batch, ratio, config.index_topk, context.numerics);
  }
  return step;
}

}  // namespace

AttentionOutput attention_forward(const Attention& attn,
                                  const ModelConfig& config,
                                  int64_t block,
                                  const at::Tensor& x,
                                  const ops::RopeTable& compressed_rope,
                                  const ForwardContext& context) {
  const ops::Batch& batch = *context.batch;
  const Numerics numerics = context.numerics;
  const int64_t tokens = batch.num_tokens();
  const int64_t ratio = config.ratio(block);
  const at::Tensor& cos_sin = ratio > 0 ? context.rope_compressed : context.rope_window;

  const at::Tensor x_rounded = ops::quantise_input(x, GemmRole::kFp8, numerics);
  const at::Tensor q_rank = ops::rms_norm(apply_linear(attn.wq_a, x_rounded, numerics),
                                          attn.q_norm.value, config.norm_eps);
  const at::Tensor q_rank_rounded = ops::quantise_input(q_rank, GemmRole::kFp8, numerics);
  at::Tensor q = apply_linear(attn.wq_b, q_rank_rounded, numerics)
                     .reshape({tokens, config.n_heads, config.head_dim});
  q = ops::rope(ops::head_norm(q, config.norm_eps, numerics), cos_sin);
  at::Tensor kv = ops::rms_norm(apply_linear(attn.wkv, x_rounded, numerics), attn.kv_norm.value,
                                config.norm_eps);
  kv = quantise_latent(ops::rope(kv, cos_sin), config.rope_head_dim,
                       numerics);  // [tokens, head_dim]

  ops::BlockView blocks;
  IndexerStep indexed;
  if (attn.compressor) {
    blocks =
        compress_step(*attn.compressor, kMainRings, config, block, x, compressed_rope, context);
  }
  // In a cache the indexer's keys must exist whatever the mode, so that a later step may select.
  if (attn.indexer && (context.mode != AttentionMode::kDense || context.kv != nullptr)) {
    indexed = run_indexer(*attn.indexer, config, block, x.detach(), q_rank_rounded.detach(),
                          compressed_rope, context);
  }
  const double scale = std::pow(static_cast<double>(config.head_dim), -0.5);
  const ops::RingView history =
      context.kv != nullptr ? context.kv->ring(block, RingKind::kWindow) : ops::RingView{};
  const ops::AttentionResult result = ops::sparse_attn(
      q, kv, history, blocks, indexed.selection, attn.attn_sink.value, batch,
      {.window = config.window_size, .scale = scale, .ratio = ratio, .numerics = numerics});
  AttentionAux aux;
  if (context.request.selection) aux.selection = indexed.selection;
  if (context.request.index_scores && indexed.scores.defined())
    aux.index_scores = indexed.scores.detach();
  if (context.request.index_loss && indexed.scores.defined()) {
    aux.index_loss = ops::index_kl(indexed.scores, indexed.selection, q.detach(), blocks,
                                   result.lse.detach(), batch, ratio, scale);
  }
  if (context.request.attention) {
    aux.seen = {.q = q.detach(), .blocks = blocks, .lse = result.lse.detach()};
    if (blocks.rows.defined()) aux.seen.blocks.rows = blocks.rows.detach();
  }
  if (context.kv != nullptr) context.kv->commit(block, RingKind::kWindow, kv);

  const at::Tensor out = ops::rope(result.out, cos_sin, /*inverse=*/true);
  const int64_t group_width = config.heads_per_group() * config.head_dim;
  const at::Tensor grouped =
      apply_groups(attn.wo_a, out.reshape({tokens, config.o_groups, group_width}), numerics);
  return {
      .out = apply_linear(
          attn.wo_b, ops::quantise_input(grouped.flatten(1), GemmRole::kFp8, numerics), numerics),
      .aux = std::move(aux)};
}

}  // namespace hadal::model
