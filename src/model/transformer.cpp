#include "model/transformer.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"
#include "model/recompute.h"
#include "ops/norm/rms_norm.h"
#include "ops/rows/embedding.h"
#include "ops/tape.h"

namespace hadal::model {
namespace {

ops::YarnParams yarn_params(const ModelConfig& config) {
  return {.factor = config.rope_factor,
          .beta_fast = config.beta_fast,
          .beta_slow = config.beta_slow,
          .original_seq_len = config.original_seq_len};
}

}  // namespace

Transformer::Transformer(ModelConfig config)
    : config_(std::move(config)),
      parameters_(declare(config_)),
      rope_window_(config_.rope_head_dim, config_.rope_theta, nullptr),
      rope_compressed_([this] {
        const ops::YarnParams yarn = yarn_params(config_);
        return ops::RopeTable(config_.rope_head_dim, config_.compress_rope_theta, &yarn);
      }()) {}

void Transformer::visit(const std::function<void(Parameter&)>& visitor) {
  struct Visit : FieldVisitor {
    explicit Visit(const std::function<void(Parameter&)>& f) : function(f) {}
    void field(Parameter& parameter, const Field&) override { function(parameter); }
    const std::function<void(Parameter&)>& function;
  };
  Visit visit(visitor);
  describe(config_, parameters_, visit);
}

void Transformer::visit(const std::function<void(const Parameter&)>& visitor) const {
  // Visiting does not change the model; the constness is given back to every parameter.
  const_cast<Transformer*>(this)->visit([&](Parameter& p) { visitor(p); });
}

void Transformer::fill_rope(ForwardContext& context) const {
  const ops::Batch& batch = *context.batch;
  const int64_t max_pos = batch.max_end_pos() - 1;
  context.rope_window = rope_window_.cos_sin(batch.pos(), max_pos);
  context.rope_compressed = rope_compressed_.cos_sin(batch.pos(), max_pos);
  context.rope_blocks.clear();
  for (const int64_t ratio : config_.compress_ratios) {
    if (ratio == 0 || context.rope_blocks.contains(ratio)) continue;
    const ops::BlockPlan& plan = batch.blocks(ratio);
    if (plan.num_blocks() > 0)
      context.rope_blocks[ratio] = rope_compressed_.cos_sin(plan.pos, plan.max_pos);
  }
}

void Transformer::ensure_rope(ForwardContext& context) const {
  if (!context.rope_window.defined()) fill_rope(context);
  ops::check_shape(context.rope_window, {context.batch->num_tokens(), -1, -1},
                   "transformer: rope_window of the context");
}

at::Tensor Transformer::embed(const at::Tensor& ids, ops::Numerics numerics) const {
  const auto make = [this, numerics](const at::Tensor& tokens, const at::Tensor& master) {
    return ops::embedding(tokens, parameters_.embed.operand(numerics), master)
        .unsqueeze(1)
        .expand({tokens.size(0), config_.hc_mult, config_.dim})
        .contiguous();
  };
  return ops::checkpointed(ops::recorded("streams", make, ids, parameters_.embed.value));
}

at::Tensor Transformer::embedding_rows(const at::Tensor& ids,
                                       ops::Numerics numerics,
                                       const at::Tensor& master) const {
  return ops::embedding(ids, parameters_.embed.operand(numerics),
                        master.defined() ? master : parameters_.embed.value);
}

void Transformer::check_forced(int64_t block, const ForwardContext& context) const {
  HADAL_CHECK(std::ssize(context.forced) <= config_.n_blocks(), "transformer: forced choices of ",
              context.forced.size(), " blocks, the model has ", config_.n_blocks());
  check_choices(context.forced_of(block), config_, block, *context.batch,
                context.mode == AttentionMode::kSparse);
}

BlockOutput Transformer::run_checked(int64_t layer,
                                     at::Tensor streams,
                                     const at::Tensor& ids,
                                     const ForwardContext& context) const {
  return run_block(parameters_.blocks.at(static_cast<size_t>(layer)), config_, layer,
                   std::move(streams), ids, rope_compressed_, context);
}

BlockOutput Transformer::run_layer(int64_t layer,
                                   at::Tensor streams,
                                   const at::Tensor& ids,
                                   ForwardContext& context) const {
  ops::check_shape(ids, {context.batch->num_tokens()}, "transformer: ids");
  check_forced(layer, context);
  ensure_rope(context);
  return run_checked(layer, std::move(streams), ids, context);
}

ForwardOutput Transformer::forward(const at::Tensor& ids, ForwardContext& context) const {
  ops::check_shape(ids, {context.batch->num_tokens()}, "transformer: ids");
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) check_forced(layer, context);
  fill_rope(context);
  ForwardOutput output{.streams = embed(ids, context.numerics), .aux = {}};
  output.aux.reserve(parameters_.blocks.size());
  std::vector<at::Tensor> means;
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
    BlockOutput block = run_checked(layer, std::move(output.streams), ids, context);
    output.streams = std::move(block.streams);
    output.aux.push_back(std::move(block.aux));
    if (context.target_means && is_target(layer)) means.push_back(stream_mean(output.streams));
  }
  if (context.target_means) output.target_means = at::cat(means, 1);
  return output;
}

