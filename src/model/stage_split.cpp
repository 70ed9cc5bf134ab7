#include "model/stage_split.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/join.h"
#include "model/cost.h"
#include "model/describe.h"

namespace hadal::model {

LayerRun all_layers(const ModelConfig& config) { return {.begin = 0, .end = config.n_layers}; }

StageSplit::StageSplit(const ModelConfig& config,
                       std::vector<int64_t> layers,
                       const std::string& where)
    : layers_(std::move(layers)) {
  const auto text = [&] { return concat('[', join(layers_), ']'); };
  HADAL_INPUT_CHECK(!layers_.empty(), where, ": expected layers of each stage, found none");
  for (const int64_t count : layers_)
    HADAL_INPUT_CHECK(count >= 1, where, ": expected a layer or more on every stage, found ",
                      text());
  const int64_t sum = std::accumulate(layers_.begin(), layers_.end(), int64_t{0});
  HADAL_INPUT_CHECK(sum == config.n_layers, where, ": expected the model's ", config.n_layers,
                    " layers, found ", text(), ", which are ", sum);
  for (int64_t begin = 0; const int64_t count : layers_) {
    begins_.push_back(begin);
    begin += count;
  }
  struct Stages final : FieldVisitor {
    explicit Stages(StageSplit& split) : of(split) {}
    void field(Parameter&, const Field& field) override {
      const bool is_top = field.block < 0 && field.kind != ParamKind::kEmbedding;
      const int64_t stage = is_top ? of.size() - 1 : of.stage_of_block(field.block);
      of.parameters_.push_back(stage);
    }
    StageSplit& of;
  } stages(*this);
  ModelParameters parameters;
  describe(config, parameters, stages);
}

LayerRun StageSplit::run(int64_t stage) const {
  const auto at = static_cast<size_t>(stage);
  HADAL_CHECK(at < layers_.size(), "stage split: stage ", stage, " of ", layers_.size());
  return {.begin = begins_[at],
          .end = begins_[at] + layers_[at],
          .first = stage == 0,
          .last = at + 1 == layers_.size()};
}

int64_t StageSplit::stage_of_block(int64_t block) const {
  if (block < 0) return 0;
  return std::upper_bound(begins_.begin(), begins_.end(), block) - begins_.begin() - 1;
}

double stage_flops(const ModelConfig& config, const LayerRun& run, int64_t row_length) {
  const int64_t context = std::max<int64_t>(1, row_length / 2);
  double flops = 0.0;
  for (int64_t layer = run.begin; layer < run.end; ++layer)
    flops += block_flops(config, layer, context);
  if (!run.last) return flops;
  const bool with_mtp = config.n_mtp_layers > 0;
  if (with_mtp) flops += block_flops(config, config.n_layers, context);
  return flops + (with_mtp ? 2.0 : 1.0) * head_flops(config);
}

std::vector<int64_t> balanced_layers(const ModelConfig& config,
                                     int64_t stages,
                                     int64_t row_length,
                                     const std::string& where) {
  HADAL_INPUT_CHECK(stages >= 1 && stages <= config.n_layers, where, ": expected 1 to ",
                    config.n_layers, " stages, a layer or more on each, found ", stages);
  // most[s][n]: the slowest of stages s ... over the layers from n on; the same again is the split.
  const auto layers = static_cast<size_t>(config.n_layers), count = static_cast<size_t>(stages);
  constexpr double kNever = std::numeric_limits<double>::infinity();
  std::vector<std::vector<double>> most(count + 1, std::vector<double>(layers + 1, kNever));
  std::vector<std::vector<size_t>> ends(count, std::vector<size_t>(layers + 1, 0));
  most[count][layers] = 0.0;
  for (size_t stage = count; stage-- > 0;) {
    for (size_t begin = 0; begin < layers; ++begin) {
      for (size_t end = begin + 1; end <= layers; ++end) {
        if (most[stage + 1][end] == kNever) continue;
        const LayerRun run{.begin = static_cast<int64_t>(begin),
                           .end = static_cast<int64_t>(end),
                           .first = stage == 0,
                           .last = stage + 1 == count};
        const double slowest = std::max(stage_flops(config, run, row_length), most[stage + 1][end]);
        if (slowest >= most[stage][begin]) continue;
        most[stage][begin] = slowest;
        ends[stage][begin] = end;
      }
    }
  }
  std::vector<int64_t> result;
  for (size_t stage = 0, begin = 0; stage < count; ++stage) {
    result.push_back(static_cast<int64_t>(ends[stage][begin] - begin));
    begin = ends[stage][begin];
  }
  return result;
}

void keep_stage(Transformer& model, const StageSplit& split, int64_t stage) {
  size_t at = 0;
  model.visit([&](Parameter& parameter) {
    parameter.elsewhere = split.stage_of_parameters().at(at++) != stage;
    if (parameter.elsewhere) parameter.value = at::Tensor();
  });
}

}  // namespace hadal::model
