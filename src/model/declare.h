// The parameters of a model by name, role and shape, without values. Private to the model.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "model/block.h"
#include "model/config.h"

namespace hadal::model {

/// Declares parameters under one name prefix.
class Declare {
 public:
  Declare(const ModelConfig& config, std::string prefix) : c_(config), prefix_(std::move(prefix)) {}

  Parameter make(const std::string& name,
                 ParamKind kind,
                 Storage storage,
                 std::vector<int64_t> shape,
                 ops::GemmRole role = ops::GemmRole::kBf16) const {
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
                ops::GemmRole role = ops::GemmRole::kFp8) const {
    return make(name, kind, Storage::kFp8, {out, in}, role);
  }
  Parameter bf16(const std::string& name, int64_t out, int64_t in, ops::GemmRole role) const {
    return make(name, ParamKind::kMatrix, Storage::kBf16, {out, in}, role);
  }
  HyperConnection hyper_connection(const std::string& name, int64_t rows, int64_t scales) const {
    return {.fn = make(name + "_fn", ParamKind::kHcFn, Storage::kF32, {rows, c_.hc_mult * c_.dim}),
            .base = make(name + "_base", ParamKind::kHcBase, Storage::kF32, {rows}),
            .scale = make(name + "_scale", ParamKind::kHcScale, Storage::kF32, {scales})};
  }
  Compressor compressor(const std::string& name, int64_t ratio, int64_t width) const {
    const int64_t columns = ModelConfig::overlap(ratio) * width;
    Compressor c{.wkv = bf16(name + "wkv.weight", columns, c_.dim, ops::GemmRole::kFp32),
                 .wgate = bf16(name + "wgate.weight", columns, c_.dim, ops::GemmRole::kFp32),
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
                    c_.heads_per_group() * c_.head_dim, ParamKind::kGroups, ops::GemmRole::kBf16),
        .wo_b = fp8("attn.wo_b.weight", c_.dim, c_.o_groups * c_.o_lora_rank),
        .compressor = std::nullopt,
        .indexer = std::nullopt};
    if (ratio > 0) a.compressor = compressor("attn.compressor.", ratio, c_.head_dim);
    if (c_.kind(block) == LayerKind::kCsa) {
      a.indexer =
          Indexer{.wq_b = fp8("attn.indexer.wq_b.weight", c_.index_n_heads * c_.index_head_dim,
                              c_.q_lora_rank),
                  .weights_proj = bf16("attn.indexer.weights_proj.weight", c_.index_n_heads, c_.dim,
                                       ops::GemmRole::kBf16),
                  .compressor = compressor("attn.indexer.compressor.", ratio, c_.index_head_dim)};
    }
    return a;
  }
  Moe moe(int64_t block) const {
    const int64_t experts = c_.n_routed_experts, inter = c_.moe_inter_dim;
    const auto routed = [&](const std::string& name, int64_t out, int64_t in) {
      const Storage storage = c_.expert_dtype == ExpertDtype::kFp4 ? Storage::kFp4 : Storage::kFp8;
      return make("ffn.experts.*." + name + ".weight", ParamKind::kExperts, storage,
                  {experts, out, in}, ops::GemmRole::kFp4);
    };
    Moe m{.gate = bf16("ffn.gate.weight", experts, c_.dim, ops::GemmRole::kFp32),
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

}  // namespace hadal::model
