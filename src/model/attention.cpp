#include "model/attention.h"

#include <array>
#include <cmath>
#include <optional>
#include <utility>

#include <ATen/ATen.h>

#include "model/part_ops.h"
#include "ops/attention/heads.h"
#include "ops/attention/sm90_attention.h"
#include "ops/attention/sparse_attn.h"
#include "ops/cache/sm90_rows.h"
#include "ops/compressor/compress.h"
#include "ops/gemm/normalised_input.h"
#include "ops/indexer/hadamard.h"
#include "ops/indexer/index_kl.h"
#include "ops/indexer/index_scores.h"
#include "ops/indexer/index_topk.h"
#include "ops/indexer/sm90_index.h"
#include "ops/norm/rms_norm.h"
#include "ops/quant/round_trip.h"
#include "ops/recorded_graph.h"
#include "ops/sm90.h"
#include "ops/tape.h"

namespace hadal::model {
namespace {

using ops::checkpointed;
using ops::Numerics;
using ops::recorded;

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

/// The same places of other rows.
ops::BlockView with_rows(ops::BlockView view, at::Tensor rows) {
  view.rows = std::move(rows);
  return view;
}

struct CompressorRings {
  RingKind kv, score;
  BlockKind blocks;
};
constexpr CompressorRings kMainRings{RingKind::kKv, RingKind::kScore, BlockKind::kCompressed};
constexpr CompressorRings kIndexRings{RingKind::kIndexKv, RingKind::kIndexScore,
                                      BlockKind::kIndexKeys};

/// Products of a compressor with this step's tokens.
struct CompressorProducts {
  at::Tensor kv, gate;
};

/// Norm, rotation and round trip of pooled rows.
at::Tensor finished_rows(const at::Tensor& pooled,
                         const at::Tensor& weight,
                         const at::Tensor& cos_sin,
                         const CompressorRings& rings,
                         const ModelConfig& config,
                         at::ScalarType type,
                         Numerics numerics,
                         const at::Tensor& places = {}) {
  const at::Tensor rows =
      ops::rope(ops::rms_norm(pooled.to(type), weight, config.norm_eps, places), cos_sin);
  return rings.blocks == BlockKind::kIndexKeys
             ? quantise_index(rows, numerics)
             : quantise_latent(rows, config.rope_head_dim, numerics);
}

/// Pooled rows of the blocks that end in this rank's part of a row.
at::Tensor pool_part(const CompressorProducts& products,
                     const at::Tensor& ape,
                     int64_t ratio,
                     const RowPart& part) {
  const HaloRows kv = exchange_halo(products.kv, part), gate = exchange_halo(products.gate, part);
  const auto pool = [kv_ring = kv.past, gate_ring = gate.past, &part, ratio](
                        const at::Tensor& kv_own, const at::Tensor& gate_own,
                        const at::Tensor& bias, const at::Tensor& kv_past,
                        const at::Tensor& gate_past) {
    ops::RingView old_kv = kv_ring, old_gate = gate_ring;
    old_kv.rows = kv_past;
    old_gate.rows = gate_past;
    return ops::compress_part(kv_own, gate_own, bias, old_kv, old_gate, part.batch(), ratio);
  };
  return checkpointed(
      recorded("pooled", pool, kv.own, gate.own, ape, kv.past.rows, gate.past.rows));
}

/// Blocks of whole samples, or of the parts of them that are here and before.
ops::BlockView compress_samples(const Compressor& compressor,
                                const CompressorRings& rings,
                                const ModelConfig& config,
                                int64_t ratio,
                                const CompressorProducts& products,
                                at::ScalarType type,
                                const at::Tensor& cos_sin,
                                const ForwardContext& context) {
  const ops::Batch& batch = *context.batch;
  const auto pool = [&batch, ratio, numerics = context.numerics](
                        const at::Tensor& kv, const at::Tensor& gate, const at::Tensor& ape) {
    return ops::compress(kv, gate, ape, {}, {}, batch, ratio, numerics).pooled;
  };
  const at::Tensor pooled = context.part != nullptr
                                ? pool_part(products, compressor.ape.value, ratio, *context.part)
                                : checkpointed(recorded("pooled", pool, products.kv, products.gate,
                                                        compressor.ape.value));
  const at::Tensor places = pooled.is_cpu() ? batch.block_places(ratio) : at::Tensor();
  const auto finish = [type, rings, &config, numerics = context.numerics, places](
                          const at::Tensor& x, const at::Tensor& weight, const at::Tensor& angles) {
    return finished_rows(x, weight, angles, rings, config, type, numerics, places);
  };
  const at::Tensor rows = checkpointed(
      recorded("block rows", finish, pooled, compressor.norm.values_in(context.numerics), cos_sin));
  return context.part != nullptr ? gather_blocks(rows, ratio, *context.part)
                                 : ops::step_blocks(rows, batch, ratio);
}

/// Compresses this step's tokens and returns every visible block of the batch.
ops::BlockView compress_step(const Compressor& compressor,
                             const CompressorRings& rings,
                             const ModelConfig& config,
                             int64_t block,
                             const CompressorProducts& products,
                             at::ScalarType type,
                             const ops::RopeTable& rope_table,
                             const ForwardContext& context) {
  const ops::Batch& batch = *context.batch;
  const int64_t ratio = config.ratio(block);
  const auto& [kv, gate] = products;
  const ops::BlockPlan& plan = batch.blocks(ratio);
  // A step that completes no block, as most decode steps, has nothing to compute here.
  const bool any = plan.num_blocks() > 0 || context.kv == nullptr;
  // The same for every layer of this ratio.
  const auto kept = context.rope_blocks.find(ratio);
  const at::Tensor cos_sin = !any ? at::Tensor()
                             : kept != context.rope_blocks.end()
                                 ? kept->second
                                 : rope_table.cos_sin(plan.pos, plan.max_pos);
  if (context.kv == nullptr)
    return compress_samples(compressor, rings, config, ratio, products, type, cos_sin, context);
  const ops::RingView kv_history = context.kv->ring(block, rings.kv),
                      score_history = context.kv->ring(block, rings.score);
  // Where a kernel keeps the rings' rows itself, nobody needs the scores of all tokens.
  const ops::RingWrites* places = context.kv->ring_places(block, rings.kv);
  const bool keeps = places != nullptr &&
                     ops::serves_keep_rows_sm90(kv, kv_history, score_history, context.numerics);
  const ops::Compressed result =
      ops::compress(kv, gate, compressor.ape.value, kv_history, score_history, batch, ratio,
                    context.numerics, /*scores=*/!keeps);
  KvAccess::BlockPlaces blocks = context.kv->block_places(block, rings.blocks);
  if (any && blocks.view.rows.defined() &&
      ops::serves_cache_rows_sm90(result.pooled, cos_sin, blocks.view.format)) {
    if (blocks.numbers.defined())
      ops::cache_rows_sm90({.x = result.pooled,
                            .weight = compressor.norm.values_in(context.numerics),
                            .eps = config.norm_eps,
                            .cos_sin = cos_sin},
                           blocks.view.format, blocks.numbers, blocks.view.rows);
  } else {
    at::Tensor rows = result.pooled;
    if (any) {
      rows = finished_rows(rows, compressor.norm.values_in(context.numerics), cos_sin, rings,
                           config, type, context.numerics);
    }
    blocks.view = context.kv->append_blocks(block, rings.blocks, rows);
  }
  if (keeps) {
    ops::keep_rows_on_sm90(kv, gate, compressor.ape.value, kv_history, score_history, batch, ratio,
                           *places);
  } else {
    context.kv->commit(block, rings.kv, kv);
    context.kv->commit(block, rings.score, result.score);
  }
  return blocks.view;
}

/// What came along with attention's products; what is not there the indexer makes itself.
struct IndexerInputs {
  std::optional<ops::BlockView> keys;
  at::Tensor q;        ///< [tokens, heads * dim]
  at::Tensor weights;  ///< [tokens, heads], scaled where `keys` are there
};

double index_factor(const ModelConfig& config) {
  return std::pow(static_cast<double>(config.index_head_dim), -0.5) *
         std::pow(static_cast<double>(config.index_n_heads), -0.5);
}

/// Whether a step needs the indexer's scores: to choose blocks, or because somebody asks.
struct IndexerTask {
  bool selects = false, scores = false;
  bool any() const { return selects || scores; }

