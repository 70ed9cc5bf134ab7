#include "model/describe.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "base/check.h"

namespace hadal::model {
namespace {

using ops::GemmRole;

/// How far to the front of its group a field lies in official files; they list the norms of
/// attention before its matrices, the embedding and the head before all else.
enum Front { kAsVisited = 0, kEarly = 1, kFirst = 2, kLast = -1 };

/// The list: every parameter of every part of a model, each once.
class Describer {
 public:
  Describer(const ModelConfig& config, FieldVisitor& visitor) : c_(config), visitor_(visitor) {}

  void model(ModelParameters& m) {
    top(m);
    m.blocks.resize(static_cast<size_t>(c_.n_layers));
    for (int64_t i = 0; i < c_.n_layers; ++i) {
      inside(concat("layers.", i, "."), i, kLast,
             [&] { block(m.blocks[static_cast<size_t>(i)], c_.ratio(i), c_.is_hashed(i)); });
    }
    norm_and_head(m);
    if (c_.n_mtp_layers > 0) {
      if (!m.mtp) m.mtp.emplace();
      inside("mtp.0.", c_.n_layers, kLast, [&] { mtp(*m.mtp); });
    }
    m.drafter.stages.resize(static_cast<size_t>(c_.drafter.n_stages));
    for (int64_t i = 0; i < c_.drafter.n_stages; ++i)
      stage(m.drafter.stages[static_cast<size_t>(i)], i);
  }

  void one_block(Block& b, int64_t index) {
    const std::string prefix = index < c_.n_layers ? concat("layers.", index, ".") : "mtp.0.";
    inside(prefix, index, kLast, [&] { block(b, c_.ratio(index), c_.is_hashed(index)); });
  }

 private:
  // --- parts of a model

  void top(ModelParameters& m) {
    part_ = Part::kEmbedding;
    at_front(kFirst, [&] {
      add(m.embed, "embed.weight", ParamKind::kEmbedding, Storage::kBf16, {c_.vocab_size, c_.dim});
    });
  }
  void norm_and_head(ModelParameters& m) {
    norm(m.norm, "norm.weight", c_.dim, Part::kNorm);
    hyper_connection(m.hc_head, "hc_head", c_.hc_mult, 1);
    part_ = Part::kHead;
    at_front(kEarly, [&] {
      add(m.head, "head.weight", ParamKind::kHead, Storage::kBf16, {c_.vocab_size, c_.dim},
          GemmRole::kFp32);
    });
  }
  void mtp(Mtp& m) {
    part_ = Part::kMtpProjection;
    fp8(m.e_proj, "e_proj.weight", c_.dim, c_.dim);
    fp8(m.h_proj, "h_proj.weight", c_.dim, c_.dim);
    norm(m.enorm, "enorm.weight", c_.dim, Part::kNorm);
    norm(m.hnorm, "hnorm.weight", c_.dim, Part::kNorm);
    at_front(kEarly, [&] { block(m.block, c_.ratio(c_.n_layers), c_.is_hashed(c_.n_layers)); });
    norm(m.norm, "norm.weight", c_.dim, Part::kNorm);
    hyper_connection(m.hc_head, "hc_head", c_.hc_mult, 1);
  }

  void stage(DrafterStage& s, int64_t index) {
    inside(concat("mtp.", index, "."), c_.n_layers + index, kLast, [&] {
      const DsparkConfig& drafter = c_.drafter;
      block(s.block, 0, false);
      if (index == 0) {
        const auto targets = static_cast<int64_t>(drafter.target_layers.size());
        part_ = Part::kMtpProjection;
        fp8(s.main_proj, "main_proj.weight", c_.dim, targets * c_.dim);
        norm(s.main_norm, "main_norm.weight", c_.dim, Part::kNorm);
      }
      if (index + 1 < drafter.n_stages) return;
      norm(s.norm, "norm.weight", c_.dim, Part::kNorm);
      hyper_connection(s.hc_head, "hc_head", c_.hc_mult, 1);
      part_ = Part::kMtpProjection;
      const int64_t rank = drafter.markov_rank;
      add(s.markov_w1, "markov_head.markov_w1.weight", ParamKind::kEmbedding, Storage::kBf16,
          {c_.vocab_size, rank});
      bf16(s.markov_w2, "markov_head.markov_w2.weight", c_.vocab_size, rank, GemmRole::kFp32);
      bf16(s.confidence, "confidence_head.proj.weight", 1, c_.dim + rank, GemmRole::kFp32);
    });
  }

