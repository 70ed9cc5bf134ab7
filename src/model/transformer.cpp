#include "model/transformer.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/gemm/embedding.h"
#include "ops/mhc/hyper_connection.h"
#include "ops/norm/rms_norm.h"

namespace hadal::model {
namespace {

using ops::GemmRole;

ops::YarnParams yarn_params(const ModelConfig& config) {
  return {.factor = config.rope_factor,
          .beta_fast = config.beta_fast,
          .beta_slow = config.beta_slow,
          .original_seq_len = config.original_seq_len};
}

ops::HcParams hc_params(const ModelConfig& config) {
  return {.sinkhorn_iters = config.hc_sinkhorn_iters,
          .norm_eps = config.norm_eps,
          .hc_eps = config.hc_eps};
}

/// Declares parameters under one name prefix.
class Declare {
 public:
  Declare(const ModelConfig& config, std::string prefix) : c_(config), prefix_(std::move(prefix)) {}

  Parameter make(const std::string& name,
                 ParamKind kind,
                 Storage storage,
                 std::vector<int64_t> shape,
                 GemmRole role = GemmRole::kBf16) const {
    const int64_t units = kind == ParamKind::kExperts  ? shape.front()
                          : kind == ParamKind::kGroups ? c_.o_groups
                                                       : 1;
    return {.name = prefix_ + name,
            .kind = kind,
            .role = role,
            .storage = storage,
            .shape = std::move(shape),
            .units = units,
            .value = {},
            .as_stored = false,
            .packed = {},
            .packed_value = {}};
  }
  Parameter norm(const std::string& name, int64_t width) const {
    return make(name, ParamKind::kNorm, Storage::kBf16, {width});
  }
  Parameter fp8(const std::string& name,
                int64_t out,
                int64_t in,
                ParamKind kind = ParamKind::kMatrix,
                GemmRole role = GemmRole::kFp8) const {
    return make(name, kind, Storage::kFp8, {out, in}, role);
  }
  Parameter bf16(const std::string& name, int64_t out, int64_t in, GemmRole role) const {
    return make(name, ParamKind::kMatrix, Storage::kBf16, {out, in}, role);
  }
  HyperConnection hyper_connection(const std::string& name, int64_t rows, int64_t scales) const {
    return {.fn = make(name + "_fn", ParamKind::kHcFn, Storage::kF32, {rows, c_.hc_mult * c_.dim}),
            .base = make(name + "_base", ParamKind::kHcBase, Storage::kF32, {rows}),
            .scale = make(name + "_scale", ParamKind::kHcScale, Storage::kF32, {scales})};
  }
  Compressor compressor(const std::string& name, int64_t ratio, int64_t width) const {
    const int64_t columns = ModelConfig::overlap(ratio) * width;
    Compressor c{.wkv = bf16(name + "wkv.weight", columns, c_.dim, GemmRole::kFp32),
                 .wgate = bf16(name + "wgate.weight", columns, c_.dim, GemmRole::kFp32),
                 .ape = make(name + "ape", ParamKind::kApe, Storage::kF32, {ratio, columns}),
                 .norm = norm(name + "norm.weight", width)};
    c.wkv.units = c.wgate.units = ModelConfig::overlap(ratio);
    return c;
  }
  Attention attention(int64_t block) const {
    const int64_t ratio = c_.ratio(block), q_width = c_.n_heads * c_.head_dim;
    Attention a{
        .attn_sink = make("attn.attn_sink", ParamKind::kSink, Storage::kF32, {c_.n_heads}),
        .wq_a = fp8("attn.wq_a.weight", c_.q_lora_rank, c_.dim),
        .q_norm = norm("attn.q_norm.weight", c_.q_lora_rank),
        .wq_b = fp8("attn.wq_b.weight", q_width, c_.q_lora_rank),
        .wkv = fp8("attn.wkv.weight", c_.head_dim, c_.dim),
        .kv_norm = norm("attn.kv_norm.weight", c_.head_dim),
        .wo_a = fp8("attn.wo_a.weight", c_.o_groups * c_.o_lora_rank,
                    c_.heads_per_group() * c_.head_dim, ParamKind::kGroups, GemmRole::kBf16),
        .wo_b = fp8("attn.wo_b.weight", c_.dim, c_.o_groups * c_.o_lora_rank),
        .compressor = std::nullopt,
        .indexer = std::nullopt};
    if (ratio > 0) a.compressor = compressor("attn.compressor.", ratio, c_.head_dim);
    if (c_.kind(block) == LayerKind::kCsa) {
      a.indexer = Indexer{
          .wq_b =
              fp8("attn.indexer.wq_b.weight", c_.index_n_heads * c_.index_head_dim, c_.q_lora_rank),
          .weights_proj =
              bf16("attn.indexer.weights_proj.weight", c_.index_n_heads, c_.dim, GemmRole::kBf16),
          .compressor = compressor("attn.indexer.compressor.", ratio, c_.index_head_dim)};
    }
    return a;
  }
  Moe moe(int64_t block) const {
    const int64_t experts = c_.n_routed_experts, inter = c_.moe_inter_dim;
    const auto routed = [&](const std::string& name, int64_t out, int64_t in) {
      const Storage storage = c_.expert_dtype == ExpertDtype::kFp4 ? Storage::kFp4 : Storage::kFp8;
      return make("ffn.experts.*." + name + ".weight", ParamKind::kExperts, storage,
                  {experts, out, in}, GemmRole::kFp4);
    };
    Moe m{.gate = bf16("ffn.gate.weight", experts, c_.dim, GemmRole::kFp32),
          .gate_bias = std::nullopt,
          .tid2eid = std::nullopt,
          .w1 = routed("w1", inter, c_.dim),
          .w3 = routed("w3", inter, c_.dim),
          .w2 = routed("w2", c_.dim, inter),
          .shared_w1 = fp8("ffn.shared_experts.w1.weight", inter, c_.dim),
          .shared_w3 = fp8("ffn.shared_experts.w3.weight", inter, c_.dim),
          .shared_w2 = fp8("ffn.shared_experts.w2.weight", c_.dim, inter)};
    if (c_.is_hashed(block)) {
      m.tid2eid = make("ffn.gate.tid2eid", ParamKind::kHashTable, Storage::kI64,
                       {c_.vocab_size, c_.n_activated_experts});
    } else {
      m.gate_bias = make("ffn.gate.bias", ParamKind::kGateBias, Storage::kF32, {experts});
    }
    return m;
  }
  Block block(int64_t index) const {
    return {.attn_norm = norm("attn_norm.weight", c_.dim),
            .ffn_norm = norm("ffn_norm.weight", c_.dim),
            .hc_attn = hyper_connection("hc_attn", c_.hc_rows(), 3),
            .hc_ffn = hyper_connection("hc_ffn", c_.hc_rows(), 3),
            .attn = attention(index),
            .moe = moe(index)};
  }

