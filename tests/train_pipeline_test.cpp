// hadal train on a mesh with stages of a pipeline: the bits of one rank, saved on one mesh and
// resumed on another, and misused (docs/parallelism.md).
#include <string>
#include <thread>
#include <vector>

#include "train_fixture.h"

namespace hadal {
namespace {

class TrainPipeline : public TrainSharedCli {};

TEST_F(TrainPipeline, EndsWithTheBitsOfOneRank) {
  train_whole();
  const CliResult two = train(config_of("two", {{"pipeline", 2}}), "--ranks 2");
  ASSERT_EQ(two.code, 0) << two.error;
  EXPECT_NE(two.error.find("mesh: pipeline 2; layers of the stages: "), std::string::npos)
      << two.error;
  expect_same_results(out("whole"), out("two"));
  // Two pipelines, the layers as the file says.
  const Json mesh = {{"pipeline", 2}, {"pipeline_layers", {1, 2}}};
  const CliResult four = train(config_of("four", mesh), "--ranks 4");
  ASSERT_EQ(four.code, 0) << four.error;
  EXPECT_NE(four.error.find("mesh: pipeline 2 x data 2; layers of the stages: 1, 2"),
            std::string::npos)
      << four.error;
  expect_same_results(out("whole"), out("four"));
}

TEST_F(TrainPipeline, SavedOnOneMeshTheRunGoesOnOnAnother) {
  train_whole();
  struct Part {
    Json mesh;
    int ranks;
  };
  const std::vector<Part> parts = {
      {{{"pipeline", 3}}, 3}, {{}, 2}, {{{"pipeline", 2}}, 4}, {{{"pipeline", 2}}, 2}};
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
  const CliResult rest = train(config_of("moved", {}));
  EXPECT_EQ(rest.code, 0) << rest.error;
  expect_same_results(out("whole"), out("moved"));
}

TEST_F(TrainPipeline, StartsFromACheckpointAndRecomputes) {
  train_whole();
  const auto run = [&](const std::string& name, const Json& mesh, const char* policy) {
    Json json = shared_run(name);
    json["init"] = {{"checkpoint", "whole/model"}};
    if (!mesh.is_null()) json["mesh"] = mesh;
    if (policy != nullptr) json["recompute"] = {{"policy", policy}};
    return write_run(json, name);
  };
  const CliResult alone = train(run("alone", {}, nullptr));
  ASSERT_EQ(alone.code, 0) << alone.error;
  for (const char* policy : {"block", "norms"}) {
    const std::string name = concat("stages_", policy);
    const CliResult stages = train(run(name, {{"pipeline", 2}}, policy), "--ranks 2");
    ASSERT_EQ(stages.code, 0) << stages.error;
    expect_same_results(out("alone"), out(name));
  }
}

TEST_F(TrainPipeline, WhatDoesNotFitIsNamed) {
  const auto error = [&](const Json& mesh, int ranks) {
    const CliResult result = train(config_of("wrong", mesh), concat("--ranks ", ranks));
    EXPECT_EQ(result.code, 2) << result.error;
    return result.error;
  };
  const auto expect = [](const std::string& found, const std::string& part) {
    EXPECT_NE(found.find(part), std::string::npos) << found;
  };
  expect(error({{"pipeline", 2}}, 3),
         "wrong.json: mesh: pipeline 2 x context 1 = 2 does not divide the number of ranks, 3");
  expect(error({{"pipeline", 4}}, 4),
         "wrong.json: mesh.pipeline: expected 1 to 3 stages, a layer or more on each, found 4");
  expect(error({{"pipeline", 2}, {"pipeline_layers", {3}}}, 2),
         "mesh.pipeline_layers: expected layers of 2 stages, as mesh.pipeline says, found 1");
  expect(error({{"pipeline", 2}, {"pipeline_layers", {2, 2}}}, 2),
         "wrong.json: mesh.pipeline_layers: expected the model's 3 layers, found [2, 2], which "
         "are 4");
  expect(error({{"stages", 2}}, 2), "stages");
  EXPECT_FALSE(fs::exists(out("wrong")));
}

}  // namespace
}  // namespace hadal