  void block(Block& b, int64_t ratio, bool hashed) {
    norm(b.attn_norm, "attn_norm.weight", c_.dim, Part::kNorm);
    norm(b.ffn_norm, "ffn_norm.weight", c_.dim, Part::kNorm);
    hyper_connection(b.hc_attn, "hc_attn", c_.hc_rows(), 3);
    hyper_connection(b.hc_ffn, "hc_ffn", c_.hc_rows(), 3);
    inside("attn.", block_, kAsVisited, [&] { attention(b.attn, ratio); });
    inside("ffn.", block_, kAsVisited, [&] { moe(b.moe, hashed); });
  }

  void hyper_connection(HyperConnection& hc,
                        const std::string& stem,
                        int64_t rows,
                        int64_t scales) {
    part_ = Part::kHyper;
    add(hc.fn, stem + "_fn", ParamKind::kHcFn, Storage::kF32, {rows, c_.hc_mult * c_.dim});
    add(hc.base, stem + "_base", ParamKind::kHcBase, Storage::kF32, {rows});
    add(hc.scale, stem + "_scale", ParamKind::kHcScale, Storage::kF32, {scales});
  }

  void attention(Attention& a, int64_t ratio) {
    const int64_t q_width = c_.n_heads * c_.head_dim, o_width = c_.o_groups * c_.o_lora_rank;
    part_ = Part::kAttention;
    at_front(kFirst,
             [&] { add(a.attn_sink, "attn_sink", ParamKind::kSink, Storage::kF32, {c_.n_heads}); });
    fp8(a.wq_a, "wq_a.weight", c_.q_lora_rank, c_.dim);
    at_front(kEarly, [&] { norm(a.q_norm, "q_norm.weight", c_.q_lora_rank, part_); });
    fp8(a.wq_b, "wq_b.weight", q_width, c_.q_lora_rank);
    fp8(a.wkv, "wkv.weight", c_.head_dim, c_.dim);
    at_front(kEarly, [&] { norm(a.kv_norm, "kv_norm.weight", c_.head_dim, part_); });
    add(a.wo_a, "wo_a.weight", ParamKind::kGroups, Storage::kFp8,
        {o_width, c_.heads_per_group() * c_.head_dim}, GemmRole::kBf16, c_.o_groups);
    fp8(a.wo_b, "wo_b.weight", c_.dim, o_width);
    if (ratio > 0) {
      if (!a.compressor) a.compressor.emplace();
      part_ = Part::kCompressor;
      inside("compressor.", block_, kAsVisited,
             [&] { compressor(*a.compressor, ratio, c_.head_dim); });
    }
    if (ModelConfig::kind_of(ratio) == LayerKind::kCsa) {
      if (!a.indexer) a.indexer.emplace();
      part_ = Part::kIndexer;
      inside("indexer.", block_, kAsVisited, [&] { indexer(*a.indexer, ratio); });
    }
  }

  void compressor(Compressor& p, int64_t ratio, int64_t width) {
    const int64_t overlap = ModelConfig::overlap(ratio), columns = overlap * width;
    add(p.ape, "ape", ParamKind::kApe, Storage::kF32, {ratio, columns});
    bf16(p.wkv, "wkv.weight", columns, c_.dim, GemmRole::kFp32, overlap);
    bf16(p.wgate, "wgate.weight", columns, c_.dim, GemmRole::kFp32, overlap);
    norm(p.norm, "norm.weight", width, part_);
  }

  void indexer(Indexer& p, int64_t ratio) {
    fp8(p.wq_b, "wq_b.weight", c_.index_n_heads * c_.index_head_dim, c_.q_lora_rank);
    bf16(p.weights_proj, "weights_proj.weight", c_.index_n_heads, c_.dim);
    inside("compressor.", block_, kAsVisited,
           [&] { compressor(p.compressor, ratio, c_.index_head_dim); });
  }

  void moe(Moe& m, bool hashed) {
    const int64_t experts = c_.n_routed_experts, inter = c_.moe_inter_dim;
    part_ = Part::kRouter;
    bf16(m.gate, "gate.weight", experts, c_.dim, GemmRole::kFp32);
    if (hashed) {
      if (!m.tid2eid) m.tid2eid.emplace();
      add(*m.tid2eid, "gate.tid2eid", ParamKind::kHashTable, Storage::kI64,
          {c_.vocab_size, c_.n_activated_experts});
    } else {
      if (!m.gate_bias) m.gate_bias.emplace();
      add(*m.gate_bias, "gate.bias", ParamKind::kGateBias, Storage::kF32, {experts});
    }
    part_ = Part::kExperts;
    routed(m.w1, "w1", inter, c_.dim);
    routed(m.w2, "w2", c_.dim, inter);
    routed(m.w3, "w3", inter, c_.dim);
    part_ = Part::kShared;
    fp8(m.shared_w1, "shared_experts.w1.weight", inter, c_.dim);
    fp8(m.shared_w2, "shared_experts.w2.weight", c_.dim, inter);
    fp8(m.shared_w3, "shared_experts.w3.weight", inter, c_.dim);
  }

