// How a run of hadal train goes on: with more tokens, with other batches, after damage; and what is
// no training text.
#include <filesystem>
#include <string>

#include <nlohmann/json.hpp>

#include "base/philox.h"
#include "cli_fixture.h"
#include "model/config.h"
#include "testing/tiny_model.h"
#include "testing/tiny_tokenizer.h"

namespace hadal {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

/// The last line of standard error says why; the log stands before it.
void expect_refused_with_log(const CliResult& result, const std::string& why) {
  EXPECT_EQ(result.code, 2) << result.error;
  const size_t last = result.error.rfind("\nhadal: ");
  const std::string line =
      result.error.starts_with("hadal: ") ? result.error : result.error.substr(last + 1);
  EXPECT_NE(line.find(why), std::string::npos) << result.error;
}

class TrainGoesOn : public CliFixture {
 protected:
  void SetUp() override {
    CliFixture::SetUp();
    model::ModelConfig config = testing::tiny_config();
    config.vocab_size = testing::byte_tokenizer_size();
    config.quantized = false;
    config.expert_dtype = model::ExpertDtype::kBf16;
    write("config.json", model::to_config_json(config));
    write("tokenizer.json", testing::byte_tokenizer_json());
    std::string text;
    for (int i = 0; i < 200; ++i) text += "word" + std::to_string(i * i % 97) + " ";
    write("a.txt", text);
    run_ = Json::parse(R"({
      "model": "config.json", "tokenizer": "tokenizer.json", "out": "out", "device": "cpu",
      "sources": [{"name": "a", "files": ["a.txt"]}],
      "stages": [{"name": "only", "tokens": 256, "row_length": 32, "attention": "dense",
                  "mix": {"a": 1}}],
      "learning_rate": {"peak": 0.002}, "batch": [{"tokens": 64}],
      "checkpoint": {"every_steps": 1, "keep": 3}})");
  }
  CliResult train() const { return run("train " + write("run.json", run_.dump())); }
  Json progress(const std::string& state) const {
    return Json::parse(slurp(folder_ / "out/checkpoints" / state / "progress.json"));
  }
  std::string newest() const {
    std::string best;
    int64_t step = -1;
    for (const auto& entry : fs::directory_iterator(folder_ / "out/checkpoints")) {
      const std::string name = entry.path().filename();
      if (std::stoll(name.substr(5)) > step) step = std::stoll(name.substr(5)), best = name;
    }
    return best;
  }

  Json run_;
};

TEST_F(TrainGoesOn, AFinishedStageWithMoreTokensTakesTheRest) {
  const CliResult first = train();
  ASSERT_EQ(first.code, 0) << first.error;
  const std::string state = newest();
  const int64_t tokens = progress(state)["tokens"];
  EXPECT_EQ(train().code, 0);
  EXPECT_EQ(newest(), state) << "a finished run went on";

  run_["stages"][0]["tokens"] = 512;
  const CliResult more = train();
  ASSERT_EQ(more.code, 0) << more.error;
  EXPECT_NE(more.error.find("stage only goes on with"), std::string::npos) << more.error;
  EXPECT_GT(progress(newest())["tokens"], tokens + 200);
  EXPECT_TRUE(fs::exists(folder_ / "out/model"));
  EXPECT_TRUE(fs::exists(folder_ / ("out/model-" + state))) << "the earlier model is set aside";
  const std::string end = newest();
  const std::string bytes = slurp(folder_ / "out/checkpoints" / end / "state.safetensors");
  EXPECT_EQ(train().code, 0);
  EXPECT_EQ(newest(), end);

  // Stopped on the way, the extended run ends with the same bits.
  fs::remove_all(folder_ / "out");
  run_["stages"][0]["tokens"] = 256;
  ASSERT_EQ(train().code, 0);
  run_["stages"][0]["tokens"] = 512;
  write("run.json", run_.dump());
  for (int i = 0, code = 1; i < 60 && code == 1; ++i)
    code = run("train " + (folder_ / "run.json").string() + " --max-seconds 0.000001").code;
  ASSERT_EQ(train().code, 0);
  EXPECT_EQ(slurp(folder_ / "out/checkpoints" / end / "state.safetensors"), bytes);

  run_["stages"][0]["tokens"] = 300;
  expect_refused_with_log(train(), "tokens: began with 512, found 300");
  run_["stages"][0]["tokens"] = 512;
  run_["stages"].push_back(run_["stages"][0]);
  run_["stages"][1]["name"] = "next";
  ASSERT_EQ(train().code, 0);
  run_["stages"][0]["tokens"] = 700;
  expect_refused_with_log(train(), "a later stage has begun");
}

TEST_F(TrainGoesOn, BatchesMayChange) {
  ASSERT_EQ(train().code, 0);
  const int64_t step = progress(newest())["step"];
  run_["stages"][0]["tokens"] = 512;
  run_["batch"] = Json::parse(R"([{"tokens": 128}])");
  const CliResult more = train();
  ASSERT_EQ(more.code, 0) << more.error;
  const int64_t steps = progress(newest())["step"].get<int64_t>() - step;
  EXPECT_LE(steps, 3) << "the rest in batches of four rows";
  EXPECT_GE(steps, 2);
}

TEST_F(TrainGoesOn, ASourceIsText) {
  write("a.txt", "");
  expect_refused_with_log(train(), "source a: its files hold no text");
  write("a.txt", " \n\n\t ");
  expect_refused_with_log(train(), "hold no text");
  std::string bytes = "some words ";
  for (uint32_t i = 0; i < 4096; ++i) bytes += static_cast<char>((i * 2654435761u) >> 23);
  write("a.txt", bytes);
  expect_refused_with_log(train(), "a.txt: no UTF-8 at byte");
  write("a.txt", "some words that are enough, once more and again");
  EXPECT_EQ(train().code, 0);
}

}  // namespace
}  // namespace hadal