  IndexerTask(const ModelConfig& config, int64_t block, const ForwardContext& context)
      : selects(!context.forced_of(block).selection.defined() &&
                context.mode == AttentionMode::kSparse &&
                context.batch->max_end_pos() / config.ratio(block) > config.index_topk),
        scores(context.request.index_loss || context.request.index_scores) {}
};

/// A step's compressed blocks, and what the indexer needs of a step beside its queries.
struct CompressedStep {
  ops::BlockView blocks;
  IndexerInputs index;
};

/// In a cache the indexer's products come along with attention's, `asks`: its weights, too. Where
/// there is none the indexer makes them, without gradients.
CompressedStep make_compressed(const Attention& attn,
                               const ModelConfig& config,
                               int64_t block,
                               const ops::ProductInput& input,
                               bool asks,
                               const ops::RopeTable& rope_table,
                               const ForwardContext& context,
                               ops::SideBranch& blocks_beside) {
  const bool with_index = attn.indexer && context.kv != nullptr;
  std::vector<const Parameter*> weights = {&attn.compressor->wkv, &attn.compressor->wgate};
  if (with_index) {
    weights.push_back(&attn.indexer->compressor.wkv);
    weights.push_back(&attn.indexer->compressor.wgate);
    if (asks) weights.push_back(&attn.indexer->weights_proj);
  }
  const auto products = apply_linears(weights, input);
  const at::ScalarType type = input.x().scalar_type();
  CompressedStep made;
  // The indexer's scores wait for its keys, and attention for the blocks: two branches.
  blocks_beside.run([&] {
    made.blocks =
        compress_step(*attn.compressor, kMainRings, config, block,
                      {.kv = products[0], .gate = products[1]}, type, rope_table, context);
  });
  if (with_index) {
    // BF16 times a number is FP32 within, rounded once.
    if (asks) made.index.weights = products[4].mul(index_factor(config));
    made.index.keys =
        compress_step(attn.indexer->compressor, kIndexRings, config, block,
                      {.kv = products[2], .gate = products[3]}, type, rope_table, context);
  }
  return made;
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
                        const ops::ProductInput& x,
                        const ops::ProductInput& q_rank,
                        IndexerInputs inputs,
                        const IndexerTask& task,
                        const ops::RopeTable& rope_table,
                        const ForwardContext& context) {
  const ops::Batch& batch = *context.batch;
  const int64_t tokens = batch.num_tokens(), ratio = config.ratio(block);
  IndexerStep step{.scores = {}, .selection = context.forced_of(block).selection};
  if (!task.any() && context.kv == nullptr) return step;
  if (!inputs.keys) {
    const auto made = apply_linears({&indexer.compressor.wkv, &indexer.compressor.wgate}, x);
    inputs.keys =
        compress_step(indexer.compressor, kIndexRings, config, block,
                      {.kv = made[0], .gate = made[1]}, x.x().scalar_type(), rope_table, context);
  }
  const ops::BlockView& keys = *inputs.keys;
  if (!task.any()) return step;
  if (!inputs.q.defined()) inputs.q = apply_linear(indexer.wq_b, q_rank);
  at::Tensor q = inputs.q.reshape({tokens, config.index_n_heads, config.index_head_dim});
  if (!inputs.weights.defined()) {
    const at::Tensor projected = apply_linear(indexer.weights_proj, x);
    inputs.weights =
        (ops::to_compute(projected) * index_factor(config)).to(projected.scalar_type());
  }
  const at::Tensor& weights = inputs.weights;
  if (!task.scores && ops::serves_index_sm90(q, weights, keys, context.numerics) &&
      ops::serves_cache_rows_sm90(q, context.rope_compressed, keys.format)) {
    step.selection =
        ops::index_topk_on_sm90(ops::index_queries_sm90(q, context.rope_compressed), weights, keys,
                                batch, ratio, config.index_topk, context.numerics);
    return step;
  }
  const auto rotate = [numerics = context.numerics](const at::Tensor& in,
                                                    const at::Tensor& angles) {
    return quantise_index(ops::rope(in, angles), numerics);
  };
  q = checkpointed(recorded("index queries", rotate, q, context.rope_compressed));
  if (task.scores) {
    const auto score = [keys = with_rows(keys, {}), &batch, ratio, numerics = context.numerics](
                           const at::Tensor& in, const at::Tensor& w, const at::Tensor& rows) {
      return ops::index_scores(in, w, with_rows(keys, rows), batch, ratio, numerics);
    };
    step.scores = checkpointed(recorded("index scores", score, q, weights, keys.rows));
    if (task.selects) {
      step.selection = ops::select_topk(step.scores.detach(), batch, ratio, config.index_topk);
    }
  } else {
    step.selection =
        ops::index_topk(q, weights, keys, batch, ratio, config.index_topk, context.numerics);
  }
  return step;
}

/// This step's latents of the window, and the ring as attention is to read it.
struct WindowRows {
  at::Tensor kv;  ///< [tokens, head_dim]; or packed; undefined where the ring holds them already
  ops::RingView history;
};

WindowRows make_window(const Attention& attn,
                       const ModelConfig& config,
                       int64_t block,
                       const at::Tensor& product,
                       const at::Tensor& cos_sin,
                       const ForwardContext& context) {
  WindowRows window;
  const ops::RingWrites* places = nullptr;
  if (context.kv != nullptr) {
    window.history = context.kv->ring(block, RingKind::kWindow);
    places = context.kv->ring_places(block, RingKind::kWindow);
  }
  const ops::RowFormat& format = window.history.format;
  if (places != nullptr && ops::serves_latents_sm90(format) &&
      ops::serves_cache_rows_sm90(product, cos_sin, format)) {
    const ops::CacheRows rows{.x = product,
                              .weight = attn.kv_norm.values_in(context.numerics),
                              .eps = config.norm_eps,
                              .cos_sin = cos_sin};
    // Few tokens overwrite nothing that the first of them still sees.
    const ops::Batch& batch = *context.batch;
    if (batch.max_length() + config.window_size - 1 <= window.history.ring) {
      ops::cache_rows_sm90(rows, format, places->to, window.history.rows);
      window.history.holds_step = true;
    } else {
      window.kv = ops::rows_in_step_with(window.history.rows, batch.num_tokens());
      ops::cache_rows_sm90(rows, format, at::Tensor(), window.kv);
    }
    return window;
  }
  window.kv = window_latents(attn, config, product, cos_sin, context.numerics);
  if (context.part != nullptr) {
    HaloRows rows = exchange_halo(window.kv, *context.part);
    window = {.kv = std::move(rows.own), .history = std::move(rows.past)};
  }
  return window;
}

/// product [tokens, heads * head_dim], normalised and rotated: [tokens, heads, head_dim].
at::Tensor make_heads(const at::Tensor& product,
                      const ModelConfig& config,
                      const at::Tensor& cos_sin,
                      Numerics numerics) {
  const auto make = [numerics, eps = config.norm_eps](const at::Tensor& x,
                                                      const at::Tensor& angles) {
    return ops::norm_rotate_heads(x, eps, numerics, angles);
  };
  const at::Tensor heads = product.reshape({product.size(0), config.n_heads, config.head_dim});
  return checkpointed(recorded("heads", make, heads, cos_sin));
}

ops::AttentionResult attend(const at::Tensor& q,
                            const WindowRows& window,
                            const ops::BlockView& blocks,
                            const at::Tensor& selection,
                            const at::Tensor& sink,
                            const ops::Batch& batch,
                            const ops::AttentionParams& params) {
  const auto run = [history = window.history, seen = with_rows(blocks, {}), &batch, params](
                       const at::Tensor& queries, const at::Tensor& kv, const at::Tensor& rows,
                       const at::Tensor& chosen, const at::Tensor& drain) {
    ops::AttentionResult made =
        ops::sparse_attn(queries, kv, history, with_rows(seen, rows), chosen, drain, batch, params);
    return std::array{std::move(made.out), std::move(made.lse)};
  };
  auto [out, lse] = recorded("attention", run, q, window.kv, blocks.rows, selection, sink);
  return {.out = checkpointed(std::move(out)), .lse = std::move(lse)};
}

}  // namespace

at::Tensor window_latents(const Attention& attn,
                          const ModelConfig& config,
                          const at::Tensor& product,
                          const at::Tensor& cos_sin,
                          Numerics numerics) {
  const auto make = [&config, numerics](const at::Tensor& x, const at::Tensor& weight,
                                        const at::Tensor& angles) {
    const at::Tensor rows = ops::rope(ops::rms_norm(x, weight, config.norm_eps), angles);
    return quantise_latent(rows, config.rope_head_dim, numerics);
  };
  return checkpointed(recorded("window", make, product, attn.kv_norm.values_in(numerics), cos_sin));
}

void keep_window_latents(const Attention& attn,
                         const ModelConfig& config,
                         int64_t block,
                         const at::Tensor& product,
                         const at::Tensor& cos_sin,
                         const ForwardContext& context) {
  const WindowRows window = make_window(attn, config, block, product, cos_sin, context);
  if (!window.history.holds_step) context.kv->commit(block, RingKind::kWindow, window.kv);
}

AttentionOutput attention_forward(const Attention& attn,
                                  const ModelConfig& config,
                                  int64_t block,
                                  const ops::ProductInput& input,
                                  const ops::RopeTable& compressed_rope,
                                  const ForwardContext& context) {
  const ops::Batch& batch = *context.batch;
  const Numerics numerics = context.numerics;
  const int64_t ratio = config.ratio(block);
  const at::Tensor& cos_sin = ratio > 0 ? context.rope_compressed : context.rope_window;

  const bool asks =
      attn.indexer && context.kv != nullptr && IndexerTask(config, block, context).any();
  // Nothing of this step's keys waits for its queries.
  CompressedStep cached;
  ops::SideBranch beside(0), blocks_beside(1), rows_beside(2);
  if (attn.compressor) {
    make_operands({&attn.wq_a, &attn.compressor->wkv}, input);
    beside.run([&] {
      cached = make_compressed(attn, config, block, input, asks, compressed_rope, context,
                               blocks_beside);
    });
  }
  const auto low_rank = apply_linears({&attn.wq_a, &attn.wkv}, input);
  WindowRows window;
  rows_beside.run(
      [&] { window = make_window(attn, config, block, low_rank[1], cos_sin, context); });
  const ops::ProductInput q_rank = ops::normalised_input(
      low_rank[0], attn.q_norm.values_in(numerics), config.norm_eps, numerics, {.bf16 = false});
  std::vector<const Parameter*> of_q = {&attn.wq_b};
  if (asks) of_q.push_back(&attn.indexer->wq_b);
  const auto queries = apply_linears(of_q, q_rank);
  if (asks) cached.index.q = queries[1];
  // The indexer's queries, where there are some, go first.
  at::Tensor q;
  rows_beside.run([&] { q = make_heads(queries[0], config, cos_sin, numerics); });
  beside.join();
  IndexerStep indexed;
  // In a cache the indexer's keys must exist whatever the mode, so that a later step may select.
  if (attn.indexer && (context.mode != AttentionMode::kDense || context.kv != nullptr)) {
    indexed = run_indexer(*attn.indexer, config, block, input.detach(), q_rank.detach(),
                          std::move(cached.index), IndexerTask(config, block, context),
                          compressed_rope, context);
  }
  blocks_beside.join();
  rows_beside.join();
  const double scale = std::pow(static_cast<double>(config.head_dim), -0.5);
  const ops::AttentionResult result =
      attend(q, window, cached.blocks, indexed.selection, attn.attn_sink.value, batch,
             {.window = config.window_size,
              .scale = scale,
              .ratio = ratio,
              .numerics = numerics,
              .lse = context.request.index_loss || context.request.attention});
  AttentionAux aux;
  if (context.request.selection) aux.selection = indexed.selection;
  if (context.request.index_scores && indexed.scores.defined())
    aux.index_scores = indexed.scores.detach();
  if (context.request.index_loss && indexed.scores.defined()) {
    aux.index_loss = ops::index_kl(indexed.scores, indexed.selection, q.detach(), cached.blocks,
                                   result.lse.detach(), batch, ratio, scale);
  }
  if (context.request.attention) {
    aux.seen = {.q = q.detach(), .blocks = cached.blocks, .lse = result.lse.detach()};
    if (cached.blocks.rows.defined()) aux.seen.blocks.rows = cached.blocks.rows.detach();
  }
  if (context.kv != nullptr && !window.history.holds_step)
    context.kv->commit(block, RingKind::kWindow, window.kv);

  const at::Tensor grouped = apply_groups(attn.wo_a, result.out, cos_sin, numerics);
  return {.out = apply_linear(attn.wo_b, ops::ProductInput(grouped.flatten(1), numerics)),
          .aux = std::move(aux)};
}

}  // namespace hadal::model
