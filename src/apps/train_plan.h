// hadal train RUN --plan: who moves what, memory, traffic and time of a step, before anything is
// allocated (docs/parallelism.md).
#pragma once

#include <cstdint>
#include <string>

namespace hadal::apps {

struct TrainPlanFlags {
  bool plan = false, json = false;
  int64_t dense_ranks = 0;                  ///< 0: as many as can share evenly
  int64_t step_tokens = 0, row_length = 0;  ///< 0: the run's
  double teraflops = 400.0, link_gigabytes = 50.0;
};

/// `run`: a run's file, a config.json, or v4-flash or v4-pro. Errors: InputError where it is none,
/// or says less of a step than is needed.
int print_train_plan(const std::string& run, int64_t ranks, const TrainPlanFlags& flags);

}  // namespace hadal::apps
