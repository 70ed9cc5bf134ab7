#include "train/run_setup.h"

#include <algorithm>
#include <cmath>
#include <unistd.h>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/join.h"
#include "base/log.h"
#include "checkpoint/load_model.h"
#include "checkpoint/names.h"
#include "model/init.h"
#include "train/export_run.h"

namespace hadal::train {
namespace {

std::vector<int64_t> token_counts(const RunConfig& config,
                                  const std::vector<data::TokenShards>& sources,
                                  int64_t vocab) {
  std::vector<int64_t> counts(static_cast<size_t>(vocab), 0);
  for (const data::TokenShards& source : sources) {
    for (int64_t document = 0; document < source.num_documents(); ++document) {
      for (const int32_t id : source.document(document)) {
        HADAL_INPUT_CHECK(id >= 0 && id < vocab, config.tokenizer, ": the text holds token ", id,
                          ", but the vocab_size of ", config.model, " is ", vocab);
        ++counts[static_cast<size_t>(id)];
      }
    }
  }
  return counts;
}

/// FP32 weights, gradients and the optimizer's moments must fit before anything is allocated.
void check_memory(const std::string& path, const model::ModelConfig& config) {
  const auto census = checkpoint::take_census(config, checkpoint::storage_of(config));
  const double needed = 12.0 * static_cast<double>(census.total().parameters);
  const double machine =
      static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGESIZE));
  constexpr double kGib = 0x1p30;
  HADAL_INPUT_CHECK(needed <= machine, path, ": training needs about ", std::ceil(needed / kGib),
                    " GiB for weights, gradients and the optimizer, this "
                    "machine has ",
                    std::floor(machine / kGib), " GiB");
}

}  // namespace

at::Device pick_device(const std::string& name) {
  const bool has_cuda = at::globalContext().hasCUDA();
  HADAL_INPUT_CHECK(name != "cuda" || has_cuda,
                    "device: \"cuda\" was asked for, but this build or machine has no CUDA device");
  return at::Device(name == "cpu" || !has_cuda ? at::kCPU : at::kCUDA);
}

at::Device training_device(const RunConfig& config, const dist::Ranks& ranks) {
  const at::Device device = pick_device(config.device);
  HADAL_INPUT_CHECK(ranks.size() == 1 || device.is_cpu(), config.path,
                    ": device: several ranks train on the CPU: expected \"cpu\", found \"",
                    config.device, "\"");
  for (const Stage& stage : config.stages) {
    HADAL_INPUT_CHECK(stage.numerics != ops::Numerics::kFp8 || device.is_cpu(), config.path,
                      ": stage ", stage.name,
                      ": numerics fp8 is trained on the CPU: device: "
                      "expected \"cpu\", found \"",
                      config.device, "\"");
  }
  return device;
}

namespace {

constexpr const char* kPreparing = "the first rank prepares the run";

}  // namespace

dist::Ranks& after_the_first(dist::Ranks& ranks) {
  if (!ranks.first()) ranks.barrier(kPreparing);
  return ranks;
}

void let_the_others_follow(dist::Ranks& ranks) {
  if (ranks.first()) ranks.barrier(kPreparing);
}

void check_that_ranks_agree(const RunConfig& config,
                            const std::string& newest_checkpoint,
                            dist::Ranks& ranks) {
  if (ranks.size() == 1) return;
  std::vector<int64_t> words(static_cast<size_t>(2 * ranks.size()), 0);
  const auto own = static_cast<size_t>(2 * ranks.rank());
  words[own] = static_cast<int64_t>(fnv1a64(read_file(config.path)));
  words[own + 1] = static_cast<int64_t>(fnv1a64(newest_checkpoint));
  ranks.sum(words);
  const auto differing = [&](size_t word) {
    std::vector<std::string> names;
    for (size_t rank = 1; rank < words.size() / 2; ++rank)
      if (words[2 * rank + word] != words[word]) names.push_back(concat("rank ", rank));
    return join(names);
  };
  HADAL_INPUT_CHECK(differing(0).empty(), config.path, ": ", differing(0),
                    ": expected the file of rank 0, found another");
  HADAL_INPUT_CHECK(differing(1).empty(), config.out, ": ", differing(1),
                    ": expected a folder that all ranks see, found another newest checkpoint than "
                    "rank 0, ",
                    newest_checkpoint.empty() ? "none" : newest_checkpoint, " here");
}

dist::Mesh checked_mesh(const RunConfig& config,
                        const model::ModelConfig& model_config,
                        const dist::Ranks& ranks) {
  stage_split(config, model_config);
  const int64_t context = config.mesh.context;
  HADAL_INPUT_CHECK(context == 1 || config.recompute.policy == RecomputePolicy::kUnset, config.path,
                    ": mesh.context: no pass over a part of a row is planned: expected 1 beside "
                    "\"recompute\", found ",
                    context);
  try {
    for (const Stage& stage : config.stages)
      model::check_context(model_config, stage.row_length, context);
    return {ranks.size(), config.mesh};
  } catch (const InputError& error) {
    throw InputError(concat(config.path, ": ", error.what()));
  }
}

