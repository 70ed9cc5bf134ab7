// docs/parallelism.md: how ranks find each other, what they say, and what is told of those who do
// not answer.
#include <cmath>
#include <csignal>
#include <fstream>
#include <limits>
#include <map>
#include <thread>
#include <unistd.h>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <gtest/gtest.h>

#include "dist/launcher.h"
#include "dist/placement.h"
#include "dist/ranks.h"
#include "testing/kernel_checks.h"
#include "testing/rank_threads.h"

namespace hadal::dist {
namespace {

using Variables = std::map<std::string, std::string>;

std::optional<Placement> placement_in(const Variables& variables) {
  return find_placement([&](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    if (found == variables.end()) return std::nullopt;
    return found->second;
  });
}

TEST(Placement, IsWhatEachStarterSays) {
  const auto torchrun = placement_in({{"RANK", "5"},
                                      {"WORLD_SIZE", "8"},
                                      {"LOCAL_RANK", "1"},
                                      {"LOCAL_WORLD_SIZE", "4"},
                                      {"MASTER_ADDR", "node7"},
                                      {"MASTER_PORT", "1234"},
                                      {"OMPI_COMM_WORLD_RANK", "9"}});
  ASSERT_TRUE(torchrun);
  EXPECT_EQ(torchrun->rank, 5);
  EXPECT_EQ(torchrun->size, 8);
  EXPECT_EQ(torchrun->local_rank, 1);
  EXPECT_EQ(torchrun->host, "node7");
  EXPECT_EQ(torchrun->port, 1234);
  EXPECT_FALSE(torchrun->agent);
  const auto elastic = placement_in({{"RANK", "0"},
                                     {"WORLD_SIZE", "2"},
                                     {"MASTER_ADDR", "node7"},
                                     {"MASTER_PORT", "1234"},
                                     {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                                     {"TORCHELASTIC_RESTART_COUNT", "2"}});
  ASSERT_TRUE(elastic);
  EXPECT_TRUE(elastic->agent);
  EXPECT_EQ(elastic->attempt, 2);

  const auto open_mpi = placement_in({{"OMPI_COMM_WORLD_RANK", "1"},
                                      {"OMPI_COMM_WORLD_SIZE", "2"},
                                      {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                      {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}});
  ASSERT_TRUE(open_mpi);
  EXPECT_EQ(open_mpi->rank, 1);
  EXPECT_EQ(open_mpi->host, "127.0.0.1");
  EXPECT_EQ(open_mpi->port, 29500);

  const auto mpich = placement_in(
      {{"PMI_RANK", "0"}, {"PMI_SIZE", "3"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "7"}});
  ASSERT_TRUE(mpich);
  EXPECT_EQ(mpich->size, 3);

  for (const auto& [list, first] : Variables{{"gpu[003-005,9],login", "gpu003"},
                                             {"alone", "alone"},
                                             {"a,b[1-2]", "a"},
                                             {"n[7,9]", "n7"},
                                             {"n[07]x,m", "n07x"}}) {
    const auto slurm = placement_in({{"SLURM_PROCID", "2"},
                                     {"SLURM_STEP_NUM_TASKS", "4"},
                                     {"SLURM_LOCALID", "0"},
                                     {"SLURM_JOB_ID", "4000123"},
                                     {"SLURM_STEP_NODELIST", list}});
    ASSERT_TRUE(slurm);
    EXPECT_EQ(slurm->host, first);
    EXPECT_EQ(slurm->port, 10123);
  }

  // Started by nobody, by a batch script, or as the only one.
  EXPECT_FALSE(placement_in({}));
  EXPECT_FALSE(placement_in({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}}));
  EXPECT_FALSE(placement_in({{"RANK", "0"}, {"WORLD_SIZE", "1"}}));
}

TEST(Placement, NamesTheVariableThatDoesNotFit) {
  const auto refused = [](const Variables& variables, const std::string& why) {
    try {
      placement_in(variables);
      ADD_FAILURE() << "accepted: " << why;
    } catch (const InputError& error) {
      EXPECT_EQ(std::string(error.what()), "environment: " + why);
    }
  };
  refused({{"RANK", "0"}}, "RANK is set, but WORLD_SIZE is not: expected both or neither");
  refused({{"WORLD_SIZE", "2"}}, "WORLD_SIZE is set, but RANK is not: expected both or neither");
  refused({{"RANK", "two"}, {"WORLD_SIZE", "4"}},
          "RANK: expected a number from 0 to 3, found \"two\"");
  refused({{"RANK", "4"}, {"WORLD_SIZE", "4"}}, "RANK: expected a number from 0 to 3, found \"4\"");
  refused({{"RANK", "0"}, {"WORLD_SIZE", "0"}},
          "WORLD_SIZE: expected a number from 1 to 1048576, found \"0\"");
  refused({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "70000"}},
          "MASTER_PORT: expected a number from 1 to 65535, found \"70000\"");
  refused({{"RANK", "0"}, {"WORLD_SIZE", "2"}},
          "MASTER_ADDR is not set: expected the address of rank 0, since torchrun started 2 ranks "
          "and does not say that they share one machine");
  refused({{"SLURM_PROCID", "0"}, {"SLURM_STEP_NUM_TASKS", "2"}, {"SLURM_STEP_NODELIST", "n[1-"}},
          "SLURM_STEP_NODELIST: expected names of nodes, found \"n[1-\"");
}

TEST(Ranks, HearEachOther) {
  for (const int64_t count : {2, 3, 4}) {
    const auto errors = testing::run_ranks(count, [&](Ranks& ranks) {
      const int64_t rank = ranks.rank();
      EXPECT_EQ(ranks.size(), count);
      std::vector<int64_t> values = {1, rank, int64_t{1} << (60 + rank % 2)};
      ranks.sum(values);
      EXPECT_EQ(values[0], count);
      EXPECT_EQ(values[1], count * (count - 1) / 2);
      EXPECT_FALSE(ranks.any(false));
      EXPECT_TRUE(ranks.any(rank == count - 1));
      EXPECT_EQ(ranks.broadcast(rank == 0 ? "step-7" : "other"), "step-7");
      EXPECT_EQ(ranks.broadcast(rank == 0 ? "" : "other"), "");
      // Bits arrive as they are: NaN with its payload, the negative zero.
      const at::Tensor sent =
          at::tensor({std::nanf("7"), -0.0f, 1e-45f, std::numeric_limits<float>::infinity(), 3.0f});
      at::Tensor got = rank == 1 ? sent.clone() : at::zeros({5});
      ranks.broadcast(got, 1).wait();
      EXPECT_TRUE(testing::same_bits(got, sent));
      // Two at once between the same ranks, told apart by their tags.
      const int64_t to = (rank + 1) % count, from = (rank + count - 1) % count;
      const at::Tensor one = at::full({1000}, static_cast<float>(rank)),
                       two = at::full({3}, -static_cast<float>(rank));
      at::Tensor first = at::empty({1000}), second = at::empty({3});
      std::vector<Transfer> transfers = {ranks.send(two, to, 8), ranks.send(one, to, 7),
                                         ranks.receive(first, from, 7),
                                         ranks.receive(second, from, 8)};
      for (Transfer& transfer : transfers) transfer.wait();
      EXPECT_EQ(first[999].item<float>(), static_cast<float>(from));
      EXPECT_EQ(second[2].item<float>(), -static_cast<float>(from));
      ranks.barrier("the end");
    });
    for (const std::string& error : errors) EXPECT_EQ(error, "");
  }
}

// torchrun's agent keeps the store, which outlives an attempt: what the one before left in it does
// not count.
TEST(Ranks, MeetInTheStoreOfAnAgent) {
  c10d::TCPStoreOptions options;
  options.port = 0;
  options.isServer = true;
  options.waitWorkers = false;
  const auto agent = c10::make_intrusive<c10d::TCPStore>("127.0.0.1", options);
  for (int64_t attempt = 0; attempt < 2; ++attempt) {
    std::vector<std::thread> threads;
    std::vector<int64_t> sums(2, 0);
    for (int64_t rank = 0; rank < 2; ++rank) {
      threads.emplace_back([&, rank] {
        Ranks ranks({.rank = rank,
                     .size = 2,
                     .host = "127.0.0.1",
                     .port = agent->getPort(),
                     .agent = true,
                     .attempt = attempt,
                     .starter = "torchrun"},
                    std::chrono::seconds(20));
        ranks.sum({&(sums[static_cast<size_t>(rank)] += rank + 1), 1});
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(sums, (std::vector<int64_t>{3, 3}));
  }
}

TEST(Ranks, NameWhoHasNotCome) {
  const auto errors = testing::run_ranks(4, [](Ranks&) {}, std::chrono::seconds(1), {1, 3});
  EXPECT_EQ(errors[0], "rank 0: expected 4 ranks within 1 s, missing: 1, 3");
  EXPECT_EQ(errors[2], "rank 2: expected 4 ranks within 1 s, missing: 1, 3");
}

TEST(Ranks, NameWhoIsLateAndWhere) {
  const auto errors = testing::run_ranks(
      3,
      [](Ranks& ranks) {
        ranks.barrier("the start");
        ranks.enter("step 4");
        if (ranks.rank() == 1) {
          std::this_thread::sleep_for(std::chrono::seconds(6));
          return;
        }
        ranks.enter("step 5");
        ranks.any(false);
      },
      std::chrono::seconds(1));
  EXPECT_EQ(errors[1], "");
  for (const int64_t rank : {0, 2}) {
    const std::string& error = errors[static_cast<size_t>(rank)];
    EXPECT_EQ(error.rfind(concat("rank ", rank, ": step 5: sum: rank 1 is still at: step 4"), 0),
              0U)
        << error;
  }
}

/// A shell script as every rank.
Launch script(const std::string& text, int64_t ranks, int64_t restarts = 0) {
  return {.command =
              [text] {
                return std::vector<std::string>{"/bin/sh", "-c", text};
              },
          .ranks = ranks,
          .restarts = restarts};
}

TEST(Launcher, ReturnsWhatTheRanksEndWith) {
  EXPECT_EQ(launch(script("exit 0", 3)), 0);
  EXPECT_EQ(launch(script("exit 1", 2)), kExitStopped);
  EXPECT_EQ(launch(script("test $WORLD_SIZE = 2 && test $RANK = $LOCAL_RANK && test $RANK -lt 2 && "
                          "test $MASTER_ADDR = 127.0.0.1 && test $MASTER_PORT -gt 0",
                          2)),
            0);
}

TEST(Launcher, ADeadRankEndsAllAndIsNamed) {
  const auto dies_of = [](const std::string& text, const std::string& why, int64_t restarts = 0) {
    const auto start = std::chrono::steady_clock::now();
    try {
      launch(script(text, 3, restarts));
      ADD_FAILURE() << text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
    }
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  };
  // The others sleep and are not waited for.
  dies_of("if [ $RANK = 1 ]; then kill -9 $$; fi; sleep 60", ") was killed by signal 9");
  dies_of("if [ $RANK = 2 ]; then echo 'hadal: internal error: so' >&2; exit 3; fi; sleep 60",
          ") ended with code 3: internal error: so");
  // One that only lost another is not the culprit.
  dies_of("case $RANK in 0) exit 4;; 1) exit 4;; 2) kill -9 $$;; esac; sleep 60", "rank ");
  // Bad input is not tried again.
  dies_of("if [ $RANK = 2 ]; then echo 'hadal: run.json: no' >&2; exit 2; fi; sleep 60",
          "rank 2: run.json: no", 5);
  dies_of("if [ $RANK = 1 ]; then kill -9 $$; fi; sleep 60", "; 2 restarts are used up", 2);
}

TEST(Launcher, StartsAgainAfterADeath) {
  const std::string mark = concat("/tmp/hadal_launcher_", ::getpid());
  std::remove(mark.c_str());
  // Rank 1 dies the first time and not the second.
  const std::string text =
      concat("if [ $RANK = 1 ] && [ ! -e ", mark, " ]; then touch ", mark, "; kill -9 $$; fi");
  EXPECT_EQ(launch(script(text, 2, 1)), 0);
  EXPECT_EQ(std::remove(mark.c_str()), 0);
}

}  // namespace
}  // namespace hadal::dist
