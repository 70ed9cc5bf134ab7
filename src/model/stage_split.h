// The stages of a pipeline: each has a run of a model's layers (docs/decisions/0031-pipeline.md).
//
// The first stage also has the embedding; the last the norm and the head behind the streams and the
// MTP block. No parameter is on two stages.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/transformer.h"

namespace hadal::model {

/// What one stage has of the main layers: [begin, end).
struct LayerRun {
  int64_t begin = 0, end = 0;
  bool first = true;  ///< has the embedding
  bool last = true;   ///< has head and MTP block
};

/// All layers: a pipeline of one stage.
LayerRun all_layers(const ModelConfig& config);

class StageSplit {
 public:
  /// `layers`: main layers of each stage, in order. Errors: InputError beginning with `where` for a
  /// stage without layers, and where they are not those of the model.
  StageSplit(const ModelConfig& config, std::vector<int64_t> layers, const std::string& where);

  int64_t size() const { return static_cast<int64_t>(layers_.size()); }
  const std::vector<int64_t>& layers() const { return layers_; }
  LayerRun run(int64_t stage) const;
  /// By parameter, in the order in which a model is visited.
  const std::vector<int64_t>& stage_of_parameters() const { return parameters_; }
  /// Of a block; n_layers: the MTP block.
  int64_t stage_of_block(int64_t block) const;

 private:
  std::vector<int64_t> layers_, begins_, parameters_;
};

/// Layers of each stage so that the slowest of them takes least time over rows of `row_length`
/// tokens, by FLOPs (stage_flops); of equally good splits the one with the shortest first stages.
/// Errors: InputError beginning with `where` for more stages than layers.
std::vector<int64_t> balanced_layers(const ModelConfig& config,
                                     int64_t stages,
                                     int64_t row_length,
                                     const std::string& where);

/// FLOPs of a token's forward pass through a stage, averaged over a row's places.
double stage_flops(const ModelConfig& config, const LayerRun& run, int64_t row_length);

/// Declares what other stages have to be elsewhere, and takes away its values if there are any.
void keep_stage(Transformer& model, const StageSplit& split, int64_t stage);

}  // namespace hadal::model