void report_ranks(const Ownership& ownership,
                  const model::StageSplit& split,
                  const dist::Ranks& ranks) {
  if (ranks.size() == 1) return;
  const auto megabytes = [](double bytes) { return std::round(bytes / 1e4) / 1e2; };
  const StateLoad& load = ownership.load();
  log::info("train", ranks.size(),
            " ranks; masters and moments a rank: ", megabytes(static_cast<double>(load.most)),
            " MB at most, ",
            megabytes(static_cast<double>(load.total) / static_cast<double>(ranks.size())),
            " MB on average");
  const dist::Mesh& mesh = ownership.mesh();
  if (split.size() == 1 && mesh.shape().context == 1) return;
  const std::string layers =
      split.size() > 1 ? concat("; layers of the stages: ", join(split.layers())) : "";
  log::info("train", "mesh: ", dist::describe(mesh), layers);
}

model::ModelConfig checked_model_config(const RunConfig& config) {
  model::ModelConfig result = model::load_config(config.model);
  check_memory(config.model, result);
  if (result.drafter.exists()) {
    log::warn("train", config.model, ": the DSpark drafter is no part of the training; the ",
              "exported model has none");
    result.drafter = {};
  }
  if (model::ModelConfig exported = trained_config(config); exported.quantized) {
    exported.expert_dtype = exported_experts(config, exported, nullptr);
    // Found at the start, not when the finished model cannot be written.
    try {
      exported.check_stored();
    } catch (const InputError& error) {
      throw InputError(
          concat(config.init_checkpoint.empty() ? config.model : config.init_checkpoint,
                 ": quantization_config asks for a model in FP8 and ",
                 exported.expert_dtype == model::ExpertDtype::kFp8 ? "FP8 experts" : "FP4",
                 " (without it the model is BF16): ", error.what()));
    }
  }
  const auto check_length = [&](const std::string& where, int64_t row_length) {
    HADAL_INPUT_CHECK(row_length <= result.max_position_embeddings, config.path, ": ", where,
                      ": row_length ", row_length, " exceeds max_position_embeddings ",
                      result.max_position_embeddings);
  };
  for (const Stage& stage : config.stages) {
    if (stage.numerics == ops::Numerics::kReleased) result.check_released();
    if (stage.numerics == ops::Numerics::kFp8) result.check_fp8();
    check_length(concat("stage ", stage.name), stage.row_length);
  }
  check_length("validation", config.validation.row_length);
  return result;
}

model::StageSplit stage_split(const RunConfig& config, const model::ModelConfig& model_config) {
  if (!config.pipeline_layers.empty())
    return {model_config, config.pipeline_layers, config.path + ": mesh.pipeline_layers"};
  int64_t longest = 0;
  for (const Stage& stage : config.stages) longest = std::max(longest, stage.row_length);
  const std::string where = config.path + ": mesh.pipeline";
  return {model_config, model::balanced_layers(model_config, config.mesh.pipeline, longest, where),
          where};
}

model::Transformer build_model(const RunConfig& config,
                               const model::ModelConfig& model_config,
                               const std::vector<data::TokenShards>& sources,
                               int64_t stage) {
  const std::vector<int64_t> counts = token_counts(config, sources, model_config.vocab_size);
  if (!config.init_checkpoint.empty()) {
    const auto stored = checkpoint::OfficialCheckpoint::open(config.init_checkpoint);
    model::Transformer model(stored.config());
    HADAL_INPUT_CHECK(model.config().n_layers == model_config.n_layers, config.init_checkpoint,
                      ": not a model of ", config.model);
    model::keep_stage(model, stage_split(config, model.config()), stage);
    checkpoint::load_weights(model, stored, ops::Numerics::kIdeal,
                             {.held = checkpoint::Held::kDense});
    model.drop_drafter();
    // A checkpoint from transformers has no MTP block although its config names one.
    const auto main_ratios = [](const model::ModelConfig& c) {
      return std::vector<int64_t>(c.compress_ratios.begin(),
                                  c.compress_ratios.begin() + c.n_layers);
    };
    HADAL_INPUT_CHECK(model.config().vocab_size == model_config.vocab_size &&
                          model.config().dim == model_config.dim &&
                          main_ratios(model.config()) == main_ratios(model_config) &&
                          model.config().n_mtp_layers <= model_config.n_mtp_layers,
                      config.init_checkpoint, ": not a model of ", config.model);
    // The file's memory must not be written to.
    model.visit([](model::Parameter& parameter) {
      if (!parameter.elsewhere) parameter.value = parameter.value.clone();
    });
    return model;
  }
  model::Transformer model(model_config);
  model::keep_stage(model, stage_split(config, model_config), stage);
  model::init_weights(model, {.seed = config.seed, .std = config.init_std, .token_counts = counts},
                      at::kFloat);
  return model;
}

}  // namespace hadal::train
