#include "checkpoint/names.h"

#include <utility>

#include "base/check.h"
#include "base/math.h"

namespace hadal::checkpoint {
namespace {

using model::ModelConfig;

constexpr int64_t kBlock = 128;    // edge of an FP8 weight block
constexpr int64_t kFp4Group = 32;  // inputs that share an FP4 scale

/// Collects the tensors of one block or of the top.
class TableBuilder {
 public:
  TableBuilder(std::vector<TensorSpec>& out, std::string prefix, int64_t block)
      : out_(out), prefix_(std::move(prefix)), block_(block) {}

  void add(const std::string& name, TensorRole role, Part part, std::vector<int64_t> shape) {
    out_.push_back(
        {prefix_ + name, role, part, block_, std::move(shape), role != TensorRole::kI64});
  }
  void matrix(const std::string& name, Part part, int64_t rows, int64_t inputs) {
    add(name + ".weight", TensorRole::kMatrix, part, {rows, inputs});
  }
  void bf16(const std::string& name, Part part, std::vector<int64_t> shape) {
    add(name + ".weight", TensorRole::kBf16, part, std::move(shape));
  }
  void f32(const std::string& name, Part part, std::vector<int64_t> shape) {
    add(name, TensorRole::kF32, part, std::move(shape));
  }

