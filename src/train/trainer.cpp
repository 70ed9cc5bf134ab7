#include "train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <optional>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "base/check.h"
#include "base/file.h"
#include "base/join.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/progress.h"
#include "checkpoint/save_model.h"
#include "model/init.h"
#include "ops/tensor_memory.h"
#include "train/export_run.h"
#include "train/pipeline.h"
#include "train/report.h"
#include "train/row_plan.h"
#include "train/run_setup.h"
#include "train/state_copy.h"
#include "train/state_saver.h"
#include "train/step.h"
#include "train/validation.h"

namespace hadal::train {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

struct Trainer::Impl {
  Impl(RunConfig run, dist::Ranks& all)
      : config(std::move(run)),
        ranks(after_the_first(all)),
        // What can be wrong with the configuration is found before anything is written.
        model_config(checked_model_config(config)),
        mesh(checked_mesh(config, model_config, ranks)),
        place(mesh.place(ranks.rank())),
        device(training_device(config, ranks)),
        lock(ranks.first() ? std::make_unique<FileLock>(prepare_folder(config)) : nullptr),
        sources(open_sources(config)),
        plan(config, sources, begun_parts(config, ranks)),
        model(build_model(config, model_config, sources, place.pipeline)),
        saver({.out = config.out,
               .keep = config.checkpoint.keep,
               .beside = config.checkpoint.asynchronous},
              ranks) {
    // Reductions inside LibTorch depend on its thread count; our own kernels do not.
    if (device.is_cpu()) at::set_num_threads(1);
    model::move_to(model, device);
    model::require_gradients(model);
    const model::StageSplit split = stage_split(config, model.config());
    if (split.size() > 1) {
      pipeline = std::make_unique<Pipeline>(
          dist::Group(ranks, mesh.pipeline_group(ranks.rank()), dist::Axis::kPipeline), split);
    }
    optimizer = std::make_unique<Optimizer>(model, config.optimizer,
                                            Ownership(model, mesh, ranks.rank(), split));
    if (mesh.shape().context > 1) {
      shared = std::make_unique<SharedRows>(
          dist::Group(ranks, mesh.context_group(ranks.rank()), dist::Axis::kContext),
          collected_pieces(optimizer->ownership()));
    }
    let_the_others_follow(ranks);
    check_that_ranks_agree(config, newest_state(config.out), ranks);
    if (!config.validation.source.empty()) {
      const auto index = static_cast<size_t>(config.source_index(config.validation.source));
      validation =
          validation_rows(sources[index], config.sources[index].kind == data::SourceKind::kText,
                          config.validation.rows, config.validation.row_length);
    }
    if (ranks.first()) remove_leftovers(config.out);
    restore();
    if (!ranks.first()) return;
    metrics = std::make_unique<MetricsWriter>(config.out, progress.step);
    bar = std::make_unique<Progress>("train", plan.total_tokens(), "tokens");
    report_ranks(optimizer->ownership(), split, ranks);
    report_copy();
  }

  /// What a checkpoint costs beside the memory of a step.
  void report_copy() {
    if (!config.checkpoint.asynchronous) return;
    const int64_t bytes = state_bytes(named_state(model, *optimizer));
    log::info("train", "checkpoints are written beside the steps, from a copy of ",
              std::round(static_cast<double>(bytes) / 1e4) / 1e2, " MB");
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

  /// Of the newest whole checkpoint, which the first rank finds before the others look.
  static StageParts begun_parts(const RunConfig& config, const dist::Ranks& ranks) {
    const std::string folder =
        ranks.first() ? newest_whole_state(config.out, true) : newest_state(config.out);
    return folder.empty() ? StageParts() : load_parts(folder);
  }

  void restore() {
    const std::string folder = newest_state(config.out);
    if (folder.empty()) return;
    progress = load_state(folder, model, *optimizer);
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
      if (ranks.any(stop())) {
        save();
        saver.finish();
        return RunOutcome::kStopped;
      }
      step();
      // What a step reports comes before its checkpoint: a run that goes on from there has all of
      // it, and one that goes on from an earlier checkpoint reports all of it again.
      if (progress.row == plan.num_rows(static_cast<size_t>(progress.stage))) end_stage();
      save_is_due() ? save() : saver.poll();
    }
    save();
    saver.finish();
    if (ranks.first()) {
      bar->finish();
      export_model();
    }
    ranks.barrier("the end of the run");
    return RunOutcome::kFinished;
  }

