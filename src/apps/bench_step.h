// hadal bench step: what a decode step costs beside the model.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hadal::apps {

struct StepBenchOptions {
  int64_t sequences = 64;
  int64_t context = 262'144;  ///< tokens of each
  int64_t rows = 16;          ///< that are drawn from
  int64_t vocab = 129'280;
  double seconds = 1.0;  ///< for each line, at least
};

struct StepBenchLine {
  std::string what;
  double microseconds;  ///< median
};

/// Planning over V4-Flash's layers, then drawing from rows of normal logits in four ways.
std::vector<StepBenchLine> bench_step(const StepBenchOptions& options);

}  // namespace hadal::apps
