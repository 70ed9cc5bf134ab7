#include "train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <unistd.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "base/check.h"
#include "base/file.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/progress.h"
#include "checkpoint/load_model.h"
#include "checkpoint/save_model.h"
#include "model/init.h"
#include "train/export_run.h"
#include "train/row_plan.h"

namespace hadal::train {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

at::Device pick_device(const std::string& name) {
  const bool has_cuda = at::globalContext().hasCUDA();
  HADAL_INPUT_CHECK(name != "cuda" || has_cuda,
                    "device: \"cuda\" was asked for, but this build or machine has no CUDA device");
  return at::Device(name == "cpu" || !has_cuda ? at::kCPU : at::kCUDA);
}

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

/// The model's configuration, and whether the stages can be trained with it.
model::ModelConfig checked_model_config(const RunConfig& config) {
  model::ModelConfig result = model::load_config(config.model);
  check_memory(config.model, result);
  if (result.drafter.exists()) {
    log::warn("train", config.model, ": the DSpark drafter is no part of the training; the ",
              "exported model has none");
  }
  if (const model::ModelConfig exported = trained_config(config); exported.quantized) {
    // Found at the start, not when the finished model cannot be written.
    try {
      exported.check_released();
    } catch (const InputError& error) {
      throw InputError(
          concat(config.init_checkpoint.empty() ? config.model : config.init_checkpoint,
                 ": quantization_config asks for a model in FP8 and FP4 (without it the model is "
                 "BF16): ",
                 error.what()));
    }
  }
  const auto check_length = [&](const std::string& where, int64_t row_length) {
    HADAL_INPUT_CHECK(row_length <= result.max_position_embeddings, config.path, ": ", where,
                      ": row_length ", row_length, " exceeds max_position_embeddings ",
                      result.max_position_embeddings);
  };
  for (const Stage& stage : config.stages) {
    if (stage.numerics == ops::Numerics::kReleased) result.check_released();
    check_length(concat("stage ", stage.name), stage.row_length);
  }
  check_length("validation", config.validation.row_length);
  return result;
}

model::Transformer build_model(const RunConfig& config,
                               const model::ModelConfig& model_config,
                               const std::vector<data::TokenShards>& sources) {
  const std::vector<int64_t> counts = token_counts(config, sources, model_config.vocab_size);
  if (!config.init_checkpoint.empty()) {
    model::Transformer model =
        checkpoint::load_model(checkpoint::OfficialCheckpoint::open(config.init_checkpoint),
                               ops::Numerics::kIdeal, checkpoint::Held::kDense);
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
    model.visit([](model::Parameter& parameter) { parameter.value = parameter.value.clone(); });
    return model;
  }
  model::Transformer model(model_config);
  model::init_weights(model, {.seed = config.seed, .std = config.init_std, .token_counts = counts},
                      at::kFloat);
  return model;
}

}  // namespace

struct Trainer::Impl {
  explicit Impl(RunConfig run)
      : config(std::move(run)),
        // What can be wrong with the configuration is found before anything is written.
        model_config(checked_model_config(config)),
        device(pick_device(config.device)),
        lock(prepare_folder(config)),
        sources(open_sources(config)),
        plan(config, sources, from_newest(config, load_parts)),
        model(build_model(config, model_config, sources)) {
    // Reductions inside LibTorch depend on its thread count; our own kernels do not.
    if (device.is_cpu()) at::set_num_threads(1);
    model::move_to(model, device);
    model::require_gradients(model);
    optimizer = std::make_unique<Optimizer>(model, config.optimizer);
    if (!config.validation.source.empty()) {
      const auto index = static_cast<size_t>(config.source_index(config.validation.source));
      validation =
          validation_rows(sources[index], config.sources[index].kind == data::SourceKind::kText,
                          config.validation.rows, config.validation.row_length);
    }
    remove_leftovers(config.out);
    restore();
    metrics = std::make_unique<MetricsWriter>(config.out, progress.step);
    bar = std::make_unique<Progress>("train", plan.total_tokens(), "tokens");
  }

  static std::string prepare_folder(const RunConfig& config) {
    const auto expect_file = [](const std::string& path) {
      HADAL_INPUT_CHECK(std::filesystem::is_regular_file(path), path, ": no such file");
    };
    expect_file(config.tokenizer);
    for (const data::SourceSpec& source : config.sources) {
      for (const std::string& file : source.files) expect_file(file);
    }
    std::filesystem::create_directories(config.out);
    return config.out + "/lock";
  }

