#include "model/config_forms.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "base/check.h"

namespace hadal::model {
namespace {

constexpr int64_t kAny = int64_t{1} << 62;  // ranges are validate()'s business
constexpr const char* kSliding = "sliding_attention";
constexpr const char* kSparse = "compressed_sparse_attention";
constexpr const char* kHeavy = "heavily_compressed_attention";

std::string bracketed(const std::vector<int64_t>& values) {
  std::string text = "[";
  for (const int64_t value : values) text += concat(text.size() > 1 ? ", " : "", value);
  return text + "]";
}

/// The ratio of each kind of layer, as transformers names them.
std::map<std::string, int64_t> ratios_by_type(const JsonObject& root) {
  std::map<std::string, int64_t> ratios = {{kSliding, 0}, {kSparse, 4}, {kHeavy, 128}};
  if (!root.has("compress_rates")) return ratios;
  const JsonObject rates = root.object("compress_rates");
  for (const char* type : {kSparse, kHeavy})
    ratios[type] = rates.integer_or(type, ratios[type], 1, kAny);
  rates.expect_all_read();
  HADAL_INPUT_CHECK(ratios[kSparse] == 4, rates.where(kSparse), ": only 4 is implemented, found ",
                    ratios[kSparse]);
  HADAL_INPUT_CHECK(ratios[kHeavy] != 4, rates.where(kHeavy),
                    ": 4 is the rate of the sparse layers");
  return ratios;
}

/// [n_layers]: the ratios that layer_types asks for.
std::vector<int64_t> ratios_of_types(const JsonObject& root) {
  const std::map<std::string, int64_t> ratios = ratios_by_type(root);
  std::vector<int64_t> result;
  for (const std::string& type : root.strings("layer_types")) {
    const auto found = ratios.find(type);
    HADAL_INPUT_CHECK(found != ratios.end(), root.where("layer_types"), ": expected ", kSliding,
                      ", ", kSparse, " or ", kHeavy, ", found ", json_quote(type));
    result.push_back(found->second);
  }
  return result;
}

int64_t hash_layers_of_types(const JsonObject& root) {
  int64_t hashed = 0, layer = 0;
  for (const std::string& type : root.strings("mlp_layer_types")) {
    HADAL_INPUT_CHECK(type == "hash_moe" || type == "moe", root.where("mlp_layer_types"),
                      ": expected hash_moe or moe, found ", json_quote(type));
    if (type == "hash_moe") {
      HADAL_INPUT_CHECK(hashed == layer, root.where("mlp_layer_types"), ": layer ", layer,
                        " is hash_moe after a moe layer; only the first layers can be hashed");
      ++hashed;
    }
    ++layer;
  }
  return hashed;
}

void check_count(const JsonObject& root, const char* key, size_t found, int64_t expected) {
  HADAL_INPUT_CHECK(static_cast<int64_t>(found) == expected, root.where(key), ": ", found,
                    " entries, num_hidden_layers is ", expected);
}

/// Two keys of one meaning.
void expect_same(const JsonObject& a,
                 const char* key,
                 double left,
                 const JsonObject& b,
                 const char* other,
                 double right) {
  HADAL_INPUT_CHECK(left == right, a.where(key), " is ", left, ", but ", b.where(other), " is ",
                    right);
}

void read_yarn(const JsonObject& rope, ModelConfig& config) {
  config.rope_factor = rope.number("factor");
  config.beta_fast = rope.number("beta_fast");
  config.beta_slow = rope.number("beta_slow");
  config.original_seq_len = rope.integer("original_max_position_embeddings", -kAny, kAny);
}

std::string rope_type(const JsonObject& rope) {
  const bool old_spelling = rope.has("type");
  if (old_spelling && rope.has("rope_type"))
    HADAL_INPUT_CHECK(rope.string("type") == rope.string("rope_type"), rope.where("type"), " is ",
                      json_quote(rope.string("type")), " but rope_type is ",
                      json_quote(rope.string("rope_type")));
  return rope.string(old_spelling ? "type" : "rope_type");
}

/// transformers' {main: {rope_theta}, compress: {rope_theta, YaRN}}.
void read_rope_parameters(const JsonObject& root, ModelConfig& config) {
  const JsonObject both = root.object("rope_parameters");
  const JsonObject main = both.object("main"), compress = both.object("compress");
  both.expect_all_read();
  HADAL_INPUT_CHECK(rope_type(main) == "default", main.where("rope_type"),
                    ": only \"default\" is implemented, found ", json_quote(rope_type(main)));
  config.rope_theta = main.number("rope_theta");
  config.compress_rope_theta = compress.number("rope_theta");
  const std::string type = rope_type(compress);
  if (type == "default") {
    // Plain rotation: YaRN that stretches nothing.
    config.rope_factor = 1.0;
    config.original_seq_len = config.max_position_embeddings;
  } else {
    HADAL_INPUT_CHECK(type == "yarn", compress.where("rope_type"),
                      ": only \"yarn\" and \"default\" are implemented, found ", json_quote(type));
    read_yarn(compress, config);
    // Without this key transformers multiplies the rotation by a factor that no V4 has.
    const double factor = compress.number("attention_factor");
    HADAL_INPUT_CHECK(factor == 1.0, compress.where("attention_factor"),
                      ": only 1 is implemented, found ", factor);
    HADAL_INPUT_CHECK(compress.boolean_or("truncate", true), compress.where("truncate"),
                      ": only true is implemented");
  }
  for (const JsonObject& rope : {main, compress}) {
    if (rope.has("partial_rotary_factor"))
      expect_same(rope, "partial_rotary_factor",
                  rope.number("partial_rotary_factor") * static_cast<double>(config.head_dim), root,
                  "qk_rope_head_dim", static_cast<double>(config.rope_head_dim));
    rope.expect_all_read();
  }
  if (root.has("rope_theta"))
    expect_same(root, "rope_theta", root.number("rope_theta"), main, "rope_theta",
                config.rope_theta);
  if (root.has("compress_rope_theta"))
    expect_same(root, "compress_rope_theta", root.number("compress_rope_theta"), compress,
                "rope_theta", config.compress_rope_theta);
}

void read_rope_scaling(const JsonObject& root, ModelConfig& config) {
  config.rope_theta = root.number("rope_theta");
  config.compress_rope_theta = root.number("compress_rope_theta");
  const JsonObject rope = root.object("rope_scaling");
  const std::string type = rope_type(rope);
  HADAL_INPUT_CHECK(type == "yarn", rope.where(rope.has("type") ? "type" : "rope_type"),
                    ": only \"yarn\" is implemented, found ", json_quote(type));
  read_yarn(rope, config);
  rope.expect_all_read();
}

}  // namespace

void read_layer_kinds(const JsonObject& root, ModelConfig& config) {
  const bool official = root.has("compress_ratios");
  if (official || !root.has("layer_types")) {
    config.compress_ratios = root.integers("compress_ratios", 0, kAny);
  }
  if (root.has("layer_types")) {
    std::vector<int64_t> ratios = ratios_of_types(root);
    check_count(root, "layer_types", ratios.size(), config.n_layers);
    if (official) {
      const std::vector<int64_t>& all = config.compress_ratios;
      HADAL_INPUT_CHECK(
          all.size() >= ratios.size() && std::equal(ratios.begin(), ratios.end(), all.begin()),
          root.where("layer_types"), " are the ratios ", bracketed(ratios),
          ", but compress_ratios is ", bracketed(all));
    } else {
      // transformers has no entry for the MTP block, which is a window layer in every V4.
      ratios.resize(ratios.size() +
                    static_cast<size_t>(std::clamp<int64_t>(config.n_mtp_layers, 0, 1)));
      config.compress_ratios = std::move(ratios);
    }
  } else if (root.has("compress_rates")) {
    ratios_by_type(root);
  }
  if (root.has("num_hash_layers") || !root.has("mlp_layer_types"))
    config.n_hash_layers = root.integer("num_hash_layers", -kAny, kAny);
  if (!root.has("mlp_layer_types")) return;
  const int64_t hashed = hash_layers_of_types(root);
  check_count(root, "mlp_layer_types", root.strings("mlp_layer_types").size(), config.n_layers);
  if (root.has("num_hash_layers"))
    HADAL_INPUT_CHECK(std::min(config.n_hash_layers, config.n_layers) == hashed,
                      root.where("mlp_layer_types"), " has ", hashed,
                      " hash_moe layers, but num_hash_layers is ", config.n_hash_layers);
  else
    config.n_hash_layers = hashed;
}

void read_rope(const JsonObject& root, ModelConfig& config) {
  if (root.has("qk_rope_head_dim") || !root.has("partial_rotary_factor")) {
    config.rope_head_dim = root.integer("qk_rope_head_dim", -kAny, kAny);
  } else {
    const double dims =
        root.number("partial_rotary_factor", 0.0, 1.0) * static_cast<double>(config.head_dim);
    HADAL_INPUT_CHECK(dims == std::floor(dims), root.where("partial_rotary_factor"), ": ", dims,
                      " of head_dim ", config.head_dim, " dims is no whole number");
    config.rope_head_dim = static_cast<int64_t>(dims);
  }
  if (root.has("partial_rotary_factor"))
    expect_same(root, "partial_rotary_factor",
                root.number("partial_rotary_factor") * static_cast<double>(config.head_dim), root,
                "qk_rope_head_dim", static_cast<double>(config.rope_head_dim));
  if (!root.has("rope_parameters")) return read_rope_scaling(root, config);
  read_rope_parameters(root, config);
  if (!root.has("rope_scaling")) return;
  ModelConfig other = config;
  read_rope_scaling(root, other);
  HADAL_INPUT_CHECK(other == config, root.where("rope_parameters"),
                    " and rope_scaling say different things");
}

void read_drafter(const JsonObject& root, ModelConfig& config) {
  const int64_t block = root.integer_or("dspark_block_size", 0, 0, kAny);
  const int64_t stages = root.integer_or("n_mtp_layers", 0, 0, kAny);
  const int64_t noise = root.integer_or("dspark_noise_token_id", 0, -kAny, kAny);
  const int64_t rank = root.integer_or("dspark_markov_rank", 256, -kAny, kAny);
  std::vector<int64_t> targets;
  if (root.has("dspark_target_layer_ids"))
    targets = root.integers("dspark_target_layer_ids", 0, kAny);
  if (block == 0) return;
  DsparkConfig& drafter = config.drafter;
  drafter.block_size = block;
  drafter.noise_token_id = noise;
  drafter.markov_rank = rank;
  drafter.target_layers = std::move(targets);
  // num_nextn_predict_layers says 1 beside three stages: it does not count them.
  config.n_mtp_layers = 0;
  if (!root.has("compress_ratios")) {
    drafter.n_stages = stages;
    config.compress_ratios.resize(static_cast<size_t>(config.n_layers));
    return;
  }
  std::vector<int64_t>& ratios = config.compress_ratios;
  HADAL_INPUT_CHECK(static_cast<int64_t>(ratios.size()) > config.n_layers,
                    root.where("compress_ratios"), ": ", ratios.size(),
                    " entries leave none behind num_hidden_layers ", config.n_layers,
                    " for the stages of the drafter (dspark_block_size ", block, ")");
  drafter.n_stages = static_cast<int64_t>(ratios.size()) - config.n_layers;
  HADAL_INPUT_CHECK(stages == 0 || stages == drafter.n_stages, root.where("n_mtp_layers"), ": ",
                    stages, " stages, but compress_ratios has ", drafter.n_stages,
                    " entries behind num_hidden_layers");
  for (auto ratio = ratios.begin() + config.n_layers; ratio != ratios.end(); ++ratio)
    HADAL_INPUT_CHECK(*ratio == 0, root.where("compress_ratios"),
                      ": stages of a drafter have ratio 0, found ", *ratio);
  ratios.resize(static_cast<size_t>(config.n_layers));
}

}  // namespace hadal::model
