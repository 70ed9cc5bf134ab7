#include "train/run_config.h"

#include <filesystem>
#include <set>

#include "base/check.h"
#include "base/json.h"

namespace hadal::train {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 50;

class Reader {
 public:
  explicit Reader(const std::string& path)
      : folder_(std::filesystem::path(path).parent_path()), json_(JsonObject::load(path)) {
    config_.path = path;
  }

  RunConfig read() {
    paths();
    sources();
    stages();
    schedule();
    optimizer();
    recompute();
    mesh();
    extras();
    json_.expect_all_read();
    return std::move(config_);
  }

 private:
  std::string resolve(const std::string& path) const {
    return path.empty() ? path : (folder_ / path).lexically_normal().string();
  }

  void paths() {
    config_.model = resolve(json_.string("model"));
    config_.tokenizer = resolve(json_.string("tokenizer"));
    config_.out = resolve(json_.string("out"));
    config_.cache = resolve(json_.string_or("cache", json_.string("out") + "/tokens"));
    config_.device = json_.string_or("device", "auto");
    HADAL_INPUT_CHECK(
        config_.device == "auto" || config_.device == "cpu" || config_.device == "cuda",
        json_.where("device"), ": expected auto, cpu or cuda, found \"", config_.device, "\"");
    config_.seed = static_cast<uint64_t>(json_.integer_or("seed", 1, 0, INT64_MAX));
    config_.optimizer.seed = config_.seed;
    if (json_.has("init")) {
      const JsonObject init = json_.object("init");
      config_.init_std = init.number_or("std", 0.006, 0.0, 10.0);
      config_.init_checkpoint = resolve(init.string_or("checkpoint", ""));
      init.expect_all_read();
    }
  }

  void sources() {
    std::set<std::string> names;
    for (const JsonObject& item : json_.objects("sources")) {
      data::SourceSpec spec;
      spec.name = item.string("name");
      HADAL_INPUT_CHECK(
          !spec.name.empty() &&
              spec.name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                          "0123456789-_") == std::string::npos,
          item.where("name"), ": expected letters, digits, - and _, found \"", spec.name, "\"");
      HADAL_INPUT_CHECK(names.insert(spec.name).second, item.where("name"), ": a second source \"",
                        spec.name, "\"");
      const std::string kind = item.string_or("kind", "text");
      HADAL_INPUT_CHECK(kind == "text" || kind == "conversations", item.where("kind"),
                        ": expected text or conversations, found \"", kind, "\"");
      spec.kind = kind == "text" ? data::SourceKind::kText : data::SourceKind::kConversation;
      spec.field = item.string_or("field", "text");
      transforms(item, spec);
      for (const std::string& file : item.strings("files")) spec.files.push_back(resolve(file));
      HADAL_INPUT_CHECK(!spec.files.empty(), item.where("files"), ": no files");
      item.expect_all_read();
      config_.sources.push_back(std::move(spec));
    }
    HADAL_INPUT_CHECK(!config_.sources.empty(), json_.where("sources"), ": no sources");
  }

  void transforms(const JsonObject& item, data::SourceSpec& spec) {
    for (const char* key : {"fim_rate", "split_rate"}) {
      HADAL_INPUT_CHECK(spec.kind == data::SourceKind::kText || !item.has(key), item.where(key),
                        ": for sources of kind text, found one of conversations");
    }
    if (spec.kind != data::SourceKind::kText) return;
    spec.transforms = {.fim_rate = item.number_or("fim_rate", 0.0, 0.0, 1.0),
                       .split_rate = item.number_or("split_rate", 0.0, 0.0, 1.0),
                       .seed = config_.seed};
  }

  static ops::Numerics numerics(const JsonObject& item) {
    try {
      return ops::parse_numerics(item.string_or("numerics", "bf16"));
    } catch (const InputError& error) {
      throw InputError(concat(item.where("numerics"), ": ", error.what()));
    }
  }