  /// What `read` makes of the newest checkpoint; where that is damaged, the way on is named.
  template <typename Read>
  static auto from_newest(const RunConfig& config, Read read) -> decltype(read(std::string())) {
    const std::vector<std::string> states = complete_states(config.out);
    if (states.empty()) return {};
    try {
      return read(states.back());
    } catch (const InputError& error) {
      if (states.size() == 1) throw;
      throw InputError(concat(error.what(), "; to go on from ", states[states.size() - 2],
                              ", the checkpoint before it, remove ", states.back()));
    }
  }

  void restore() {
    const std::string folder = newest(config);
    if (folder.empty()) return;
    progress = from_newest(
        config, [&](const std::string& state) { return load_state(state, model, *optimizer); });
    HADAL_INPUT_CHECK(progress.stage <= static_cast<int64_t>(config.stages.size()) &&
                          progress.plan.size() <= config.stages.size(),
                      folder, ": the run was in stage ", progress.stage, ", but ", config.path,
                      " has ", config.stages.size());
    for (size_t stage = 0; stage < progress.plan.size(); ++stage) {
      HADAL_INPUT_CHECK(
          progress.plan[stage] == plan.begun_fingerprint(stage), folder, ": stage ",
          config.stages[stage].name,
          " began with other rows (seed, data, tokenizer, row length, mixture or tokens changed); "
          "restore the configuration or choose another \"out\"");
    }
    log::info("train", "going on from ", folder, ", ", progress.tokens, " tokens");
    extend_stage();
  }

  /// The stage that began last may have got more tokens since, also when it was finished.
  void extend_stage() {
    if (progress.plan.empty()) return;
    const size_t last = progress.plan.size() - 1;
    const int64_t more = plan.num_rows(last) - plan.begun_rows(last);
    if (more > 0) {
      log::info("train", "stage ", config.stages[last].name, " goes on with ", more, " more rows");
      if (progress.stage > static_cast<int64_t>(last)) {
        progress.stage = static_cast<int64_t>(last);
        progress.row = plan.begun_rows(last);
      }
    }
    progress.plan[last] = plan.fingerprint(last);
    progress.parts.resize(progress.plan.size());
    for (size_t stage = 0; stage < progress.plan.size(); ++stage)
      progress.parts[stage] = plan.parts(stage);
  }

  static std::string newest(const RunConfig& config) {
    const std::vector<std::string> states = complete_states(config.out);
    return states.empty() ? "" : states.back();
  }

  const Stage& stage() const { return config.stages[static_cast<size_t>(progress.stage)]; }
  bool finished() const { return progress.stage == static_cast<int64_t>(config.stages.size()); }

  RunOutcome run(const std::function<bool()>& stop) {
    last_save = Clock::now();
    if (!finished()) {
      set_earlier_model_aside();
      begin_stage();
    }
    while (!finished()) {
      if (progress.row == plan.num_rows(static_cast<size_t>(progress.stage))) {
        end_stage();
        continue;
      }
      if (stop()) {
        save();
        return RunOutcome::kStopped;
      }
      step();
      // What a step reports comes before its checkpoint: a run that goes on from there has all of
      // it, and one that goes on from an earlier checkpoint reports all of it again.
      if (progress.row == plan.num_rows(static_cast<size_t>(progress.stage))) end_stage();
      if (save_is_due()) save();
    }
    save();
    bar->finish();
    export_model();
    return RunOutcome::kFinished;
  }

  /// A run that was finished and got further stages since: its model is no longer the last word.
  void set_earlier_model_aside() {
    const std::string folder = config.out + "/model";
    if (!std::filesystem::exists(folder)) return;
    const std::string aside = concat(folder, "-step-", progress.step);
    std::filesystem::remove_all(aside);
    std::filesystem::rename(folder, aside);
    log::info("train", "the model of an earlier end of this run is now in ", aside);
  }

  /// The trained weights and the tokenizer as a checkpoint folder that every command reads.
  void export_model() {
    const std::string folder = config.out + "/model";
    if (std::filesystem::exists(folder)) return;
    const bool quantised = model.config().quantized;
    checkpoint::save_model(
        model, folder,
        {.format = quantised ? checkpoint::SaveFormat::kOfficial : checkpoint::SaveFormat::kBf16,
         .max_shard_bytes = config.export_shard_bytes,
         .trained_length = trained_length(config, progress),
         .tokenizer = config.tokenizer,
         .generation_config = generation_config(config)});
    log::info("train", "the trained model is in ", folder);
  }

