#include "model/cost.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/math.h"

namespace hadal::model {
namespace {

/// Sums work of all layers by part.
class WorkList {
 public:
  void add(const char* part, Precision precision, double flops) {
    for (Work& work : items_)
      if (work.part == part && work.precision == precision) {
        work.flops += flops;
        return;
      }
    items_.push_back({part, precision, flops});
  }
  std::vector<Work> take() { return std::move(items_); }

 private:
  std::vector<Work> items_;
};

/// Sizes as numbers, so that products cannot overflow.
double d(int64_t value) { return static_cast<double>(value); }

void add_layer(WorkList& list, const ModelConfig& c, int64_t layer, double tokens) {
  const double dim = d(c.dim), heads = d(c.n_heads), width = d(c.head_dim), rank = d(c.q_lora_rank);
  const double index_width = d(c.index_n_heads) * d(c.index_head_dim);
  list.add("attention projections", Precision::kFp8,
           2 * (dim * rank + width * rank * heads + width * dim + d(c.o_lora_rank) * width * heads +
                d(c.o_lora_rank) * d(c.o_groups) * dim));
  const double window = std::min(tokens, d(c.window_size));
  double keys = window;
  if (c.kind(layer) != LayerKind::kWindow) {
    const double ratio = d(c.ratio(layer));
    const bool is_csa = c.kind(layer) == LayerKind::kCsa;
    keys += is_csa ? std::min(d(c.index_topk), tokens / ratio) : tokens / ratio;
    const double columns = d(ModelConfig::overlap(c.ratio(layer)));
    list.add("compressors", Precision::kBf16,
             4 * dim * columns * (width + (is_csa ? d(c.index_head_dim) : 0.0)));
    if (is_csa) {
      list.add("indexer projections", Precision::kFp8, 2 * index_width * rank);
      list.add("indexer projections", Precision::kBf16, 2 * d(c.index_n_heads) * dim);
      list.add("indexer scores", Precision::kFp4, 2 * index_width * tokens / ratio);
    }
  }
  list.add("core attention", Precision::kBf16, 4 * width * heads * keys);
  list.add("router", Precision::kBf16, 2 * dim * d(c.n_routed_experts));
  list.add("experts", Precision::kFp8,
           6 * dim * d(c.moe_inter_dim) * d(c.n_activated_experts + c.n_shared_experts));
  const double streams = d(c.hc_mult);
  // Two sites: the mixing matrix on all streams, then collapse, expand and combine.
  list.add("mHC", Precision::kFp32,
           2 * 2 * (d(c.hc_rows()) * streams * dim + (2 * streams + streams * streams) * dim));
}

}  // namespace

double equivalent_weight(Precision precision) {
  switch (precision) {
    case Precision::kFp8:
      return 1.0;
    case Precision::kBf16:
    case Precision::kFp32:
      return 2.0;
    case Precision::kFp4:
      return 0.5;
  }
  throw Error("equivalent_weight: no such precision");
}

const char* precision_name(Precision precision) {
  constexpr const char* kNames[] = {"FP8", "BF16", "FP4", "FP32"};
  return kNames[static_cast<int>(precision)];
}

double Cost::raw_flops() const {
  double sum = 0;
  for (const Work& item : work) sum += item.flops;
  return sum;
}

double Cost::equivalent_flops() const {
  double sum = 0;
  for (const Work& item : work) sum += item.flops * equivalent_weight(item.precision);
  return sum;
}

int64_t latent_bytes(const ModelConfig& c) {
  const int64_t groups = ceil_div(c.nope_head_dim(), 64);  // one scale byte each
  return align_up(c.nope_head_dim() + 2 * c.rope_head_dim + groups, 8);
}

int64_t index_key_bytes(const ModelConfig& c) {
  return ceil_div(c.index_head_dim, 2) + ceil_div(c.index_head_dim, 32);
}

Cost decode_cost(const ModelConfig& config, int64_t tokens) {
  HADAL_INPUT_CHECK(tokens >= 1, "context must be at least 1 token, found ", tokens);
  WorkList list;
  Cost cost;
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    add_layer(list, config, layer, d(tokens));
    cost.window_bytes += d(config.window_size) * d(latent_bytes(config));
    if (config.kind(layer) == LayerKind::kWindow) continue;
    const bool is_csa = config.kind(layer) == LayerKind::kCsa;
    const int64_t ratio = config.ratio(layer);
    const int64_t entry = latent_bytes(config) + (is_csa ? index_key_bytes(config) : 0);
    cost.kv_bytes_per_token += d(entry) / d(ratio);
    // Values and gate scores in FP32, [overlap * ratio, overlap * width] each.
    const double overlap = d(ModelConfig::overlap(ratio));
    const double width = d(config.head_dim + (is_csa ? config.index_head_dim : 0));
    cost.state_bytes += 2 * 4 * overlap * d(ratio) * overlap * width;
  }
  list.add("head", Precision::kBf16, head_flops(config));
  cost.work = list.take();
  return cost;
}

double head_flops(const ModelConfig& config) { return 2 * d(config.dim) * d(config.vocab_size); }

double block_flops(const ModelConfig& config, int64_t block, int64_t tokens) {
  WorkList list;
  add_layer(list, config, block, d(tokens));
  // e_proj once, h_proj on every stream.
  const double projections = 2 * d(config.dim) * d(config.dim) * (1.0 + d(config.hc_mult));
  return Cost{.work = list.take()}.raw_flops() + (block == config.n_layers ? projections : 0.0);
}

Cost decode_cost_v3_2(int64_t tokens) {
  HADAL_INPUT_CHECK(tokens >= 1, "context must be at least 1 token, found ", tokens);
  constexpr double kLayers = 61, kDense = 3, kDim = 7168, kHeads = 128, kRank = 1536;
  constexpr double kLatent = 512, kRope = 64, kHeadDim = 128, kIndexWidth = 64 * 128, kTopk = 2048;
  WorkList list;
  list.add("attention projections", Precision::kFp8,
           kLayers * 2 *
               (kRank * kDim + kRank * kHeads * (kHeadDim + kRope) + (kLatent + kRope) * kDim +
                kLatent * kHeads * 2 * kHeadDim + kHeadDim * kHeads * kDim));
  list.add("core attention", Precision::kBf16,
           kLayers * 2 * kHeads * std::min(kTopk, d(tokens)) * (kLatent + kRope + kLatent));
  list.add("indexer projections", Precision::kFp8,
           kLayers * 2 * (kIndexWidth * kRank + kHeadDim * kDim));
  list.add("indexer projections", Precision::kBf16, kLayers * 2 * 64 * kDim);
  list.add("indexer scores", Precision::kFp8, kLayers * 2 * kIndexWidth * d(tokens));
  list.add("router", Precision::kBf16, (kLayers - kDense) * 2 * kDim * 256);
  list.add("experts", Precision::kFp8, 6 * kDim * (kDense * 18432 + (kLayers - kDense) * 9 * 2048));
  list.add("head", Precision::kBf16, 2 * kDim * 129280);
  Cost cost;
  cost.work = list.take();
  cost.kv_bytes_per_token = kLayers * (656 + 132);  // FP8 latent with BF16 rotary part; indexer key
  return cost;
}

}  // namespace hadal::model
