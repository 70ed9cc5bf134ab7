// What a run's model becomes: refused at the start where it could not be written at the end,
// exported whenever somebody asks, and true about what it was trained on.
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/official.h"
#include "cli_fixture.h"
#include "model/config.h"
#include "testing/tiny_model.h"
#include "testing/tiny_tokenizer.h"

namespace hadal {
namespace {

namespace fs = std::filesystem;
using checkpoint::OfficialCheckpoint;

class TrainExport : public CliFixture {
 protected:
  void SetUp() override {
    CliFixture::SetUp();
    write("tokenizer.json", testing::byte_tokenizer_json());
    std::string text(2000, 'x');
    text += " and the rest";
    write("text.txt", text);
  }
  std::string path(const std::string& name) const { return folder_ / name; }

  /// Widths that no released format takes.
  static model::ModelConfig narrow() {
    model::ModelConfig config = testing::tiny_config();
    config.vocab_size = testing::byte_tokenizer_size();
    config.head_dim = 32;
    config.rope_head_dim = 16;
    config.max_position_embeddings = 4096;
    config.trained_length = 4096;
    config.quantized = false;
    config.expert_dtype = model::ExpertDtype::kBf16;
    return config;
  }
  void write_run(const model::ModelConfig& config, const std::vector<int64_t>& row_lengths) const {
    write("config.json", model::to_config_json(config));
    std::string stages;
    for (const int64_t length : row_lengths)
      stages += concat(stages.empty() ? "" : ",", R"({"name": "s)", length,
                       R"(", "tokens": 128, "row_length": )", length,
                       R"(, "attention": "sparse", "numerics": "bf16", "mix": {"a": 1}})");
    write("run.json",
          concat(R"({"model": "config.json", "tokenizer": "tokenizer.json", "out": "out",
      "device": "cpu", "sources": [{"name": "a", "files": ["text.txt"]}], "stages": [)",
                 stages, R"(], "batch": [{"tokens": 64}], "learning_rate": {"peak": 0.001}})"));
  }
};

TEST_F(TrainExport, WhatCannotBeWrittenIsRefusedAtTheStart) {
  model::ModelConfig config = narrow();
  config.quantized = true;
  config.expert_dtype = model::ExpertDtype::kFp4;
  write_run(config, {32});
  const CliResult result = run("train " + path("run.json"));
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(result.error.find("quantization_config asks for a model in FP8 and FP4"),
            std::string::npos)
      << result.error;
  EXPECT_NE(result.error.find("32 - 16"), std::string::npos) << result.error;
  EXPECT_FALSE(fs::exists(path("out")));
}

TEST_F(TrainExport, TrainedLengthIsThatOfTheRows) {
  write_run(narrow(), {32});
  const auto trained_length = [&](const std::string& model) {
    return OfficialCheckpoint::open(path(model)).config().trained_length;
  };
  const CliResult first = run("train " + path("run.json"));
  ASSERT_EQ(first.code, 0) << first.error;
  EXPECT_EQ(trained_length("out/model"), 32);
  // Asked for by itself, it is the same model.
  const CliResult exported = run("train " + path("run.json") + " --export " + path("mine"));
  ASSERT_EQ(exported.code, 0) << exported.error;
  for (const char* file : {"/model.safetensors", "/config.json", "/tokenizer.json"})
    EXPECT_EQ(read_file(path("mine") + file), read_file(path("out/model") + file)) << file;
  const CliResult twice = run("train " + path("run.json") + " --export " + path("mine"));
  EXPECT_EQ(twice.code, 2);
  const CliResult official =
      run("train " + path("run.json") + " --export " + path("fp8") + " --to official");
  EXPECT_EQ(official.code, 2);
  EXPECT_NE(official.error.find("32 - 16"), std::string::npos) << official.error;
  EXPECT_FALSE(fs::exists(path("fp8")));
  // A stage that has not begun does not count.
  write_run(narrow(), {32, 64});
  const CliResult stopped = run("train " + path("run.json") + " --max-seconds 0.000001");
  EXPECT_EQ(stopped.code, 1) << stopped.error;
  ASSERT_EQ(run("train " + path("run.json") + " --export " + path("early")).code, 0);
  EXPECT_EQ(trained_length("early"), 32);
  const CliResult second = run("train " + path("run.json"));
  ASSERT_EQ(second.code, 0) << second.error;
  EXPECT_EQ(trained_length("out/model"), 64);
}

TEST_F(TrainExport, ARunWithoutCheckpointHasNothingToExport) {
  write_run(narrow(), {32});
  const CliResult result = run("train " + path("run.json") + " --export " + path("mine"));
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(result.error.find("no checkpoint to export"), std::string::npos) << result.error;
}

TEST_F(TrainExport, AModelThatNoMemoryHoldsIsRefusedBeforeAnythingIsAllocated) {
  model::ModelConfig config = narrow();
  config.dim = 65536;
  config.moe_inter_dim = 65536;
  config.n_routed_experts = 1024;
  write_run(config, {32});
  const CliResult result = run("train " + path("run.json"));
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(result.error.find("GiB for weights, gradients and the optimizer"), std::string::npos)
      << result.error;
}

}  // namespace
}  // namespace hadal