  void begin_stage() {
    const auto index = static_cast<size_t>(progress.stage);
    log::info("train", "stage ", stage().name, ": ", plan.num_rows(index), " rows of ",
              stage().row_length, ", attention ", attention_mode_name(stage().mode), ", numerics ",
              ops::numerics_name(stage().numerics), ", ", plan.summary(index));
    if (progress.plan.size() > index) return;  // begun before this process
    progress.plan.push_back(plan.fingerprint(index));
    progress.parts.push_back(plan.parts(index));
    // The same weights under the new rules: what the switch costs before any training.
    if (index > 0) validate("validation_at_switch", stage());
  }

  void end_stage() {
    validate("validation", stage());
    ++progress.stage;
    progress.row = 0;
    if (!finished()) begin_stage();
  }

  void step() {
    const Clock::time_point start = Clock::now();
    const auto index = static_cast<size_t>(progress.stage);
    const int64_t row_length = stage().row_length;
    const int64_t wanted =
        std::max<int64_t>(1, config.schedule.batch_tokens(progress.tokens) / row_length);
    const int64_t rows = std::min(wanted, plan.num_rows(index) - progress.row);
    const int64_t micro_rows = std::max<int64_t>(1, config.micro_batch_tokens / row_length);

    std::vector<MicroBatch> batches;
    StepCounts counts;
    for (int64_t row = 0; row < rows; row += micro_rows) {
      batches.emplace_back(plan.rows(index, progress.row + row, std::min(micro_rows, rows - row)),
                           device);
      counts.add(batches.back(), model.config());
    }
    const bool count_clamps =
        config.count_clamps_every_steps > 0 && progress.step % config.count_clamps_every_steps == 0;
    const ObjectiveParams objective{
        .mtp_weight = config.schedule.mtp_weight_at(progress.tokens),
        .balance_weight = config.balance_weight,
        .index_weight = config.index_weight,
        .mode = stage().mode,
        .numerics = stage().numerics,
        .count_clamps = count_clamps,
    };
    const int64_t step_tokens = rows * row_length;
    const double rate = stage().learning_rate > 0.0
                            ? stage().learning_rate
                            : config.schedule.learning_rate.at(progress.tokens, step_tokens);
    StepMeasures measures;
    optimizer->zero_grad();
    for (const MicroBatch& batch : batches) accumulate(model, batch, counts, objective, measures);
    double norm = 0.0;
    const bool moved = update(measures, rate, norm);

    progress.row += rows;
    progress.tokens += step_tokens;
    ++progress.step;
    report(measures, rate, norm, moved, step_tokens, seconds_since(start));
    const int64_t every = config.validation.every_tokens;
    if (every > 0 && progress.tokens / every != (progress.tokens - step_tokens) / every) {
      validate("validation", stage());
    }
  }

  /// Applies the gradients; false when they are not finite and the step is left out.
  bool update(const StepMeasures& measures, double rate, double& norm) {
    norm = (config.clip_norm > 0.0 ? optimizer->clip_gradients(config.clip_norm)
                                   : optimizer->grad_norm())
               .item<double>();
    if (!std::isfinite(norm)) {
      ++progress.skipped_steps;
      ++skipped_in_a_row;
      log::warn("train", "step ", progress.step, ": the gradient norm is ", norm,
                "; the update is left out");
      HADAL_INPUT_CHECK(skipped_in_a_row < 10, config.path,
                        ": ten steps in a row without finite gradients; the newest checkpoint is "
                        "from before them");
      return false;
    }
    skipped_in_a_row = 0;
    if (rate > 0.0) optimizer->step(rate);
    if (stage().mode != model::AttentionMode::kIndexerWarmup) {
      update_router_bias(model, measures, config.router_bias_speed);
    }
    return true;
  }

