#include "train/pipeline_schedule.h"

#include <algorithm>

#include "base/check.h"

namespace hadal::train {

std::vector<PipelineAction> one_forward_one_backward(int64_t stages, int64_t stage, int64_t rows) {
  HADAL_CHECK(stages >= 1 && stage >= 0 && stage < stages && rows >= 0, "pipeline: stage ", stage,
              " of ", stages, " over ", rows, " rows");
  using Kind = PipelineAction::Kind;
  const int64_t ahead = std::min(rows, stages - stage - 1);
  std::vector<PipelineAction> actions;
  for (int64_t row = 0; row < ahead; ++row) actions.push_back({Kind::kForward, row});
  for (int64_t row = ahead; row < rows; ++row) {
    actions.push_back({Kind::kForward, row});
    actions.push_back({Kind::kBackward, row - ahead});
  }
  for (int64_t row = rows - ahead; row < rows; ++row) actions.push_back({Kind::kBackward, row});
  return actions;
}

double pipeline_bubble(int64_t stages, int64_t rows) {
  return static_cast<double>(stages - 1) / static_cast<double>(rows + stages - 1);
}

}  // namespace hadal::train
