// The JSON file that describes a training run. Unknown keys are errors; paths are relative to the
// file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/token_shards.h"
#include "dist/mesh.h"
#include "train/objective.h"
#include "train/optimizer.h"
#include "train/recompute_plan.h"
#include "train/schedule.h"

namespace hadal::train {

struct ValidationSpec {
  std::string source;  ///< by name; empty: no validation
  int64_t rows = 8;
  int64_t row_length = 0;  ///< 0: that of the last stage
  int64_t every_tokens = 0;
};

struct CheckpointSpec {
  int64_t every_steps = 0;     ///< 0: by time alone
  double every_seconds = 300;  ///< at least this long between two, counted after the last
  int64_t keep = 2;
  /// Written by a thread from a copy while the run goes on; else between two steps, without a copy.
  bool asynchronous = true;
};

struct RunConfig {
  std::string path;
  std::string model;      ///< an official config.json
  std::string tokenizer;  ///< tokenizer.json
  std::string out;        ///< folder for checkpoints, metrics and the exported model
  std::string cache;      ///< folder for token files; default: out/tokens
  std::string device;     ///< "cpu", "cuda" or "auto"
  uint64_t seed = 1;
  double init_std = 0.006;
  std::string init_checkpoint;  ///< weights to start from instead: an official checkpoint folder
  std::vector<data::SourceSpec> sources;
  std::vector<Stage> stages;
  Schedule schedule;
  OptimizerParams optimizer;
  double clip_norm = 1.0;
  double router_bias_speed = 0.001;
  double balance_weight = 1e-4;
  double index_weight = 0.01;
  dist::MeshShape mesh;                  ///< how several ranks share a step
  std::vector<int64_t> pipeline_layers;  ///< of each stage; empty: balanced by cost
  int64_t micro_batch_tokens = 0;        ///< tokens of one forward pass
  RecomputeSpec recompute;
  ValidationSpec validation;
  CheckpointSpec checkpoint;
  int64_t export_shard_bytes = int64_t{4} << 30;  ///< largest weight file of the exported model
  int64_t log_every_steps = 1;
  /// Clamped SwiGLU values are counted every so many steps (0: never); counting costs a few passes.
  int64_t count_clamps_every_steps = 50;

  int64_t total_tokens() const;
  const data::SourceSpec& source(const std::string& name) const;
  int32_t source_index(const std::string& name) const;
};

/// InputErrors name the file and the key.
RunConfig load_run_config(const std::string& path);

}  // namespace hadal::train