 private:
  const ModelConfig& c_;
  std::string prefix_;
};

void visit_hc(HyperConnection& hc, const std::function<void(Parameter&)>& visitor) {
  visitor(hc.fn);
  visitor(hc.base);
  visitor(hc.scale);
}

void visit_compressor(Compressor& c, const std::function<void(Parameter&)>& visitor) {
  for (Parameter* p : {&c.ape, &c.wkv, &c.wgate, &c.norm}) visitor(*p);
}

void visit_block(Block& block, const std::function<void(Parameter&)>& visitor) {
  visitor(block.attn_norm);
  visitor(block.ffn_norm);
  visit_hc(block.hc_attn, visitor);
  visit_hc(block.hc_ffn, visitor);
  Attention& a = block.attn;
  for (Parameter* p :
       {&a.attn_sink, &a.wq_a, &a.q_norm, &a.wq_b, &a.wkv, &a.kv_norm, &a.wo_a, &a.wo_b}) {
    visitor(*p);
  }
  if (a.compressor) visit_compressor(*a.compressor, visitor);
  if (a.indexer) {
    visitor(a.indexer->wq_b);
    visitor(a.indexer->weights_proj);
    visit_compressor(a.indexer->compressor, visitor);
  }
  Moe& m = block.moe;
  visitor(m.gate);
  if (m.gate_bias) visitor(*m.gate_bias);
  if (m.tid2eid) visitor(*m.tid2eid);
  for (Parameter* p : {&m.w1, &m.w2, &m.w3, &m.shared_w1, &m.shared_w2, &m.shared_w3}) visitor(*p);
}

}  // namespace

Transformer::Transformer(ModelConfig config)
    : config_(std::move(config)),
      rope_window_(config_.rope_head_dim, config_.rope_theta, nullptr),
      rope_compressed_([this] {
        const ops::YarnParams yarn = yarn_params(config_);
        return ops::RopeTable(config_.rope_head_dim, config_.compress_rope_theta, &yarn);
      }()) {
  const Declare top(config_, "");
  const int64_t vocab = config_.vocab_size, dim = config_.dim;
  embed_ = top.make("embed.weight", ParamKind::kEmbedding, Storage::kBf16, {vocab, dim});
  head_ = top.make("head.weight", ParamKind::kHead, Storage::kBf16, {vocab, dim}, GemmRole::kFp32);
  norm_ = top.norm("norm.weight", dim);
  hc_head_ = top.hyper_connection("hc_head", config_.hc_mult, 1);
  for (int64_t i = 0; i < config_.n_layers; ++i) {
    blocks_.push_back(Declare(config_, concat("layers.", i, ".")).block(i));
  }
  if (config_.n_mtp_layers > 0) {
    const Declare d(config_, "mtp.0.");
    mtp_ = Mtp{.e_proj = d.fp8("e_proj.weight", dim, dim),
               .h_proj = d.fp8("h_proj.weight", dim, dim),
               .enorm = d.norm("enorm.weight", dim),
               .hnorm = d.norm("hnorm.weight", dim),
               .norm = d.norm("norm.weight", dim),
               .hc_head = d.hyper_connection("hc_head", config_.hc_mult, 1),
               .block = d.block(config_.n_layers)};
  }
}

void Transformer::visit(const std::function<void(Parameter&)>& visitor) {
  visitor(embed_);
  for (Block& block : blocks_) visit_block(block, visitor);
  visitor(norm_);
  visit_hc(hc_head_, visitor);
  visitor(head_);
  if (mtp_) {
    for (Parameter* p : {&mtp_->e_proj, &mtp_->h_proj, &mtp_->enorm, &mtp_->hnorm}) visitor(*p);
    visit_block(mtp_->block, visitor);
    visitor(mtp_->norm);
    visit_hc(mtp_->hc_head, visitor);
  }
}

void Transformer::visit(const std::function<void(const Parameter&)>& visitor) const {
  // Visiting does not change the model; the constness is given back to every parameter.
  const_cast<Transformer*>(this)->visit([&](Parameter& p) { visitor(p); });
}

at::Tensor Transformer::run_block(const Block& block,
                                  int64_t index,
                                  at::Tensor streams,
                                  const at::Tensor& ids,
                                  ForwardContext& context) const {
  const ops::HcParams params = hc_params(config_);
  const ops::HcPre attn_mix = ops::hc_pre(streams, block.hc_attn.fn.value, block.hc_attn.base.value,
                                          block.hc_attn.scale.value, params);
  const at::Tensor attn_out =
      attention_forward(block.attn, config_, index,
                        ops::rms_norm(attn_mix.mixed, block.attn_norm.value, config_.norm_eps),
                        rope_compressed_, context);
  streams = ops::hc_post(attn_out, streams, attn_mix.post, attn_mix.comb);

  const ops::HcPre ffn_mix = ops::hc_pre(streams, block.hc_ffn.fn.value, block.hc_ffn.base.value,
                                         block.hc_ffn.scale.value, params);
  const at::Tensor ffn_out = moe_forward(
      block.moe, config_, index,
      ops::rms_norm(ffn_mix.mixed, block.ffn_norm.value, config_.norm_eps), ids, context);
  streams = ops::hc_post(ffn_out, streams, ffn_mix.post, ffn_mix.comb);
  if (context.on_block) context.on_block(index, streams);
  return streams;
}

void Transformer::fill_rope(ForwardContext& context) const {
  const ops::Batch& batch = *context.batch;
  const int64_t max_pos = batch.max_end_pos() - 1;
  context.rope_window = rope_window_.cos_sin(batch.pos(), max_pos);
  context.rope_compressed = rope_compressed_.cos_sin(batch.pos(), max_pos);
}

at::Tensor Transformer::embed(const at::Tensor& ids, ops::Numerics numerics) const {
  const at::Tensor embedded = ops::embedding(ids, embed_.operand(numerics));
  return embedded.unsqueeze(1).expand({ids.size(0), config_.hc_mult, config_.dim}).contiguous();
}

at::Tensor Transformer::run_layer(int64_t layer,
                                  at::Tensor streams,
                                  const at::Tensor& ids,
                                  ForwardContext& context) const {
  ops::check_shape(ids, {context.batch->num_tokens()}, "transformer: ids");
  fill_rope(context);
  return run_block(blocks_.at(static_cast<size_t>(layer)), layer, std::move(streams), ids, context);
}

at::Tensor Transformer::forward(const at::Tensor& ids, ForwardContext& context) const {
  ops::check_shape(ids, {context.batch->num_tokens()}, "transformer: ids");
  fill_rope(context);
  at::Tensor streams = embed(ids, context.numerics);
  for (int64_t i = 0; i < config_.n_layers; ++i) {
    streams = run_block(blocks_[static_cast<size_t>(i)], i, std::move(streams), ids, context);
  }
  return streams;
}

at::Tensor Transformer::head_input(const at::Tensor& streams, ops::Numerics) const {
  return ops::rms_norm(ops::hc_head(streams, hc_head_.fn.value, hc_head_.base.value,
                                    hc_head_.scale.value, hc_params(config_)),
                       norm_.value, config_.norm_eps);
}

at::Tensor Transformer::logits(const at::Tensor& head_input, ops::Numerics numerics) const {
  return apply_linear(head_, head_input, numerics);
}

at::Tensor Transformer::mtp_head_input(const at::Tensor& streams,
                                       const at::Tensor& next_ids,
                                       ForwardContext& context) const {
  HADAL_CHECK(mtp_.has_value(), "transformer: this model has no MTP block");
  if (!context.rope_window.defined()) fill_rope(context);
  const ops::Numerics numerics = context.numerics;
  const int64_t tokens = streams.size(0), n = config_.hc_mult, dim = config_.dim;
  const at::Tensor e = ops::rms_norm(ops::embedding(next_ids, embed_.operand(numerics)),
                                     mtp_->enorm.value, config_.norm_eps);
  const at::Tensor h =
      ops::rms_norm(streams, mtp_->hnorm.value, config_.norm_eps).reshape({tokens * n, dim});
  const at::Tensor projected_e =
      apply_linear(mtp_->e_proj, ops::quantise_input(e, GemmRole::kFp8, numerics), numerics);
  const at::Tensor projected_h =
      apply_linear(mtp_->h_proj, ops::quantise_input(h, GemmRole::kFp8, numerics), numerics);
  at::Tensor z = projected_e.unsqueeze(1) + projected_h.reshape({tokens, n, dim});
  z = run_block(mtp_->block, config_.n_layers, std::move(z), next_ids, context);
  return ops::rms_norm(ops::hc_head(z, mtp_->hc_head.fn.value, mtp_->hc_head.base.value,
                                    mtp_->hc_head.scale.value, hc_params(config_)),
                       mtp_->norm.value, config_.norm_eps);
}

}  // namespace hadal::model