  void stages() {
    for (const JsonObject& item : json_.objects("stages")) {
      Stage stage;
      stage.name = item.string("name");
      stage.tokens = item.integer("tokens", 1, kMaxTokens);
      stage.row_length = item.integer("row_length", 2, int64_t{1} << 24);
      stage.mode = parse_attention_mode(item.string("attention"), item.where("attention"));
      stage.numerics = numerics(item);
      stage.learning_rate = item.number_or("learning_rate", 0.0, 0.0, 1.0);
      const JsonObject mix = item.object("mix");
      for (const std::string& name : mix.keys()) {
        config_.source(name);
        stage.mix.emplace_back(name, mix.number(name, 0.0, 1e9));
      }
      double total = 0.0;
      for (const auto& [name, share] : stage.mix) total += share;
      HADAL_INPUT_CHECK(total > 0.0, item.where("mix"), ": shares sum to 0");
      mix.expect_all_read();
      item.expect_all_read();
      config_.stages.push_back(std::move(stage));
    }
    HADAL_INPUT_CHECK(!config_.stages.empty(), json_.where("stages"), ": no stages");
  }

  void schedule() {
    const JsonObject rate = json_.object("learning_rate");
    LearningRate& out = config_.schedule.learning_rate;
    out.peak = rate.number("peak", 0.0, 1.0);
    out.final_rate = rate.number_or("final", out.peak / 10.0, 0.0, out.peak);
    out.warmup_tokens = rate.integer_or("warmup_tokens", 0, 0, kMaxTokens);
    out.decay_end_tokens =
        rate.integer_or("decay_end_tokens", config_.total_tokens(), 1, kMaxTokens);
    out.decay_start_tokens =
        rate.integer_or("decay_start_tokens", out.decay_end_tokens, 0, kMaxTokens);
    HADAL_INPUT_CHECK(out.decay_start_tokens <= out.decay_end_tokens,
                      rate.where("decay_start_tokens"), ": ", out.decay_start_tokens,
                      " lies behind decay_end_tokens, ", out.decay_end_tokens);
    rate.expect_all_read();
    for (const JsonObject& item : json_.objects("batch")) {
      config_.schedule.batch.push_back(
          {.from_tokens = item.integer_or("from_tokens", 0, 0, kMaxTokens),
           .tokens = item.integer("tokens", 1, int64_t{1} << 40)});
      item.expect_all_read();
    }
    const std::vector<BatchRamp>& batch = config_.schedule.batch;
    HADAL_INPUT_CHECK(!batch.empty() && batch.front().from_tokens == 0, json_.where("batch"),
                      ": the first entry must begin at 0 tokens");
    for (size_t i = 1; i < batch.size(); ++i) {
      HADAL_INPUT_CHECK(batch[i - 1].from_tokens < batch[i].from_tokens, json_.where("batch"),
                        ": from_tokens must ascend");
    }
    config_.micro_batch_tokens =
        json_.integer_or("micro_batch_tokens", batch.front().tokens, 1, int64_t{1} << 40);
  }

  void optimizer() {
    if (json_.has("objective")) {
      const JsonObject item = json_.object("objective");
      config_.schedule.mtp_weight = item.number_or("mtp_weight", 0.3, 0.0, 100.0);
      config_.schedule.mtp_weight_decay = item.number_or("mtp_weight_decay", 0.1, 0.0, 100.0);
      config_.balance_weight = item.number_or("balance_weight", 1e-4, 0.0, 100.0);
      config_.index_weight = item.number_or("index_weight", 0.01, 0.0, 100.0);
      config_.router_bias_speed = item.number_or("router_bias_speed", 0.001, 0.0, 1.0);
      item.expect_all_read();
    }
    config_.clip_norm = json_.number_or("clip_norm", 1.0, 0.0, 1e9);
    if (!json_.has("optimizer")) return;
    const JsonObject item = json_.object("optimizer");
    OptimizerParams& out = config_.optimizer;
    out.weight_decay = item.number_or("weight_decay", out.weight_decay, 0.0, 10.0);
    out.muon_momentum = item.number_or("muon_momentum", out.muon_momentum, 0.0, 0.99999);
    out.muon_update_rms = item.number_or("muon_update_rms", out.muon_update_rms, 0.0, 10.0);
    out.adam_beta1 = item.number_or("adam_beta1", out.adam_beta1, 0.0, 0.99999);
    out.adam_beta2 = item.number_or("adam_beta2", out.adam_beta2, 0.0, 0.99999);
    out.adam_eps = item.number_or("adam_eps", out.adam_eps, 0.0, 1.0);
    out.low_precision_muon = item.boolean_or("low_precision_muon", out.low_precision_muon);
    const std::string experts = item.string_or("expert_gradients", "fp32");
    HADAL_INPUT_CHECK(experts == "fp32" || experts == "bf16", item.where("expert_gradients"),
                      ": expected fp32 or bf16, found \"", experts, "\"");
    out.bf16_expert_gradients = experts == "bf16";
    item.expect_all_read();
  }

