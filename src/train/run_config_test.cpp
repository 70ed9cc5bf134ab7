#include "train/run_config.h"

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"

namespace hadal::train {
namespace {

class RunConfigTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = ::testing::TempDir() + "hadal-run-XXXXXX";
    folder_ = mkdtemp(name.data());
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  RunConfig load(const std::string& text) const {
    write_file_atomic(folder_ + "/run.json", text);
    return load_run_config(folder_ + "/run.json");
  }
  std::string error(const std::string& text) const {
    try {
      load(text);
    } catch (const InputError& refusal) {
      return refusal.what();
    }
    return "no error";
  }
  std::string folder_;
};

const std::string kSmallest = R"({
  "model": "m/config.json", "tokenizer": "/t/tokenizer.json", "out": "../runs/x",
  "sources": [{"name": "books", "files": ["a.txt", "/data/b.jsonl.xz"]}],
  "stages": [
    {"name": "dense", "tokens": 1000, "row_length": 64, "attention": "dense",
      "mix": {"books": 1}},
    {"name": "sparse", "tokens": 500, "row_length": 128, "attention": "sparse",
      "mix": {"books": 1}}],
  "learning_rate": {"peak": 0.01},
  "batch": [{"tokens": 256}])";

TEST_F(RunConfigTest, RecomputationIsAPolicyAndForAutoABudget) {
  EXPECT_EQ(load(kSmallest + "}").recompute.policy, RecomputePolicy::kUnset);
  const auto with = [](const std::string& recompute) {
    return kSmallest + ", \"recompute\": " + recompute + "}";
  };
  EXPECT_EQ(load(with(R"({"policy": "norms"})")).recompute.policy, RecomputePolicy::kNorms);
  const RunConfig chooses = load(with(R"({"policy": "auto", "budget_bytes": 1000000})"));
  EXPECT_EQ(chooses.recompute.policy, RecomputePolicy::kAuto);
  EXPECT_EQ(chooses.recompute.budget_bytes, 1000000);
  const std::string file = folder_ + "/run.json: recompute.";
  EXPECT_EQ(error(with(R"({"policy": "all"})")),
            file + "policy: expected none, norms, block or auto, found \"all\"");
  EXPECT_EQ(error(with(R"({"policy": "auto"})")),
            file + "budget_bytes: expected with the policy auto and only there, which needs it");
  EXPECT_EQ(error(with(R"({"policy": "block", "budget_bytes": 5})")),
            file +
                "budget_bytes: expected with the policy auto and only there, which is not asked "
                "for");
  EXPECT_NE(error(with(R"({"policy": "none", "share": 5})")).find("share"), std::string::npos);
}

TEST_F(RunConfigTest, TransformsAreOfTextsAndShares) {
  const auto with = [](const std::string& keys) {
    std::string text = kSmallest + "}";
    const std::string name = "{\"name\": \"books\", ";
    return text.replace(text.find(name), name.size(), name + keys + ", ");
  };
  EXPECT_FALSE(load(kSmallest + "}").sources[0].transforms.any());
  const RunConfig config = load(with(R"("fim_rate": 0.1, "split_rate": 0.2)"));
  EXPECT_EQ(config.sources[0].transforms.fim_rate, 0.1);
  EXPECT_EQ(config.sources[0].transforms.split_rate, 0.2);
  EXPECT_EQ(config.sources[0].transforms.seed, config.seed);
  const std::string file = folder_ + "/run.json: sources[0].";
  EXPECT_EQ(error(with(R"("kind": "conversations", "fim_rate": 0.1)")),
            file + "fim_rate: for sources of kind text, found one of conversations");
  EXPECT_NE(error(with(R"("split_rate": 1.5)")).find("split_rate"), std::string::npos);
}

