// hadal train: a training run from its configuration.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/flags.h"
#include "apps/train_plan.h"
#include "base/check.h"
#include "base/log.h"
#include "base/parallel.h"
#include "dist/launcher.h"
#include "dist/placement.h"
#include "dist/ranks.h"
#include "train/export_run.h"
#include "train/trainer.h"

namespace hadal::apps {
namespace {

// Set by the first signal; the second one kills, as usual.
std::atomic<bool> interrupted{false};
extern "C" void on_signal(int signal) {
  interrupted = true;
  std::signal(signal, SIG_DFL);
}

struct TrainFlags {
  std::string config, export_folder, export_format = "bf16";
  double max_seconds = 0.0;
  int threads = 0;
  int64_t ranks = 0;  ///< 0: as the environment says
  int64_t restarts = 3;
  double rank_timeout = 1800.0;
  TrainPlanFlags plan;
};

/// One process a rank on this machine, each of this program with this command line.
int launch_ranks(const TrainFlags& flags, std::chrono::steady_clock::time_point start) {
  HADAL_INPUT_CHECK(!dist::find_placement(dist::process_environment()),
                    "--ranks: this process is one of several ranks already (RANK, WORLD_SIZE and "
                    "the like are set): expected one of the two");
  train::load_run_config(flags.config);  // its errors are told once
  const int threads = flags.threads > 0
                          ? flags.threads
                          : std::max(1, static_cast<int>(num_threads() / flags.ranks));
  const auto command = [flags, threads, start] {
    // What is left of the time, after restarts, too; 0 would be no limit.
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    const double left =
        flags.max_seconds > 0.0 ? std::max(0.001, flags.max_seconds - spent.count()) : 0.0;
    return std::vector<std::string>{"/proc/self/exe", "train",          flags.config,
                                    "--max-seconds",  concat(left),     "--threads",
                                    concat(threads),  "--rank-timeout", concat(flags.rank_timeout)};
  };
  return dist::launch({.command = command, .ranks = flags.ranks, .restarts = flags.restarts});
}

/// The ranks that the environment names; one where it names none.
std::unique_ptr<dist::Ranks> join_ranks(const TrainFlags& flags) {
  const auto placement = dist::find_placement(dist::process_environment());
  if (!placement) return std::make_unique<dist::Ranks>();
  if (placement->rank > 0) log::set_level(log::Level::kWarn);
  return std::make_unique<dist::Ranks>(
      *placement, std::chrono::milliseconds(static_cast<int64_t>(flags.rank_timeout * 1e3)));
}

int train(const TrainFlags& flags,
          dist::Ranks& ranks,
          std::chrono::steady_clock::time_point start) {
  train::Trainer trainer(train::load_run_config(flags.config), ranks);
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  const train::RunOutcome outcome = trainer.run([&] {
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    return interrupted.load() || (flags.max_seconds > 0.0 && spent.count() >= flags.max_seconds);
  });
  const bool stopped = outcome == train::RunOutcome::kStopped;
  if (!ranks.first()) return stopped ? dist::kExitStopped : 0;
  if (stopped) {
    std::printf("stopped after %lld of %lld tokens; the same command goes on from here\n",
                static_cast<long long>(trainer.progress().tokens),
                static_cast<long long>(trainer.total_tokens()));
    return dist::kExitStopped;
  }
  std::printf("trained on %lld tokens in %lld steps\n",
              static_cast<long long>(trainer.progress().tokens),
              static_cast<long long>(trainer.progress().step));
  return 0;
}

int run(const TrainFlags& flags) {
  const auto start = std::chrono::steady_clock::now();
  if (flags.threads > 0) set_num_threads(flags.threads);
  if (flags.plan.plan)
    return print_train_plan(flags.config, std::max<int64_t>(1, flags.ranks), flags.plan);
  if (!flags.export_folder.empty()) {
    const auto format = flags.export_format == "official" ? checkpoint::SaveFormat::kOfficial
                                                          : checkpoint::SaveFormat::kBf16;
    const train::RunProgress progress =
        train::export_run(train::load_run_config(flags.config), flags.export_folder, format);
    std::printf("the model after %lld tokens is in %s\n", static_cast<long long>(progress.tokens),
                flags.export_folder.c_str());
    return 0;
  }
  std::unique_ptr<dist::Ranks> ranks;  // outlives what is thrown below
  try {
    HADAL_INPUT_CHECK(flags.ranks <= 1024, "--ranks: expected a number from 1 to 1024, found ",
                      flags.ranks);
    if (flags.ranks > 1) return launch_ranks(flags, start);
    ranks = join_ranks(flags);
    return train(flags, *ranks, start);
  } catch (const dist::RankLost& error) {
    // Transfers under way would be waited for.
    std::fprintf(stderr, "hadal: %s\n", error.what());
    std::fflush(nullptr);
    std::_Exit(dist::kExitRankLost);
  }
}

/// --plan and what belongs to it; without it these flags are refused.
void define_plan_flags(CLI::App& app, TrainPlanFlags& flags) {
  auto* plan = app.add_flag("--plan", flags.plan,
                            "print who moves what, memory, traffic and time of a step, and train "
                            "nothing; RUN may be a config.json, v4-flash or v4-pro");
  app.add_flag("--json", flags.json, "with --plan: print JSON")->needs(plan);
  app.add_option("--dense-ranks", flags.dense_ranks,
                 "with --plan: how many ranks may share the dense matrices; default: as many as "
                 "can evenly")
      ->check(between(1, 1e6))
      ->needs(plan);
  app.add_option("--step-tokens", flags.step_tokens,
                 "with --plan: tokens of a step; default: the run's last, or 64 Mi")
      ->check(between(1, 1e12))
      ->needs(plan);
  app.add_option("--row-length", flags.row_length,
                 "with --plan: tokens of a row; default: the last stage's, or 4096")
      ->check(between(1, 1e9))
      ->needs(plan);
  app.add_option("--tflops", flags.teraflops, "with --plan: TFLOP/s of a rank")
      ->check(above(0))
      ->needs(plan)
      ->capture_default_str();
  app.add_option("--link-gbs", flags.link_gigabytes, "with --plan: GB/s into and out of a rank")
      ->check(above(0))
      ->needs(plan)
      ->capture_default_str();
}

}  // namespace

std::function<int()> define_train(CLI::App& app) {
  auto flags = std::make_shared<TrainFlags>();
  app.add_option("config", flags->config, "the run's JSON file (docs/training.md)")->required();
  app.add_option("--max-seconds", flags->max_seconds,
                 "stop after this time with a checkpoint; the same command goes on")
      ->check(between(0, 1e9));
  auto* folder =
      app.add_option("--export", flags->export_folder,
                     "write the run's newest checkpoint as a model folder, train nothing");
  app.add_option("--to", flags->export_format, "storage of --export: bf16 or official")
      ->check(CLI::IsMember({"bf16", "official"}))
      ->needs(folder)
      ->capture_default_str();
  app.add_option("--threads", flags->threads, "CPU threads of a rank; default: all, shared out")
      ->check(between(1, 1024));
  app.add_option("--ranks", flags->ranks,
                 "train in so many processes of this machine (docs/parallelism.md)")
      ->check(between(1, 1e6));
  app.add_option("--restarts", flags->restarts,
                 "with --ranks: how often all start again after one has died")
      ->check(between(0, 1e6));
  app.add_option("--rank-timeout", flags->rank_timeout,
                 "seconds after which a rank that waits for another gives up")
      ->check(between(1, 1e6));
  define_plan_flags(app, flags->plan);
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
