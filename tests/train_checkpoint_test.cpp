// Checkpoints of hadal train: written beside the steps, saved on some ranks and read on others,
// damaged, mixed and of old, and a disk that is full.
#include <chrono>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/file.h"
#include "base/philox.h"
#include "train_fixture.h"

namespace hadal {
namespace {

class TrainCheckpoints : public TrainCli {
 protected:
  /// Steps of five and of two rows; all checkpoints kept.
  Json kept_run(const std::string& name) const {
    Json run = run_json(name);
    run["batch"][0]["tokens"] = 160;
    run["stages"][2]["tokens"] = 320;
    run["checkpoint"]["keep"] = 100;
    return run;
  }
  std::string config_of(const std::string& name) const { return write_run(kept_run(name), name); }
  std::string state(const std::string& name, int64_t step) const {
    return concat(out(name), "/checkpoints/step-", step);
  }
  /// Damages files of the newest checkpoint of a finished run and lets the run go on: it says why,
  /// and ends with the files it had.
  void expect_fallback(const std::string& name,
                       const std::vector<std::string>& why,
                       const std::function<void(const std::string&)>& damage) const {
    const auto whole = results(out(name));
    const int64_t last = newest_step(out(name));
    damage(state(name, last));
    const CliResult again = train(out(name) + ".json");
    EXPECT_EQ(again.code, 0) << again.error;
    EXPECT_NE(again.error.find(concat(state(name, last), " is not whole (")), std::string::npos)
        << again.error;
    EXPECT_NE(again.error.find(concat("going back to ", state(name, last - 1))), std::string::npos)
        << again.error;
    for (const std::string& text : why)
      EXPECT_NE(again.error.find(text), std::string::npos) << text << "\n" << again.error;
    const std::string aside = state(name, last) + ".damaged";
    EXPECT_TRUE(fs::exists(aside));
    fs::remove_all(aside);
    // The model of the earlier end was set aside, as it is where a run goes on.
    fs::remove_all(concat(out(name), "/model-step-", last - 1));
    EXPECT_TRUE(whole == results(out(name)));
  }
};

TEST_F(TrainCheckpoints, WhatIsDamagedOrMixedIsNeverLoaded) {
  ASSERT_EQ(train(config_of("run")).code, 0);
  const int64_t last = newest_step(out("run"));
  expect_fallback("run", {"state.safetensors"}, [](const std::string& folder) {
    const std::string file = folder + "/state.safetensors";
    fs::resize_file(file, fs::file_size(file) - 64);
  });
  // One bit of the last tensor.
  expect_fallback("run", {"state.safetensors: tensor ", ": expected checksum ", ", found "},
                  [](const std::string& folder) {
                    std::string bytes = slurp(folder + "/state.safetensors");
                    bytes[bytes.size() - 5] ^= 1;
                    write_file_atomic(folder + "/state.safetensors", bytes);
                  });
  expect_fallback("run", {"manifest.json: cannot open"},
                  [](const std::string& folder) { fs::remove(folder + "/manifest.json"); });
  expect_fallback("run", {"progress.json"}, [](const std::string& folder) {
    fs::resize_file(folder + "/progress.json", fs::file_size(folder + "/progress.json") / 2);
  });
  // Whole files, each of another save.
  for (const char* file : {"state.safetensors", "progress.json"}) {
    expect_fallback("run", {file, ": expected checksum "}, [&](const std::string& folder) {
      fs::copy_file(state("run", last - 1) + "/" + file, folder + "/" + file,
                    fs::copy_options::overwrite_existing);
    });
  }
  // The same on two ranks: the first looks before the others do.
  fs::remove(state("run", last) + "/manifest.json");
  const CliResult two = train(out("run") + ".json", "--ranks 2");
  EXPECT_EQ(two.code, 0) << two.error;
  EXPECT_NE(two.error.find("going back to "), std::string::npos) << two.error;
  // Where none is whole, nothing begins anew in silence.
  for (int64_t step = 0; step <= last; ++step) fs::remove(state("run", step) + "/manifest.json");
  const CliResult none = train(out("run") + ".json");
  EXPECT_EQ(none.code, 2) << none.error;
  EXPECT_NE(none.error.find("checkpoints none is whole; the newest: "), std::string::npos)
      << none.error;
  EXPECT_TRUE(fs::exists(state("run", last))) << "renamed";
  EXPECT_EQ(train(out("run") + ".json", "--export " + out("exported")).code, 2);
}

TEST_F(TrainCheckpoints, OldOnesWithoutChecksumsAreRead) {
  ASSERT_EQ(train(config_of("run")).code, 0);
  const auto whole = results(out("run"));
  const int64_t last = newest_step(out("run"));
  fs::remove_all(state("run", last));
  const std::string older = state("run", last - 1);
  std::string progress = slurp(older + "/progress.json");
  progress.replace(progress.find("training state 2"), 16, "training state 1");
  write_file_atomic(older + "/progress.json", progress);
  fs::remove(older + "/manifest.json");
  const CliResult again = train(out("run") + ".json");
  ASSERT_EQ(again.code, 0) << again.error;
  EXPECT_NE(again.error.find("of an older version, has no checksums"), std::string::npos)
      << again.error;
  EXPECT_EQ(slurp(state("run", last) + "/state.safetensors"),
            whole.at(concat("checkpoints/step-", last, "/state.safetensors")));
}

TEST_F(TrainCheckpoints, BesideTheStepsOrBetweenThemTheFilesAreTheSame) {
  ASSERT_EQ(train(config_of("beside")).code, 0);
  Json run = kept_run("between");
  run["checkpoint"]["asynchronous"] = false;
  const CliResult between = train(write_run(run, "between"));
  ASSERT_EQ(between.code, 0) << between.error;
  EXPECT_EQ(between.error.find("written beside the steps"), std::string::npos) << between.error;
  expect_same_results(out("beside"), out("between"));
}

TEST_F(TrainCheckpoints, AStopWaitsForTheWrite) {
  const std::string config = config_of("stopped");
  Child child({HADAL_BINARY, "train", config}, out("log"));
  while (child.running() && newest_step(out("stopped")) < 1)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  child.kill(SIGTERM);
  ASSERT_EQ(child.wait(), 1) << slurp(out("log"));
  const int64_t step = newest_step(out("stopped"));
  const Json progress = Json::parse(slurp(state("stopped", step) + "/progress.json"));
  EXPECT_NE(slurp(out("log")).find(concat("stopped after ", progress["tokens"].get<int64_t>())),
            std::string::npos)
      << slurp(out("log"));
  EXPECT_FALSE(has_temporary(out("stopped")));
}

// The writer's thread meets a limit on the size of files, as it would meet a full disk.
TEST_F(TrainCheckpoints, AFullDiskIsNamedAndWhatWasWholeStays) {
  Json json = kept_run("full");
  json["checkpoint"] = {{"every_steps", 1}, {"keep", 2}};
  const std::string config = write_run(json, "full");
  const int64_t before = 2;
  {
    Child child({HADAL_BINARY, "train", config}, out("log"));
    while (child.running() && newest_step(out("full")) < before)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    child.kill(SIGTERM);
    ASSERT_EQ(child.wait(), 1) << slurp(out("log"));
  }
  const int64_t newest = newest_step(out("full"));
  for (const char* ranks : {"", "--ranks 2"}) {
    // Blocks of 1 KiB: more than the metrics, less than the state.
    const CliResult full =
        run(concat("train ", config, " ", ranks), "", "trap '' XFSZ; ulimit -f 64; ");
    EXPECT_EQ(full.code, 2) << full.error;
    EXPECT_NE(full.error.find("hadal: checkpoint: "), std::string::npos) << full.error;
    EXPECT_NE(full.error.find("state.safetensors: cannot "), std::string::npos) << full.error;
    EXPECT_NE(full.error.find("File too large"), std::string::npos) << full.error;
    EXPECT_EQ(newest_step(out("full")), newest);
    EXPECT_FALSE(has_temporary(out("full") + "/checkpoints"));
  }
  EXPECT_EQ(train(config).code, 0);
}

/// HADAL_KILLS asks for more kills than the five of a usual test.
int64_t wanted_kills() {
  const char* text = std::getenv("HADAL_KILLS");
  return text == nullptr ? 5 : std::max<int64_t>(1, std::atoll(text));
}

// docs/decisions/0032-checkpoints-and-spikes.md: any rank of four killed at any moment, then on two
// and on eight.
TEST_F(TrainCheckpoints, KilledOnFourRanksTheRunGoesOnOnTwoAndOnEight) {
  Json json = kept_run("whole");
  json["stages"][2]["tokens"] = 1280;
  ASSERT_EQ(train(write_run(json, "whole")).code, 0);
  const int64_t steps = newest_step(out("whole"));
  json["out"] = "killed";
  const std::string config = write_run(json, "killed");
  const int64_t wanted = wanted_kills();
  const Philox random(14, 4);
  int64_t kill = 0;
  for (uint64_t attempt = 0; kill < wanted; ++attempt) {
    ASSERT_LT(attempt, 20 + 10 * wanted) << slurp(out("log"));
    // From the start again: enough of the run is left for the others.
    if (newest_step(out("killed")) + 4 >= steps) fs::remove_all(out("killed"));
    const int64_t before = newest_step(out("killed"));
    Child child({HADAL_BINARY, "train", config, "--ranks", "4", "--restarts", "0"}, out("log"));
    const bool after_a_step = attempt % 3 != 0;
    while (after_a_step && child.running() && newest_step(out("killed")) <= before)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_for(
        std::chrono::milliseconds(static_cast<int>(150 * random.uniform(attempt))));
    std::istringstream list(
        slurp(concat("/proc/", child.pid(), "/task/", child.pid(), "/children")));
    std::vector<pid_t> ranks;
    for (pid_t pid = 0; list >> pid;) ranks.push_back(pid);
    if (ranks.size() != 4) {  // not all were started yet, or the run was over
      child.kill(SIGTERM);
      continue;
    }
    ::kill(ranks[static_cast<size_t>(kill++ % 4)], SIGKILL);
    EXPECT_NE(child.wait(), 0) << slurp(out("log"));
    EXPECT_EQ(slurp(out("log")).find("is not whole"), std::string::npos) << slurp(out("log"));
  }
  for (const int ranks : {2, 8}) {
    if (ranks == 8) {  // the same checkpoints once more
      fs::remove_all(out("killed"));
      fs::rename(out("copy"), out("killed"));
    } else {
      fs::copy(out("killed"), out("copy"), fs::copy_options::recursive);
    }
    const CliResult rest = train(config, concat("--ranks ", ranks));
    ASSERT_EQ(rest.code, 0) << rest.error;
    expect_every_step_once(out("killed"), steps);
    expect_same_results(out("whole"), out("killed"));
  }
}

}  // namespace
}  // namespace hadal