  /// A run that was finished and got further stages since: its model is no longer the last word.
  void set_earlier_model_aside() {
    if (!ranks.first()) return;
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
    // Of several ranks none has all masters: they are in the checkpoint that was just written.
    std::optional<model::Transformer> masters;
    if (ranks.size() > 1) masters = open_masters(newest_state(config.out), model.config());
    checkpoint::save_model(
        masters ? *masters : model, folder,
        {.format = quantised ? checkpoint::SaveFormat::kOfficial : checkpoint::SaveFormat::kBf16,
         .experts = exported_experts(config, model.config(), &progress),
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
    optimizer->hold_for(stage().numerics, ranks);
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

  ObjectiveParams objective(bool count_clamps) const {
    ObjectiveParams params;
    params.mtp_weight = config.schedule.mtp_weight_at(progress.tokens);
    params.balance_weight = config.balance_weight;
    params.index_weight = config.index_weight;
    params.mode = stage().mode;
    params.numerics = stage().numerics;
    params.count_clamps = count_clamps;
    recompute.apply(params);
    return params;
  }

  /// What a step of this process's share of `rows` rows of the stage holds beside a pass.
  StepMemory step_memory(int64_t rows) const {
    const Span share = row_share(rows, mesh.data(), place.data);
    StepMemory memory{.before = bytes_between_steps,
                      .rows = (share.end - share.begin) * stage_row_bytes,
                      .gradients = 0,
                      .sets = waiting_sets(share.begin, share.end),
                      .update = update_bytes(model)};
    model.visit([&](const model::Parameter& parameter) {
      if (!parameter.elsewhere && is_trained(parameter, objective(false)))
        memory.gradients += static_cast<int64_t>(parameter.value.nbytes());
    });
    return memory;
  }
  /// The layers of a pass of this process, and how many of `rows` rows are under way at a time.
  PassPlace pass_place(int64_t rows) const {
    if (!pipeline) return {.layers = model::all_layers(model.config()), .under_way = 1};
    const int64_t ahead = pipeline->stages() - pipeline->stage();
    const int64_t own = row_share(rows, mesh.data(), place.data).size();
    return {.layers = pipeline->layers(), .under_way = std::clamp<int64_t>(own, 1, ahead)};
  }
  int64_t rows_of(int64_t tokens) const {
    return std::max<int64_t>(1, tokens / stage().row_length);
  }

  /// Once a stage: what its passes recompute, and what its largest step is to hold.
  void plan_memory() {
    if (config.recompute.policy == RecomputePolicy::kUnset || planned_stage == progress.stage)
      return;
    planned_stage = progress.stage;
    recompute = {};
    const auto index = static_cast<size_t>(progress.stage);
    int64_t rows = 1;
    for (const BatchRamp& ramp : config.schedule.batch) rows = std::max(rows, rows_of(ramp.tokens));
    rows = std::min(rows, plan.num_rows(index));
    optimizer->zero_grad();  // the last step's, which the next one drops
    bytes_between_steps = ops::tensor_bytes();
    const MicroBatch row(plan.rows(index, progress.row, 1), device);
    stage_row_bytes = ops::tensor_bytes() - bytes_between_steps;
    recompute = plan_recompute(model, pass_place(rows), row, objective(true), config.recompute,
                               step_memory(rows), concat(config.path, ": recompute.budget_bytes"));
    log::info("train", "stage ", stage().name, ": ", describe(recompute, step_memory(rows)));
    ops::reset_tensor_peak();
    measured = false;
  }

  /// After a stage's first step: what it held, beside what it was to hold.
  void compare_memory(int64_t rows) {
    if (config.recompute.policy == RecomputePolicy::kUnset || std::exchange(measured, true)) return;
    const auto mib = [](int64_t bytes) {
      return concat(std::round(static_cast<double>(bytes) / 0x1p20 * 10.0) / 10.0, " MiB");
    };
    log::info("train", "stage ", stage().name, ": tensors of the first step held ",
              mib(ops::tensor_peak_bytes()), ", predicted ",
              mib(step_memory(rows).peak(recompute.pass_bytes)));
  }

  void step() {
    const Clock::time_point start = Clock::now();
    const auto index = static_cast<size_t>(progress.stage);
    const int64_t row_length = stage().row_length;
    const int64_t wanted =
        std::max<int64_t>(1, config.schedule.batch_tokens(progress.tokens) / row_length);
    const int64_t rows = std::min(wanted, plan.num_rows(index) - progress.row);
    const int64_t micro_rows = std::max<int64_t>(1, config.micro_batch_tokens / row_length);
    const StepShare share{.rows = row_share(rows, mesh.data(), place.data), .total = rows};
    plan_memory();
    ranks.enter(concat("step ", progress.step + 1));

    std::vector<MicroBatch> batches;
    for (int64_t row = share.rows.begin; row < share.rows.end; row += micro_rows) {
      const int64_t count = std::min(micro_rows, share.rows.end - row);
      batches.emplace_back(plan.rows(index, progress.row + row, count), device);
    }
    const bool count_clamps =
        config.count_clamps_every_steps > 0 && progress.step % config.count_clamps_every_steps == 0;
    const int64_t step_tokens = rows * row_length;
    const StepRules rules{
        .objective = objective(count_clamps),
        .learning_rate = stage().learning_rate > 0.0
                             ? stage().learning_rate
                             : config.schedule.learning_rate.at(progress.tokens, step_tokens),
        .clip_norm = config.clip_norm,
        .router_bias_speed = config.router_bias_speed};
    const StepOutcome outcome = training_step(model, *optimizer, batches, rules, share, ranks,
                                              pipeline.get(), shared.get());
    compare_memory(rows);
    if (outcome.moved) {
      skipped_in_a_row = 0;
    } else {
      leave_out(outcome);
    }

    progress.row += rows;
    progress.tokens += step_tokens;
    ++progress.step;
    if (ranks.first()) {
      bar->update(progress.tokens, concat("loss ", std::round(outcome.loss() * 1e4) / 1e4));
      if (progress.step % config.log_every_steps == 0) {
        report_step(*metrics, progress, outcome, rules.learning_rate, step_tokens,
                    seconds_since(start));
      }
    }
    const int64_t every = config.validation.every_tokens;
    if (every > 0 && progress.tokens / every != (progress.tokens - step_tokens) / every) {
      validate("validation", stage());
    }
  }

  /// A step without finite gradients; ten in a row end the run.
  void leave_out(const StepOutcome& outcome) {
    ++progress.skipped_steps;
    ++skipped_in_a_row;
    if (ranks.first()) {
      const std::string where =
          outcome.not_finite.empty() ? "" : concat(" (", join(outcome.not_finite), ")");
      log::warn("train", "step ", progress.step, ": the gradient norm is ", outcome.norm, where,
                "; the update is left out");
    }
    HADAL_INPUT_CHECK(skipped_in_a_row < 10, config.path,
                      ": ten steps in a row without finite gradients; the newest checkpoint is "
                      "from before them");
  }

  void validate(const char* name, const Stage& rules) {
    // A stage may end where a validation was due anyway.
    if (validation.rows == 0 || last_validation == std::pair(progress.tokens, &rules)) return;
    last_validation = {progress.tokens, &rules};
    const int64_t micro_rows =
        std::max<int64_t>(1, config.micro_batch_tokens / validation.row_length);
    ranks.enter(name);
    const Evaluation result =
        evaluate_rows(model, validation, micro_rows, rules, device, ranks, mesh, pipeline.get());
    if (ranks.first()) report_validation(*metrics, progress, name, rules, result);
  }

  bool save_is_due() const {
    const CheckpointSpec& spec = config.checkpoint;
    if (spec.every_steps > 0 && progress.step % spec.every_steps == 0) return true;
    // Clocks differ: the first rank's counts.
    return spec.every_seconds > 0.0 && !saver.under_way() &&
           ranks.any(ranks.first() && seconds_since(last_save) >= spec.every_seconds);
  }

  void save() {
    saver.begin(progress, model, *optimizer);
    last_save = Clock::now();
  }

  RunConfig config;
  dist::Ranks& ranks;
  model::ModelConfig model_config;
  dist::Mesh mesh;
  dist::MeshPlace place;
  at::Device device;
  std::unique_ptr<FileLock> lock;  ///< the first rank's
  std::vector<data::TokenShards> sources;
  RowPlan plan;
  model::Transformer model;
  std::unique_ptr<Pipeline> pipeline;  ///< null: this rank has all layers
  std::unique_ptr<SharedRows> shared;  ///< null: this rank passes whole rows
  std::unique_ptr<Optimizer> optimizer;
  StateSaver saver;
  PackedRows validation;
  RunProgress progress;
  std::unique_ptr<MetricsWriter> metrics;  ///< the first rank's, like the bar
  std::unique_ptr<Progress> bar;
  RecomputePlan recompute;  ///< of the stage
  int64_t planned_stage = -1, bytes_between_steps = 0, stage_row_bytes = 0;
  bool measured = true;  ///< the stage's first step, where there is a plan
  Clock::time_point last_save;
  int64_t skipped_in_a_row = 0;
  std::pair<int64_t, const Stage*> last_validation{-1, nullptr};
};

Trainer::Trainer(RunConfig config, dist::Ranks& ranks) {
  if (config.recompute.policy != RecomputePolicy::kUnset) {
    HADAL_INPUT_CHECK(pick_device(config.device).is_cpu(), config.path,
                      ": recompute: what a pass holds is counted on the CPU: expected device "
                      "\"cpu\", found \"",
                      config.device, "\"");
    ops::count_tensor_memory();
  }
  impl_ = std::make_unique<Impl>(std::move(config), ranks);
}
Trainer::~Trainer() = default;
const RunProgress& Trainer::progress() const { return impl_->progress; }
int64_t Trainer::total_tokens() const { return impl_->plan.total_tokens(); }
const model::Transformer& Trainer::model() const { return impl_->model; }
RunOutcome Trainer::run(const std::function<bool()>& stop) { return impl_->run(stop); }

}  // namespace hadal::train