at::Tensor Transformer::head_input(const at::Tensor& streams, ops::Numerics numerics) const {
  return collapse(streams, parameters_.hc_head, parameters_.norm, config_, numerics);
}

at::Tensor Transformer::logits(const at::Tensor& head_input, ops::Numerics numerics) const {
  return apply_linear(parameters_.head, head_input, numerics);
}

MtpOutput Transformer::mtp(const at::Tensor& streams,
                           const at::Tensor& next_ids,
                           ForwardContext& context) const {
  return mtp(streams, next_ids, embedding_rows(next_ids, context.numerics), context);
}

MtpOutput Transformer::mtp(const at::Tensor& streams,
                           const at::Tensor& next_ids,
                           const at::Tensor& rows,
                           ForwardContext& context) const {
  HADAL_CHECK(parameters_.mtp.has_value(), "transformer: this model has no MTP block");
  check_forced(config_.n_layers, context);
  ensure_rope(context);
  ops::check_shape(rows, {next_ids.size(0), config_.dim}, "transformer: rows of the embedding");
  return mtp_forward(*parameters_.mtp, config_, rows, streams, next_ids, rope_compressed_, context);
}

bool Transformer::is_target(int64_t layer) const {
  return std::ranges::count(config_.drafter.target_layers, layer) > 0;
}

void Transformer::drop_drafter() {
  parameters_.drafter = {};
  config_.drafter = {};
}

void Transformer::keep_draft_context(const at::Tensor& target_means,
                                     ForwardContext& context) const {
  HADAL_CHECK(context.kv != nullptr, "transformer: rows of the drafter's context without a cache");
  ensure_rope(context);
  const ops::ProductInput input =
      draft_input(parameters_.drafter, config_, target_means, context.numerics);
  for (size_t stage = 0; stage < parameters_.drafter.stages.size(); ++stage) {
    const Attention& attn = parameters_.drafter.stages[stage].block.attn;
    keep_window_latents(attn, config_, config_.n_layers + static_cast<int64_t>(stage),
                        apply_linear(attn.wkv, input), context.rope_window, context);
  }
}

DraftedBlocks Transformer::draft(const DraftBlocks& blocks,
                                 ops::Numerics numerics,
                                 DraftTrace* trace) const {
  const DraftPlan plan = plan_draft(blocks, config_, rope_window_);
  const at::Tensor hidden = draft_hidden(parameters_.drafter, config_, plan,
                                         embed(plan.ids, numerics), blocks, numerics, trace);
  const Parameter& norm = parameters_.drafter.stages.back().norm;
  return {.hidden = hidden,
          .logits =
              logits(ops::rms_norm(hidden, norm.values_in(numerics), config_.norm_eps), numerics)};
}

}  // namespace hadal::model
