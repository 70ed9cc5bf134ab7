// The order in which a stage of a pipeline does its passes: one forward, one backward
// (docs/decisions/0031-pipeline.md).
#pragma once

#include <cstdint>
#include <vector>

namespace hadal::train {

struct PipelineAction {
  enum class Kind { kForward, kBackward };
  Kind kind = Kind::kForward;
  int64_t row = 0;
  bool operator==(const PipelineAction&) const = default;
};

/// Stage `stage` of `stages` over `rows` rows: first the forward passes that fill the stages behind
/// it, stages - stage - 1 at most, then a forward and a backward pass by turns, then the backward
/// passes that are left. So at most stages - stage rows are between their passes here, rows take
/// both in their order, and the last stage has one row at a time.
std::vector<PipelineAction> one_forward_one_backward(int64_t stages, int64_t stage, int64_t rows);

/// Share of a step's time in which a stage waits where all stages take equally long for a row:
/// (stages - 1) / (rows + stages - 1).
double pipeline_bubble(int64_t stages, int64_t rows);

}  // namespace hadal::train