  void recompute() {
    if (!json_.has("recompute")) return;
    const JsonObject item = json_.object("recompute");
    RecomputeSpec& out = config_.recompute;
    out.policy = parse_recompute_policy(item.string("policy"), item.where("policy"));
    const bool chooses = out.policy == RecomputePolicy::kAuto;
    HADAL_INPUT_CHECK(chooses == item.has("budget_bytes"), item.where("budget_bytes"),
                      ": expected with the policy auto and only there, which ",
                      chooses ? "needs it" : "is not asked for");
    if (chooses) out.budget_bytes = item.integer("budget_bytes", 1, int64_t{1} << 50);
    item.expect_all_read();
  }

  void mesh() {
    if (!json_.has("mesh")) return;
    const JsonObject item = json_.object("mesh");
    config_.mesh.pipeline = item.integer_or("pipeline", 1, 1, 1 << 16);
    config_.mesh.context = item.integer_or("context", 1, 1, 1 << 16);
    if (item.has("pipeline_layers")) {
      config_.pipeline_layers = item.integers("pipeline_layers", 1, 1 << 16);
      HADAL_INPUT_CHECK(std::ssize(config_.pipeline_layers) == config_.mesh.pipeline,
                        item.where("pipeline_layers"), ": expected layers of ",
                        config_.mesh.pipeline, " stages, as mesh.pipeline says, found ",
                        config_.pipeline_layers.size());
    }
    item.expect_all_read();
  }

  void extras() {
    if (json_.has("validation")) {
      const JsonObject item = json_.object("validation");
      config_.validation.source = item.string("source");
      config_.source(config_.validation.source);
      config_.validation.rows = item.integer_or("rows", 8, 1, 1 << 20);
      config_.validation.row_length =
          item.integer_or("row_length", config_.stages.back().row_length, 2, int64_t{1} << 24);
      config_.validation.every_tokens = item.integer("every_tokens", 1, kMaxTokens);
      item.expect_all_read();
    }
    if (json_.has("checkpoint")) {
      const JsonObject item = json_.object("checkpoint");
      config_.checkpoint.every_steps = item.integer_or("every_steps", 0, 0, kMaxTokens);
      config_.checkpoint.every_seconds = item.number_or("every_seconds", 300.0, 0.0, 1e9);
      config_.checkpoint.keep = item.integer_or("keep", 2, 1, 1000);
      config_.checkpoint.asynchronous = item.boolean_or("asynchronous", true);
      item.expect_all_read();
    }
    config_.export_shard_bytes = json_.integer_or("export_shard_bytes", config_.export_shard_bytes,
                                                  1 << 16, int64_t{1} << 50);
    config_.log_every_steps = json_.integer_or("log_every_steps", 1, 1, 1 << 20);
    config_.count_clamps_every_steps = json_.integer_or("count_clamps_every_steps", 50, 0, 1 << 20);
  }

  std::filesystem::path folder_;
  JsonObject json_;
  RunConfig config_;
};

}  // namespace

int64_t RunConfig::total_tokens() const {
  int64_t total = 0;
  for (const Stage& stage : stages) total += stage.tokens;
  return total;
}

int32_t RunConfig::source_index(const std::string& name) const {
  for (size_t i = 0; i < sources.size(); ++i) {
    if (sources[i].name == name) return static_cast<int32_t>(i);
  }
  throw InputError(concat(path, ": no source is called \"", name, "\""));
}

const data::SourceSpec& RunConfig::source(const std::string& name) const {
  return sources[static_cast<size_t>(source_index(name))];
}

RunConfig load_run_config(const std::string& path) { return Reader(path).read(); }

}  // namespace hadal::train
