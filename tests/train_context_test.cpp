// hadal train on a mesh whose ranks share the places of rows: the bits of one rank, saved on one
// mesh and resumed on another, and misused (docs/parallelism.md).
#include <string>
#include <thread>
#include <vector>

#include "train_fixture.h"

namespace hadal {
namespace {

class TrainContext : public TrainSharedCli {
 protected:
  static constexpr int64_t kSteps = 4;  ///< or more: one a stage, and one that goes on in a stage

  void SetUp() override {
    TrainCli::SetUp();
    model::ModelConfig config = train_config();
    config.hc_mult = 4;
    config.window_size = 128;
    write("context.json", model::to_config_json(config));
    std::string longer;  // a sample longer than any rank's part of a row
    for (int word = 0; word < 300; ++word) longer += concat("v", word * word % 23, ' ');
    write("b.txt", longer);
  }

  /// Three stages of a few rows of 512 tokens; three rows a step in the first, two in the others.
  Json shared_run(const std::string& name) const override {
    Json run = run_json(name);
    run["model"] = "context.json";
    run["batch"] = Json::parse(
        R"([{"from_tokens": 0, "tokens": 1536}, {"from_tokens": 1536, "tokens": 1024}])");
    for (Json& stage : run["stages"]) {
      stage["row_length"] = 512;
      stage["tokens"] = 1500;
    }
    run["checkpoint"]["keep"] = 100;
    return run;
  }
};

TEST_F(TrainContext, EndsWithTheBitsOfOneRank) {
  train_whole(kSteps);
  const CliResult two = train(config_of("two", {{"context", 2}}), "--ranks 2");
  ASSERT_EQ(two.code, 0) << two.error;
  EXPECT_NE(two.error.find("mesh: context 2"), std::string::npos) << two.error;
  expect_same_results(out("whole"), out("two"));
  const CliResult four = train(config_of("four", {{"context", 4}}), "--ranks 4");
  ASSERT_EQ(four.code, 0) << four.error;
  expect_same_results(out("whole"), out("four"));
}

TEST_F(TrainContext, WithTheOtherAxesToo) {
  train_whole(kSteps);
  const CliResult data = train(config_of("data", {{"context", 2}}), "--ranks 4");
  ASSERT_EQ(data.code, 0) << data.error;
  EXPECT_NE(data.error.find("mesh: data 2 x context 2"), std::string::npos) << data.error;
  expect_same_results(out("whole"), out("data"));
  const CliResult stages =
      train(config_of("stages", {{"context", 2}, {"pipeline", 2}}), "--ranks 4");
  ASSERT_EQ(stages.code, 0) << stages.error;
  EXPECT_NE(stages.error.find("mesh: pipeline 2 x context 2"), std::string::npos) << stages.error;
  expect_same_results(out("whole"), out("stages"));
}

TEST_F(TrainContext, SavedOnOneMeshTheRunGoesOnOnAnother) {
  train_whole(kSteps);
  struct Part {
    Json mesh;
    int ranks;
  };
  const std::vector<Part> parts = {{{{"context", 4}}, 4}, {{{"context", 2}}, 2}, {{}, 2}};
  for (const Part& part : parts) {
    const std::string config = config_of("moved", part.mesh);
    const int64_t before = newest_step(out("moved"));
    Child child({HADAL_BINARY, "train", config, "--ranks", std::to_string(part.ranks)}, out("log"));
    while (child.running() && newest_step(out("moved")) < std::max<int64_t>(before, 0) + 1)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    child.kill(SIGTERM);
    const int code = child.wait();
    EXPECT_TRUE(code == 1 || code == 0) << slurp(out("log"));
    EXPECT_GT(newest_step(out("moved")), before);
  }
  const CliResult rest = train(config_of("moved", {{"context", 2}}), "--ranks 2");
  EXPECT_EQ(rest.code, 0) << rest.error;
  expect_same_results(out("whole"), out("moved"));
}

TEST_F(TrainContext, WhatDoesNotFitIsNamed) {
  const auto expect = [&](const Json& run, int ranks, const std::string& part) {
    const CliResult result = train(write_run(run, "wrong"), concat("--ranks ", ranks));
    EXPECT_EQ(result.code, 2) << result.error;
    EXPECT_NE(result.error.find(part), std::string::npos) << result.error;
  };
  Json run = shared_run("wrong");
  run["mesh"] = {{"context", 2}};
  expect(run, 3, "context 2");
  run["mesh"] = {{"context", 8}};
  expect(run, 8,
         "wrong.json: context 8: row_length must be 8 parts of 128 tokens times a power of two, "
         "found 512");
  run["mesh"] = {{"context", 2}};
  run["model"] = "config.json";
  expect(run, 2, "wrong.json: context 2: hc_mult must be 4, found 2");
  run["model"] = "context.json";
  run["recompute"] = {{"policy", "block"}};
  expect(run, 2, "wrong.json: mesh.context");
  EXPECT_FALSE(fs::exists(out("wrong")));
}

}  // namespace
}  // namespace hadal
