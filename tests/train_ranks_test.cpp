// hadal train in several processes: the bits of one, killed, resumed on another number of ranks,
// and misused (docs/parallelism.md).
#include <algorithm>
#include <arpa/inet.h>
#include <chrono>
#include <memory>
#include <netinet/in.h>
#include <string>
#include <sys/socket.h>
#include <thread>
#include <vector>

#include "base/file.h"
#include "train_fixture.h"

namespace hadal {
namespace {

class TrainRanks : public TrainSharedCli {
 protected:
  static int free_port() {
    const int file = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof(address);
    auto* raw = reinterpret_cast<sockaddr*>(&address);
    EXPECT_EQ(::bind(file, raw, length), 0);
    EXPECT_EQ(::getsockname(file, raw, &length), 0);
    ::close(file);
    return ntohs(address.sin_port);
  }
  static bool process_lives(pid_t pid) { return fs::exists(concat("/proc/", pid, "/status")); }
  /// Ranks of a launcher in the order of their start.
  static std::vector<pid_t> children_of(pid_t launcher) {
    std::istringstream list(slurp(concat("/proc/", launcher, "/task/", launcher, "/children")));
    std::vector<pid_t> children;
    for (pid_t pid = 0; list >> pid;) children.push_back(pid);
    return children;
  }
  void wait_for_step(Child& child, const std::string& name, int64_t step) const {
    while (child.running() && newest_step(out(name)) < step)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
};

TEST_F(TrainRanks, AnyNumberOfThemEndsWithTheBitsOfOne) {
  train_whole();
  for (const auto& [ranks, micro] : std::vector<std::pair<int, int>>{{2, 32}, {4, 160}}) {
    const std::string name = concat("ranks", ranks);
    Json run = shared_run(name);
    run["micro_batch_tokens"] = micro;
    const CliResult result = train(write_run(run, name), concat("--ranks ", ranks));
    ASSERT_EQ(result.code, 0) << result.error;
    EXPECT_EQ(result.out.rfind("trained on ", 0), 0U) << result.out;
    EXPECT_NE(result.error.find(concat(ranks, " ranks; masters and moments a rank: ")),
              std::string::npos)
        << result.error;
    expect_same_results(out("whole"), out(name));
  }
}

TEST_F(TrainRanks, AKilledRankIsNamedAndNothingIsLost) {
  train_whole();
  const std::string config = config_of("killed");
  Child child({HADAL_BINARY, "train", config, "--ranks", "2"}, out("log"));
  for (int64_t kill = 0; kill < 2; ++kill) {
    wait_for_step(child, "killed", 1 + 2 * kill);
    const std::vector<pid_t> ranks = children_of(child.pid());
    ASSERT_EQ(ranks.size(), 2U) << slurp(out("log"));
    const pid_t victim = ranks[static_cast<size_t>(1 - kill)];
    ASSERT_EQ(::kill(victim, SIGKILL), 0);
    const std::string told =
        concat("rank ", 1 - kill, " (process ", victim, ") was killed by signal 9 (Killed); all 2 ",
               "ranks start again from the newest checkpoint, ", kill + 1, " of 3");
    while (child.running() && slurp(out("log")).find(told) == std::string::npos)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    ASSERT_TRUE(child.running()) << told << "\n" << slurp(out("log"));
  }
  EXPECT_EQ(child.wait(), 0) << slurp(out("log"));
  expect_every_step_once(out("killed"), newest_step(out("whole")));
  expect_same_results(out("whole"), out("killed"));
}

TEST_F(TrainRanks, SavedOnFourTheRunGoesOnOnTwoAndOnOne) {
  train_whole();
  const std::string config = config_of("moved");
  for (const int ranks : {4, 2}) {
    const int64_t before = newest_step(out("moved"));
    Child child({HADAL_BINARY, "train", config, "--ranks", std::to_string(ranks)}, out("log"));
    wait_for_step(child, "moved", std::max<int64_t>(before, 0) + 1);
    child.kill(SIGTERM);
    EXPECT_EQ(child.wait(), 1) << slurp(out("log"));
    EXPECT_NE(slurp(out("log")).find("the same command goes on from here"), std::string::npos);
    EXPECT_LT(newest_step(out("moved")), newest_step(out("whole")));
  }
  const CliResult rest = train(config);
  EXPECT_EQ(rest.code, 0) << rest.error;
  // Stopping saves once more where a checkpoint was due anyway: the same files.
  expect_same_results(out("whole"), out("moved"));
}

TEST_F(TrainRanks, TheDeathOfTheLauncherEndsThem) {
  const std::string config = config_of("orphans");
  Child child({HADAL_BINARY, "train", config, "--ranks", "2"}, out("log"));
  wait_for_step(child, "orphans", 1);
  const std::vector<pid_t> ranks = children_of(child.pid());
  ASSERT_EQ(ranks.size(), 2U) << slurp(out("log"));
  child.kill(SIGKILL);
  child.wait();
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  for (const pid_t rank : ranks) {
    while (process_lives(rank) && std::chrono::steady_clock::now() < end)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    EXPECT_FALSE(process_lives(rank));
  }
}

// Started as torchrun starts them; one dies, and the other says so.
TEST_F(TrainRanks, UnderAnotherStarterALostRankIsNamed) {
  const std::string config = config_of("alone");
  const int port = free_port();
  const auto start = [&](int rank) {
    return std::make_unique<Child>(
        std::vector<std::string>{"/usr/bin/env", concat("RANK=", rank), "WORLD_SIZE=2",
                                 "MASTER_ADDR=127.0.0.1", concat("MASTER_PORT=", port),
                                 "TORCH_CPP_LOG_LEVEL=ERROR", HADAL_BINARY, "train", config},
        out(concat("log", rank)));
  };
  auto first = start(0), second = start(1);
  wait_for_step(*first, "alone", 1);
  ASSERT_TRUE(second->running()) << slurp(out("log1"));
  second->kill(SIGKILL);
  EXPECT_EQ(first->wait(), 4) << slurp(out("log0"));
  const std::string log = slurp(out("log0"));
  EXPECT_NE(log.find("hadal: rank 0: "), std::string::npos) << log;
  EXPECT_NE(log.find("rank 1 is gone (it was at: "), std::string::npos) << log;
}

TEST_F(TrainRanks, WhatDoesNotFitIsRefusedByName) {
  const std::string config = config_of("refused");
  const auto refused = [&](const std::string& flags, const std::string& setup,
                           const std::string& why) {
    const CliResult result = run("train " + config + " " + flags, "", setup);
    EXPECT_EQ(result.code, 2) << result.error;
    EXPECT_NE(result.error.find("hadal: " + why), std::string::npos) << result.error;
    EXPECT_FALSE(fs::exists(out("refused")));
  };
  refused("", "RANK=1", "environment: RANK is set, but WORLD_SIZE is not");
  refused("", "RANK=2 WORLD_SIZE=2", "environment: RANK: expected a number from 0 to 1");
  refused("--ranks 2", "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1",
          "--ranks: this process is one of several ranks already");
  refused("--ranks 0", "", "--ranks: expected");
  // Found by the first rank, told once.
  Json run = shared_run("refused");
  run["tokenizer"] = "absent.json";
  const CliResult result = train(write_run(run, "refused"), "--ranks 2");
  EXPECT_EQ(result.code, 2) << result.error;
  EXPECT_EQ(result.out, "");
  EXPECT_EQ(lines_said(result.error), 1) << result.error;
  EXPECT_NE(result.error.find("absent.json: no such file"), std::string::npos) << result.error;
}

}  // namespace
}  // namespace hadal