TEST_F(RunConfigTest, DefaultsAreThoseOfTheDocumentation) {
  const RunConfig config = load(kSmallest + "}");
  const std::filesystem::path base(folder_);
  EXPECT_EQ(config.model, (base / "m/config.json").string());
  EXPECT_EQ(config.tokenizer, "/t/tokenizer.json");
  EXPECT_EQ(config.out, (base.parent_path() / "runs/x").string());
  EXPECT_EQ(config.cache, config.out + "/tokens");
  EXPECT_EQ(config.device, "auto");
  EXPECT_EQ(config.seed, 1U);
  EXPECT_FALSE(config.optimizer.bf16_expert_gradients);
  EXPECT_EQ(config.init_std, 0.006);
  EXPECT_EQ(config.init_checkpoint, "");
  EXPECT_EQ(config.sources[0].kind, data::SourceKind::kText);
  EXPECT_EQ(config.sources[0].field, "text");
  EXPECT_EQ(config.sources[0].files[0], folder_ + "/a.txt");
  EXPECT_EQ(config.sources[0].files[1], "/data/b.jsonl.xz");
  EXPECT_EQ(config.stages[0].numerics, ops::Numerics::kBf16);
  EXPECT_EQ(config.stages[0].learning_rate, 0.0);
  EXPECT_EQ(config.total_tokens(), 1500);
  EXPECT_EQ(config.schedule.learning_rate.final_rate, 0.001);
  EXPECT_EQ(config.schedule.learning_rate.warmup_tokens, 0);
  EXPECT_EQ(config.schedule.learning_rate.decay_start_tokens, 1500);
  EXPECT_EQ(config.schedule.learning_rate.decay_end_tokens, 1500);
  EXPECT_EQ(config.schedule.mtp_weight, 0.3);
  EXPECT_EQ(config.schedule.mtp_weight_decay, 0.1);
  EXPECT_EQ(config.micro_batch_tokens, 256);
  EXPECT_EQ(config.balance_weight, 1e-4);
  EXPECT_EQ(config.index_weight, 0.01);
  EXPECT_EQ(config.router_bias_speed, 0.001);
  EXPECT_EQ(config.clip_norm, 1.0);
  EXPECT_EQ(config.optimizer.weight_decay, 0.1);
  EXPECT_EQ(config.optimizer.muon_momentum, 0.95);
  EXPECT_EQ(config.optimizer.muon_update_rms, 0.18);
  EXPECT_EQ(config.optimizer.adam_beta1, 0.9);
  EXPECT_EQ(config.optimizer.adam_beta2, 0.95);
  EXPECT_EQ(config.optimizer.adam_eps, 1e-20);
  EXPECT_FALSE(config.optimizer.low_precision_muon);
  EXPECT_EQ(config.validation.source, "");
  EXPECT_EQ(config.checkpoint.every_steps, 0);
  EXPECT_EQ(config.checkpoint.every_seconds, 300.0);
  EXPECT_EQ(config.checkpoint.keep, 2);
  EXPECT_EQ(config.export_shard_bytes, int64_t{4} << 30);
  EXPECT_EQ(config.log_every_steps, 1);
  EXPECT_EQ(config.count_clamps_every_steps, 50);

  const RunConfig validated =
      load(kSmallest + R"(, "validation": {"source": "books", "every_tokens": 100}})");
  EXPECT_EQ(validated.validation.rows, 8);
  EXPECT_EQ(validated.validation.row_length, 128) << "that of the last stage";
}

TEST_F(RunConfigTest, EveryDefectNamesItsKey) {
  const auto replaced = [](const std::string& from, const std::string& to) {
    std::string text = kSmallest + "}";
    const size_t place = text.find(from);
    EXPECT_NE(place, std::string::npos) << from;
    return text.replace(place, from.size(), to);
  };
  const auto names = [&](const std::string& text, const std::string& key) {
    const std::string message = error(text);
    EXPECT_NE(message.find(key), std::string::npos) << message;
    EXPECT_EQ(message.rfind(folder_ + "/run.json", 0), 0U) << message;
  };
  names(kSmallest + R"(, "clip": 1})", "clip");
  names(kSmallest + R"(, "optimizer": {"eps": 1}})", "optimizer.eps");
  names(kSmallest + R"(, "objective": {"mtp": 1}})", "objective.mtp");
  names(kSmallest + R"(, "checkpoint": {"keep": 0}})", "checkpoint.keep");
  names(kSmallest + R"(, "validation": {"source": "books"}})", "validation.every_tokens");
  names(kSmallest + R"(, "init": {"checkpoint": "x", "seed": 1}})", "init.seed");
  names(kSmallest + R"(, "device": "tpu"})", "device");
  names(kSmallest + R"(, "clip_norm": "1"})", "clip_norm");
  names(replaced("\"peak\": 0.01", "\"peak\": -1"), "learning_rate.peak");
  names(replaced("\"peak\": 0.01", "\"final\": 1"), "learning_rate.peak");
  names(replaced("\"peak\": 0.01", "\"peak\": 0.01, \"final\": 1"), "learning_rate.final");
  names(replaced("\"name\": \"books\"", "\"name\": \"b/s\""), "sources[0].name");
  names(replaced("\"attention\": \"dense\"", "\"attention\": 3"), "stages[0].attention");
  names(replaced("\"row_length\": 128", "\"row_length\": 1"), "stages[1].row_length");
  names(replaced("\"row_length\": 128", "\"row_length\": 128, \"numerics\": \"fp3\""),
        "stages[1].numerics");
  names(replaced("[{\"tokens\": 256}]", "[{\"tokens\": 256}, {\"from_tokens\": 0, \"tokens\": 1}]"),
        "batch");
  names(replaced("[{\"tokens\": 256}]", "[]"), "batch");
}

TEST_F(RunConfigTest, TheRecipeOfTheProjectIsValid) {
  const std::string folder = HADAL_SOURCE_DIR "/recipes/hadal-nano";
  const RunConfig config = load_run_config(folder + "/pretrain.json");
  EXPECT_EQ(config.model, folder + "/config.json");
  EXPECT_GT(config.total_tokens(), 0);
}

}  // namespace
}  // namespace hadal::train
