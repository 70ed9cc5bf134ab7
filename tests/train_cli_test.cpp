// hadal train as people run it: killed, stopped, resumed and misused.
#include <chrono>
#include <cstdio>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "base/file.h"
#include "base/philox.h"
#include "train_fixture.h"

namespace hadal {
namespace {

TEST_F(TrainCli, KilledAtAnyMomentARunEndsWithTheSameBits) {
  const CliResult whole = train(write_run(run_json("whole"), "whole"), "--threads 1");
  ASSERT_EQ(whole.code, 0) << whole.error;
  const int64_t steps = newest_step(out("whole"));
  EXPECT_GE(steps, 10);
  expect_every_step_once(out("whole"), steps);
  ASSERT_TRUE(fs::exists(out("whole") + "/model/config.json"));

  for (const char* threads : {"1", "2"}) {
    const std::string name = concat("killed", threads);
    const std::string config = write_run(run_json(name), name);
    const Philox random(11, static_cast<uint64_t>(threads[0]));
    const auto start = [&] {
      return std::make_unique<Child>(
          std::vector<std::string>{HADAL_BINARY, "train", config, "--threads", threads},
          out("log"));
    };
    int kills = 0, while_writing = 0;
    for (uint64_t attempt = 0; attempt < 8; ++attempt) {
      auto child = start();
      // The first two die early, the others after a step of their own: half of those while a
      // checkpoint is being written, half at some moment of the steps after it.
      if (attempt < 2) {
        std::this_thread::sleep_for(
            std::chrono::milliseconds(static_cast<int>(250 * random.uniform(attempt))));
      } else {
        const int64_t before = newest_step(out(name));
        while (child->running() && newest_step(out(name)) <= before) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        if (attempt % 2 == 0) {
          while (child->running() && !has_temporary(out(name) + "/checkpoints")) {
          }
        } else {
          std::this_thread::sleep_for(
              std::chrono::milliseconds(static_cast<int>(120 * random.uniform(attempt))));
        }
      }
      if (!child->running()) break;  // finished before its death
      child->kill(SIGKILL);
      EXPECT_EQ(child->wait(), -SIGKILL);
      ++kills;
      if (has_temporary(out(name) + "/checkpoints")) ++while_writing;
    }
    EXPECT_GE(kills, 6);
    EXPECT_GE(while_writing, 1);
    std::printf("%s threads: %d kills, %d of them while a checkpoint was written\n", threads, kills,
                while_writing);
    EXPECT_EQ(start()->wait(), 0) << slurp(out("log"));
    EXPECT_FALSE(has_temporary(out(name)));
    expect_every_step_once(out(name), steps);
    expect_same_results(out("whole"), out(name));
  }
}

// docs/decisions/0018-sums-over-tokens.md: five rows a step, in passes of one, of two and one, of
// all.
TEST_F(TrainCli, MicroBatchesAreNotSeenInTheBits) {
  const std::vector<int> sizes = {32, 64, 160};
  for (const int size : sizes) {
    const std::string name = concat("micro", size);
    Json run = run_json(name);
    run["batch"][0]["tokens"] = 160;
    run["micro_batch_tokens"] = size;
    const CliResult result = train(write_run(run, name), size == 64 ? "--threads 3" : "");
    ASSERT_EQ(result.code, 0) << result.error;
    if (size != sizes[0]) expect_same_results(out(concat("micro", sizes[0])), out(name));
  }
}

TEST_F(TrainCli, StoppedByASignalOrByTimeItGoesOnToTheSameBits) {
  ASSERT_EQ(train(write_run(run_json("whole"), "whole")).code, 0);
  const std::string config = write_run(run_json("stopped"), "stopped");

  const CliResult at_once = train(config, "--max-seconds 0.001");
  EXPECT_EQ(at_once.code, 1) << at_once.error;
  EXPECT_NE(at_once.out.find("stopped after 0 of "), std::string::npos) << at_once.out;

  for (const int signal : {SIGTERM, SIGINT}) {
    const int64_t before = newest_step(out("stopped"));
    Child child({HADAL_BINARY, "train", config, "--threads", "2"}, out("log"));
    while (child.running() && newest_step(out("stopped")) <= before + 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    child.kill(signal);
    EXPECT_EQ(child.wait(), 1) << slurp(out("log"));
    EXPECT_NE(slurp(out("log")).find("the same command goes on from here"), std::string::npos);
    EXPECT_FALSE(fs::exists(out("stopped") + "/model"));
  }
  const CliResult rest = train(config, "--threads 1");
  EXPECT_EQ(rest.code, 0) << rest.error;
  expect_same_results(out("whole"), out("stopped"));

  // What is finished stays as it is.
  const auto before = results(out("stopped"));
  EXPECT_EQ(train(config).code, 0);
  EXPECT_TRUE(before == results(out("stopped")));
}

TEST_F(TrainCli, AFinishedRunGetsFurtherStages) {
  Json json = run_json("longer");
  ASSERT_EQ(train(write_run(json, "longer")).code, 0);
  const std::string first = slurp(out("longer") + "/model/model.safetensors");
  const int64_t end = newest_step(out("longer"));
  json["stages"].push_back(Json::parse(R"({"name": "more", "tokens": 64, "row_length": 64,
      "attention": "sparse", "numerics": "released", "mix": {"b": 1}})"));
  const CliResult more = train(write_run(json, "longer"));
  ASSERT_EQ(more.code, 0) << more.error;
  EXPECT_EQ(newest_step(out("longer")), end + 1);
  EXPECT_TRUE(slurp(concat(out("longer"), "/model-step-", end, "/model.safetensors")) == first);
  EXPECT_FALSE(slurp(out("longer") + "/model/model.safetensors") == first);
}

/// Exit code 2, nothing on standard output, and one line that is no log record.
void expect_input_error(const CliResult& result, const std::string& why) {
  EXPECT_EQ(result.code, 2) << result.out << result.error;
  EXPECT_EQ(result.out, "");
  std::istringstream lines(result.error);
  int others = 0;
  std::string last;
  for (std::string line; std::getline(lines, line);) {
    const bool is_log = line.size() > 24 && line[4] == '-' && line[23] == 'Z';
    if (!is_log) ++others;
    last = line;
  }
  EXPECT_EQ(others, 1) << result.error;
  EXPECT_EQ(last.rfind("hadal: ", 0), 0U) << result.error;
  EXPECT_NE(last.find(why), std::string::npos) << "expected: " << why << "\nfound: " << last;
}

TEST_F(TrainCli, ABadConfigurationIsRefusedBeforeAnythingIsWritten) {
  int number = 0;
  const auto refused = [&](const std::string& why, auto&& change) {
    Json json = run_json("bad");
    change(json);
    const std::string config = write_run(json, concat("bad", number++));
    expect_input_error(train(config), why);
    EXPECT_FALSE(fs::exists(out("bad"))) << why;
  };
  expect_input_error(train(out("absent.json")), "absent.json: cannot open");
  expect_input_error(train(write("nojson.json", "{")), "nojson.json");
  expect_input_error(train(""), "config");
  refused("learning_rate.peek", [](Json& json) { json["learning_rate"]["peek"] = 1; });
  refused("colour", [](Json& json) { json["colour"] = "red"; });
  refused("stages[1].attention", [](Json& json) { json["stages"][1]["attention"] = "lazy"; });
  refused("stages[0].tokens", [](Json& json) { json["stages"][0]["tokens"] = 0; });
  refused("no source is called \"c\"", [](Json& json) { json["stages"][0]["mix"]["c"] = 1; });
  refused("no source is called \"z\"", [](Json& json) { json["validation"]["source"] = "z"; });
  refused("shares sum to 0", [](Json& json) { json["stages"][0]["mix"] = {{"a", 0}}; });
  refused("a second source", [](Json& json) { json["sources"][1]["name"] = "a"; });
  refused("batch", [](Json& json) { json["batch"][0]["from_tokens"] = 5; });
  refused("lies behind decay_end_tokens",
          [](Json& json) { json["learning_rate"]["decay_start_tokens"] = 1000000; });
  refused("absent.json", [](Json& json) { json["model"] = "absent.json"; });
  refused("absent.json", [](Json& json) { json["tokenizer"] = "absent.json"; });
  refused("absent.txt", [](Json& json) { json["sources"][1]["files"][0] = "absent.txt"; });
  refused("exceeds max_position_embeddings 4096",
          [](Json& json) { json["stages"][2]["row_length"] = 8192; });
  refused("validation: row_length 5000",
          [](Json& json) { json["validation"]["row_length"] = 5000; });
  refused("numerics", [](Json& json) { json["stages"][0]["numerics"] = "fp3"; });
}

TEST_F(TrainCli, BadDataAreRefusedAndLeaveNothingUnfinished) {
  Json json = run_json("damaged");
  write("a.jsonl.xz", std::string("\xFD"
                                  "7zXZ\0\0\4garbage",
                                  14));
  json["sources"][0]["files"][0] = "a.jsonl.xz";
  expect_input_error(train(write_run(json, "damaged")), "a.jsonl.xz: the xz data are damaged");
  EXPECT_FALSE(has_temporary(out("damaged")));
  EXPECT_FALSE(fs::exists(out("damaged") + "/checkpoints"));

  // A tokenizer with more ids than the model has rows.
  json = run_json("ids");
  write("more.json", testing::byte_tokenizer_json());
  model::ModelConfig narrow = train_config();
  narrow.vocab_size = 100;
  write("narrow.json", model::to_config_json(narrow));
  json["model"] = "narrow.json";
  expect_input_error(train(write_run(json, "ids")), "narrow.json is 100");
  EXPECT_FALSE(has_temporary(out("ids")));
  EXPECT_FALSE(fs::exists(out("ids") + "/checkpoints"));

  const FileLock lock(concat(out("ids"), "/lock"));
  json["model"] = "config.json";
  expect_input_error(train(write_run(json, "ids")), "lock: is locked by another process");
}

TEST_F(TrainCli, AResumedRunKeepsToWhatItBeganWith) {
  const std::string config = write_run(run_json("begun"), "begun");
  // Two steps, so that the first stage is under way.
  {
    Child child({HADAL_BINARY, "train", config}, out("log"));
    while (child.running() && newest_step(out("begun")) < 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    child.kill(SIGTERM);
    ASSERT_EQ(child.wait(), 1) << slurp(out("log"));
  }
  const auto before = results(out("begun"));
  const auto refused = [&](const std::string& why, auto&& change) {
    Json json = run_json("begun");
    change(json);
    expect_input_error(train(write_run(json, "changed")), why);
    EXPECT_TRUE(before == results(out("begun"))) << why;
  };
  for (const char* what : {"seed", "row", "mix"}) {
    refused("began with other rows", [&](Json& json) {
      if (what == std::string("seed")) json["seed"] = 4;
      if (what == std::string("row")) json["stages"][0]["row_length"] = 16;
      if (what == std::string("mix")) json["stages"][0]["mix"]["a"] = 2;
    });
  }
  refused("expected", [&](Json& json) {
    model::ModelConfig other = train_config();
    other.moe_inter_dim = 256;
    write("other.json", model::to_config_json(other));
    json["model"] = "other.json";
  });
}

}  // namespace
}  // namespace hadal