 private:
  std::vector<TensorSpec>& out_;
  std::string prefix_;
  int64_t block_;
};

void add_hyper(
    TableBuilder& t, const std::string& stem, int64_t rows, int64_t scales, const ModelConfig& c) {
  t.f32(stem + "_fn", Part::kHyper, {rows, c.hc_mult * c.dim});
  t.f32(stem + "_base", Part::kHyper, {rows});
  t.f32(stem + "_scale", Part::kHyper, {scales});
}

void add_compressor(TableBuilder& t,
                    const std::string& stem,
                    Part part,
                    int64_t ratio,
                    int64_t width,
                    int64_t dim) {
  const int64_t columns = ModelConfig::overlap(ratio) * width;
  t.f32(stem + ".ape", part, {ratio, columns});
  t.bf16(stem + ".wkv", part, {columns, dim});
  t.bf16(stem + ".wgate", part, {columns, dim});
  t.bf16(stem + ".norm", part, {width});
}

void add_attention(TableBuilder& t, const ModelConfig& c, int64_t ratio) {
  t.f32("attn.attn_sink", Part::kAttention, {c.n_heads});
  t.bf16("attn.q_norm", Part::kAttention, {c.q_lora_rank});
  t.bf16("attn.kv_norm", Part::kAttention, {c.head_dim});
  t.matrix("attn.wq_a", Part::kAttention, c.q_lora_rank, c.dim);
  t.matrix("attn.wq_b", Part::kAttention, c.n_heads * c.head_dim, c.q_lora_rank);
  t.matrix("attn.wkv", Part::kAttention, c.head_dim, c.dim);
  t.matrix("attn.wo_a", Part::kAttention, c.o_groups * c.o_lora_rank,
           c.heads_per_group() * c.head_dim);
  t.matrix("attn.wo_b", Part::kAttention, c.dim, c.o_groups * c.o_lora_rank);
  if (ratio == 0) return;
  add_compressor(t, "attn.compressor", Part::kCompressor, ratio, c.head_dim, c.dim);
  if (ratio != 4) return;  // CSA
  t.matrix("attn.indexer.wq_b", Part::kIndexer, c.index_n_heads * c.index_head_dim, c.q_lora_rank);
  t.bf16("attn.indexer.weights_proj", Part::kIndexer, {c.index_n_heads, c.dim});
  add_compressor(t, "attn.indexer.compressor", Part::kIndexer, ratio, c.index_head_dim, c.dim);
}

void add_moe(TableBuilder& t, const ModelConfig& c, bool hashed) {
  t.bf16("ffn.gate", Part::kRouter, {c.n_routed_experts, c.dim});
  if (hashed)
    t.add("ffn.gate.tid2eid", TensorRole::kI64, Part::kRouter,
          {c.vocab_size, c.n_activated_experts});
  else
    t.f32("ffn.gate.bias", Part::kRouter, {c.n_routed_experts});
  const auto swiglu = [&](const std::string& stem, TensorRole role, Part part) {
    t.add(stem + "w1.weight", role, part, {c.moe_inter_dim, c.dim});
    t.add(stem + "w2.weight", role, part, {c.dim, c.moe_inter_dim});
    t.add(stem + "w3.weight", role, part, {c.moe_inter_dim, c.dim});
  };
  for (int64_t expert = 0; expert < c.n_routed_experts; ++expert)
    swiglu(concat("ffn.experts.", expert, "."), TensorRole::kExpert, Part::kExperts);
  swiglu("ffn.shared_experts.", TensorRole::kMatrix, Part::kShared);
}

void add_head_mix(TableBuilder& t, const ModelConfig& c) {
  t.bf16("norm", Part::kNorm, {c.dim});
  add_hyper(t, "hc_head", c.hc_mult, 1, c);
}

/// What layers, the MTP block and the stages of a drafter share.
void add_block(TableBuilder& t, const ModelConfig& c, int64_t ratio, bool hashed) {
  t.bf16("attn_norm", Part::kNorm, {c.dim});
  t.bf16("ffn_norm", Part::kNorm, {c.dim});
  add_hyper(t, "hc_attn", c.hc_rows(), 3, c);
  add_hyper(t, "hc_ffn", c.hc_rows(), 3, c);
  add_attention(t, c, ratio);
  add_moe(t, c, hashed);
}

/// The DSpark drafter: window layers with learned routing; what it reads from the main model comes
/// in through the first stage, its heads sit on the last.
void add_drafter(std::vector<TensorSpec>& table, const ModelConfig& c) {
  const model::DsparkConfig& drafter = c.drafter;
  for (int64_t stage = 0; stage < drafter.n_stages; ++stage) {
    TableBuilder t(table, concat("mtp.", stage, "."), c.n_layers + stage);
    add_block(t, c, 0, false);
    if (stage == 0) {
      const auto targets = static_cast<int64_t>(drafter.target_layers.size());
      t.matrix("main_proj", Part::kMtpProjection, c.dim, targets * c.dim);
      t.bf16("main_norm", Part::kNorm, {c.dim});
    }
    if (stage + 1 < drafter.n_stages) continue;
    add_head_mix(t, c);
    t.bf16("markov_head.markov_w1", Part::kMtpProjection, {c.vocab_size, drafter.markov_rank});
    t.bf16("markov_head.markov_w2", Part::kMtpProjection, {c.vocab_size, drafter.markov_rank});
    t.bf16("confidence_head.proj", Part::kMtpProjection, {1, c.dim + drafter.markov_rank});
  }
}

}  // namespace

const char* part_name(Part part) {
  constexpr const char* kNames[kNumParts] = {
      "embedding", "head",   "attention",     "compressors",    "indexers",       "norms",
      "mHC",       "router", "shared expert", "routed experts", "MTP projections"};
  return kNames[static_cast<int>(part)];
}

int64_t TensorSpec::num_elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

Storage storage_of(const ModelConfig& config) {
  if (!config.quantized) return Storage::kBf16;
  return config.expert_dtype == model::ExpertDtype::kFp4 ? Storage::kFp4 : Storage::kFp8F32Scales;
}

StoredTensor stored_weight(const TensorSpec& spec, Storage storage) {
  switch (spec.role) {
    case TensorRole::kF32:
      return {Dtype::kF32, spec.shape};
    case TensorRole::kI64:
      return {Dtype::kI64, spec.shape};
    case TensorRole::kBf16:
      return {Dtype::kBf16, spec.shape};
    case TensorRole::kExpert:
      if (storage == Storage::kFp4)
        return {Dtype::kI8, {spec.shape[0], ceil_div(spec.shape[1], 2)}};
      [[fallthrough]];
    case TensorRole::kMatrix:
      return {storage == Storage::kBf16 ? Dtype::kBf16 : Dtype::kF8E4M3, spec.shape};
  }
  throw Error("stored_weight: no such role");
}

std::optional<StoredTensor> stored_scale(const TensorSpec& spec, Storage storage) {
  const bool quantised = spec.role == TensorRole::kMatrix || spec.role == TensorRole::kExpert;
  if (!quantised || storage == Storage::kBf16) return std::nullopt;
  if (spec.role == TensorRole::kExpert && storage == Storage::kFp4)
    return StoredTensor{Dtype::kF8E8M0, {spec.shape[0], ceil_div(spec.shape[1], kFp4Group)}};
  return StoredTensor{storage == Storage::kFp8F32Scales ? Dtype::kF32 : Dtype::kF8E8M0,
                      {ceil_div(spec.shape[0], kBlock), ceil_div(spec.shape[1], kBlock)}};
}

std::string scale_name(const std::string& weight_name) {
  HADAL_CHECK(weight_name.ends_with(".weight"), "scale_name: ", weight_name, " is no weight");
  return weight_name.substr(0, weight_name.size() - 6) + "scale";
}

std::vector<TensorSpec> tensor_table(const ModelConfig& c) {
  std::vector<TensorSpec> table;
  TableBuilder top(table, "", -1);
  top.bf16("embed", Part::kEmbedding, {c.vocab_size, c.dim});
  top.bf16("head", Part::kHead, {c.vocab_size, c.dim});
  add_head_mix(top, c);
  for (int64_t block = 0; block < c.n_blocks(); ++block) {
    const bool is_mtp = block == c.n_layers;
    TableBuilder t(table, is_mtp ? "mtp.0." : concat("layers.", block, "."), block);
    add_block(t, c, c.ratio(block), c.is_hashed(block));
    if (!is_mtp) continue;
    t.matrix("e_proj", Part::kMtpProjection, c.dim, c.dim);
    t.matrix("h_proj", Part::kMtpProjection, c.dim, c.dim);
    t.bf16("enorm", Part::kNorm, {c.dim});
    t.bf16("hnorm", Part::kNorm, {c.dim});
    add_head_mix(t, c);
  }
  add_drafter(table, c);
  return table;
}

Count& Count::operator+=(const Count& other) {
  tensors += other.tensors;
  parameters += other.parameters;
  bytes += other.bytes;
  return *this;
}

Count Census::main_total() const {
  Count sum;
  for (const Count& count : main) sum += count;
  return sum;
}

Count Census::mtp_total() const {
  Count sum;
  for (const Count& count : mtp) sum += count;
  return sum;
}

Count Census::total() const {
  Count sum = main_total();
  return sum += mtp_total();
}

Census take_census(const ModelConfig& config, Storage storage) {
  const auto num_bytes = [](const StoredTensor& tensor) {
    int64_t bytes = dtype_bytes(tensor.dtype);
    for (const int64_t size : tensor.shape) bytes *= size;
    return bytes;
  };
  Census census;
  for (const TensorSpec& spec : tensor_table(config)) {
    Count count{1, spec.trained ? spec.num_elements() : 0, num_bytes(stored_weight(spec, storage))};
    if (const auto scale = stored_scale(spec, storage)) {
      ++count.tensors;
      count.bytes += num_bytes(*scale);
    }
    const auto part = static_cast<size_t>(spec.part);
    (spec.block >= config.n_layers ? census.mtp : census.main)[part] += count;
  }
  const int64_t routed = census.main[static_cast<size_t>(Part::kExperts)].parameters;
  census.active = census.main_total().parameters - routed +
                  routed / config.n_routed_experts * config.n_activated_experts;
  census.active_without_embedding =
      census.active - census.main[static_cast<size_t>(Part::kEmbedding)].parameters;
  return census;
}

}  // namespace hadal::checkpoint
