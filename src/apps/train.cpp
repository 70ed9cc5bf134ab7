// hadal train: a training run from its configuration.
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <memory>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/flags.h"
#include "base/check.h"
#include "base/parallel.h"
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
};

int run(const TrainFlags& flags) {
  const auto start = std::chrono::steady_clock::now();
  if (flags.threads > 0) set_num_threads(flags.threads);
  if (!flags.export_folder.empty()) {
    const auto format = flags.export_format == "official" ? checkpoint::SaveFormat::kOfficial
                                                          : checkpoint::SaveFormat::kBf16;
    const train::RunProgress progress =
        train::export_run(train::load_run_config(flags.config), flags.export_folder, format);
    std::printf("the model after %lld tokens is in %s\n", static_cast<long long>(progress.tokens),
                flags.export_folder.c_str());
    return 0;
  }
  train::Trainer trainer(train::load_run_config(flags.config));
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  const train::RunOutcome outcome = trainer.run([&] {
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    return interrupted.load() || (flags.max_seconds > 0.0 && spent.count() >= flags.max_seconds);
  });
  if (outcome == train::RunOutcome::kStopped) {
    std::printf("stopped after %lld of %lld tokens; the same command goes on from here\n",
                static_cast<long long>(trainer.progress().tokens),
                static_cast<long long>(trainer.total_tokens()));
    return 1;
  }
  std::printf("trained on %lld tokens in %lld steps\n",
              static_cast<long long>(trainer.progress().tokens),
              static_cast<long long>(trainer.progress().step));
  return 0;
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
  app.add_option("--threads", flags->threads, "CPU threads; default: all")->check(between(1, 1024));
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