  // --- kinds of parameters

  void add(Parameter& parameter,
           const std::string& name,
           ParamKind kind,
           Storage storage,
           std::vector<int64_t> shape,
           GemmRole role = GemmRole::kBf16,
           int64_t units = 1) {
    visitor_.field(parameter, {.name = prefix_ + name,
                               .kind = kind,
                               .storage = storage,
                               .shape = std::move(shape),
                               .role = role,
                               .units = units,
                               .part = part_,
                               .block = block_});
  }
  void norm(Parameter& parameter, const std::string& name, int64_t width, Part part) {
    part_ = part;
    add(parameter, name, ParamKind::kNorm, Storage::kBf16, {width});
  }
  void fp8(Parameter& parameter, const std::string& name, int64_t out, int64_t in) {
    add(parameter, name, ParamKind::kMatrix, Storage::kFp8, {out, in}, GemmRole::kFp8);
  }
  void bf16(Parameter& parameter,
            const std::string& name,
            int64_t out,
            int64_t in,
            GemmRole role = GemmRole::kBf16,
            int64_t units = 1) {
    add(parameter, name, ParamKind::kMatrix, Storage::kBf16, {out, in}, role, units);
  }
  void routed(Parameter& parameter, const std::string& name, int64_t out, int64_t in) {
    const Storage storage = c_.expert_dtype == ExpertDtype::kFp4 ? Storage::kFp4 : Storage::kFp8;
    add(parameter, "experts.*." + name + ".weight", ParamKind::kExperts, storage,
        {c_.n_routed_experts, out, in}, GemmRole::kFp4, c_.n_routed_experts);
  }

  // --- where they lie

  void at_front(int front, const std::function<void()>& body) {
    visitor_.begin(front);
    body();
    visitor_.end();
  }
  void inside(const std::string& prefix,
              int64_t block,
              int front,
              const std::function<void()>& body) {
    const std::string prefix_before = std::exchange(prefix_, prefix_ + prefix);
    const int64_t block_before = std::exchange(block_, block);
    at_front(front, body);
    prefix_ = prefix_before;
    block_ = block_before;
  }

  const ModelConfig& c_;
  FieldVisitor& visitor_;
  std::string prefix_;
  int64_t block_ = -1;
  Part part_ = Part::kEmbedding;
};

/// Fields in the order of official files.
class FileOrder : public FieldVisitor {
 public:
  FileOrder() { groups_.emplace_back(); }
  void field(Parameter&, const Field& field) override {
    groups_.back().push_back({kAsVisited, {field}});
  }
  void begin(int front) override {
    fronts_.push_back(front);
    groups_.emplace_back();
  }
  void end() override {
    std::vector<Field> fields = take();
    groups_.back().push_back({fronts_.back(), std::move(fields)});
    fronts_.pop_back();
  }
  /// Closes the innermost group.
  std::vector<Field> take() {
    std::vector<Member>& members = groups_.back();
    std::stable_sort(members.begin(), members.end(),
                     [](const Member& a, const Member& b) { return a.front > b.front; });
    std::vector<Field> fields;
    for (Member& member : members)
      std::move(member.fields.begin(), member.fields.end(), std::back_inserter(fields));
    groups_.pop_back();
    return fields;
  }

 private:
  struct Member {
    int front;
    std::vector<Field> fields;
  };
  std::vector<std::vector<Member>> groups_;
  std::vector<int> fronts_;
};

class Declare : public FieldVisitor {
 public:
  void field(Parameter& parameter, const Field& field) override { parameter = field.parameter(); }
};

}  // namespace

Parameter Field::parameter() const {
  Parameter p;
  p.name = name;
  p.kind = kind;
  p.role = role;
  p.storage = storage;
  p.shape = shape;
  p.units = units;
  return p;
}

void describe(const ModelConfig& config, ModelParameters& parameters, FieldVisitor& visitor) {
  Describer(config, visitor).model(parameters);
}

void describe(const ModelConfig& config, int64_t index, Block& block, FieldVisitor& visitor) {
  Describer(config, visitor).one_block(block, index);
}

ModelParameters declare(const ModelConfig& config) {
  ModelParameters parameters;
  Declare visitor;
  describe(config, parameters, visitor);
  return parameters;
}

std::vector<Field> declared_in_file_order(const ModelConfig& config) {
  ModelParameters parameters;
  FileOrder order;
  describe(config, parameters, order);
  return order.take();
}

}  // namespace hadal::model
