#include "train/export_run.h"

#include <algorithm>
#include <filesystem>

#include "base/check.h"
#include "checkpoint/official.h"
#include "model/init.h"
#include "train/optimizer.h"

namespace hadal::train {

model::ModelConfig trained_config(const RunConfig& config) {
  model::ModelConfig trained =
      config.init_checkpoint.empty()
          ? model::load_config(config.model)
          : checkpoint::OfficialCheckpoint::open(config.init_checkpoint).config();
  trained.drafter = {};
  return trained;
}

int64_t trained_length(const RunConfig& config, const RunProgress& progress) {
  int64_t longest = 0;
  if (!config.init_checkpoint.empty()) longest = trained_config(config).trained_length;
  for (size_t stage = 0; stage < config.stages.size(); ++stage) {
    const auto index = static_cast<int64_t>(stage);
    if (index < progress.stage || (index == progress.stage && progress.row > 0))
      longest = std::max(longest, config.stages[stage].row_length);
  }
  return longest;
}

model::ExpertDtype exported_experts(const RunConfig& config,
                                    const model::ModelConfig& trained,
                                    const RunProgress* progress) {
  size_t last = config.stages.size() - 1;
  if (progress != nullptr) {
    const int64_t stage = progress->stage - (progress->row == 0 && progress->stage > 0 ? 1 : 0);
    last = std::min(last, static_cast<size_t>(stage));
  }
  const bool fp8 = trained.expert_dtype == model::ExpertDtype::kFp8 ||
                   config.stages[last].numerics == ops::Numerics::kFp8;
  return fp8 ? model::ExpertDtype::kFp8 : model::ExpertDtype::kFp4;
}

std::string generation_config(const RunConfig& config) {
  const auto path = std::filesystem::path(config.model).parent_path() / "generation_config.json";
  return std::filesystem::exists(path) ? path.string() : "";
}

RunProgress export_run(const RunConfig& config,
                       const std::string& folder,
                       checkpoint::SaveFormat format) {
  const std::string state = newest_whole_state(config.out, false);
  HADAL_INPUT_CHECK(!state.empty(), config.out, ": the run has no checkpoint to export");
  const model::ModelConfig model_config = trained_config(config);
  model::Transformer model(model_config);
  // Values of the right shapes and types, all of which the checkpoint replaces.
  model::init_weights(model, {.seed = config.seed, .std = config.init_std, .token_counts = {}},
                      at::kFloat);
  model::require_gradients(model);
  Optimizer optimizer(model, config.optimizer);
  const RunProgress progress = load_state(state, model, optimizer);
  checkpoint::save_model(model, folder,
                         {.format = format,
                          .experts = exported_experts(config, model_config, &progress),
                          .max_shard_bytes = config.export_shard_bytes,
                          .trained_length = trained_length(config, progress),
                          .tokenizer = config.tokenizer,
                          .generation_config = generation_config(config)});
  return progress;
}

}  // namespace hadal::train