  void report(const StepMeasures& measures,
              double rate,
              double norm,
              bool moved,
              int64_t step_tokens,
              double seconds) {
    const double loss = measures.main_loss.item<double>();
    bar->update(progress.tokens, concat("loss ", std::round(loss * 1e4) / 1e4));
    if (progress.step % config.log_every_steps != 0) return;
    metrics->add(progress.step, "loss/main", loss);
    const auto add = [&](const char* name, const at::Tensor& value) {
      if (value.defined()) metrics->add(progress.step, name, value.item<double>());
    };
    add("loss/mtp", measures.mtp_loss);
    add("loss/balance", measures.balance_loss);
    add("loss/index", measures.index_loss);
    metrics->add(progress.step, "grad_norm", norm);
    metrics->add(progress.step, "learning_rate", rate);
    metrics->add(progress.step, "batch_tokens", static_cast<double>(step_tokens));
    metrics->add(progress.step, "tokens_per_second", static_cast<double>(step_tokens) / seconds);
    metrics->add(progress.step, "stage", static_cast<double>(progress.stage));
    if (!moved) metrics->add(progress.step, "skipped", 1.0);
    if (measures.clamped.defined()) {
      const at::Tensor share = measures.clamped.to(at::kDouble).cpu();
      const double values = share[3].item<double>();
      metrics->add(progress.step, "clamped/gate_high", share[0].item<double>() / values);
      metrics->add(progress.step, "clamped/up_high", share[1].item<double>() / values);
      metrics->add(progress.step, "clamped/up_low", share[2].item<double>() / values);
    }
    double worst = 0.0;
    for (const at::Tensor& load : measures.expert_load) {
      if (!load.defined()) continue;
      const at::Tensor counts = load.to(at::kDouble);
      worst = std::max(worst, (counts.max() / counts.mean()).item<double>());
    }
    if (worst > 0.0) metrics->add(progress.step, "expert_load_max_over_mean", worst);
    metrics->flush(progress.step, progress.tokens);
  }

  void validate(const char* name, const Stage& rules) {
    // A stage may end where a validation was due anyway.
    if (validation.rows == 0 || last_validation == std::pair(progress.tokens, &rules)) return;
    last_validation = {progress.tokens, &rules};
    Evaluation result;
    const int64_t micro_rows =
        std::max<int64_t>(1, config.micro_batch_tokens / validation.row_length);
    const auto length = static_cast<size_t>(validation.row_length);
    size_t sample = 0;
    for (int64_t row = 0; row < validation.rows; row += micro_rows) {
      const int64_t count = std::min(micro_rows, validation.rows - row);
      const auto begin = static_cast<int64_t>(length) * row;
      PackedRows part{.rows = count,
                      .row_length = validation.row_length,
                      .tokens = {},
                      .scored = {},
                      .sample_lengths = {}};
      const int64_t end = begin + static_cast<int64_t>(length) * count;
      part.tokens.assign(validation.tokens.begin() + begin, validation.tokens.begin() + end);
      part.scored.assign(validation.scored.begin() + begin, validation.scored.begin() + end);
      for (int64_t filled = 0; filled < end - begin; ++sample) {
        part.sample_lengths.push_back(validation.sample_lengths[sample]);
        filled += validation.sample_lengths[sample];
      }
      evaluate(model, MicroBatch(part, device), rules.mode, rules.numerics, result);
    }
    metrics->add(progress.step, concat(name, "/loss"), result.loss());
    std::string mass;
    if (result.mass_queries > 0) {
      metrics->add(progress.step, concat(name, "/selected_mass"), result.selected_mass());
      metrics->add(progress.step, concat(name, "/best_mass"), result.best_mass());
      mass = concat(", selected mass ", result.selected_mass(), " of at best ", result.best_mass());
    }
    metrics->flush(progress.step, progress.tokens);
    log::info("train", name, " after ", progress.tokens, " tokens (attention ",
              attention_mode_name(rules.mode), ", ", ops::numerics_name(rules.numerics), "): loss ",
              result.loss(), mass);
  }

  bool save_is_due() const {
    const CheckpointSpec& spec = config.checkpoint;
    return (spec.every_steps > 0 && progress.step % spec.every_steps == 0) ||
           (spec.every_seconds > 0.0 && seconds_since(last_save) >= spec.every_seconds);
  }

  void save() {
    save_state(config.out, progress, config.checkpoint.keep, model, *optimizer);
    last_save = Clock::now();
  }

  RunConfig config;
  model::ModelConfig model_config;
  at::Device device;
  FileLock lock;
  std::vector<data::TokenShards> sources;
  RowPlan plan;
  model::Transformer model;
  std::unique_ptr<Optimizer> optimizer;
  PackedRows validation;
  RunProgress progress;
  std::unique_ptr<MetricsWriter> metrics;
  std::unique_ptr<Progress> bar;
  Clock::time_point last_save;
  int64_t skipped_in_a_row = 0;
  std::pair<int64_t, const Stage*> last_validation{-1, nullptr};
};

Trainer::Trainer(RunConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}
Trainer::~Trainer() = default;
const RunProgress& Trainer::progress() const { return impl_->progress; }
int64_t Trainer::total_tokens() const { return impl_->plan.total_tokens(); }
const model::Transformer& Trainer::model() const { return impl_->model; }
RunOutcome Trainer::run(const std::function<bool()>& stop) { return impl_->run(stop); }

}  // namespace hadal::train
