#include "apps/train_plan.h"

#include <cstdio>
#include <filesystem>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/join.h"
#include "base/json.h"
#include "base/log.h"
#include "model/presets.h"
#include "train/run_config.h"
#include "train/train_plan.h"

namespace hadal::apps {
namespace {

using train::PlannedParameter;
using train::Pool;
using train::TrainPlan;
using train::TrainPlanParams;

/// A model and what a step of it takes in.
struct Subject {
  model::ModelConfig config;
  TrainPlanParams params;
};

/// Steps of a model without a run: the released models' own batches are of this order.
constexpr int64_t kStepTokens = int64_t{1} << 26, kRowLength = 4096;

Subject subject_of(const std::string& run) {
  const bool flash = run == "v4-flash";
  if (flash || run == "v4-pro") {
    return {.config = flash ? model::deepseek_v4_flash() : model::deepseek_v4_pro(),
            .params = {.step_tokens = kStepTokens, .row_length = kRowLength}};
  }
  HADAL_INPUT_CHECK(std::filesystem::is_regular_file(run), run,
                    ": expected a run's file, a config.json, v4-flash or v4-pro");
  if (!JsonObject::load(run).has("stages"))
    return {.config = model::load_config(run),
            .params = {.step_tokens = kStepTokens, .row_length = kRowLength}};
  const train::RunConfig config = train::load_run_config(run);
  if (config.mesh.pipeline > 1)
    log::warn("train", run, ": mesh.pipeline: the plan takes every rank to have all layers");
  const train::Stage& last = config.stages.back();
  return {.config = model::load_config(config.model),
          .params = {.step_tokens = config.schedule.batch.back().tokens,
                     .row_length = last.row_length,
                     .numerics = last.numerics,
                     .copied_checkpoints = config.checkpoint.asynchronous}};
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return shape.empty() ? "" : concat("[", join(shape, ", "), "]");
}

std::string owners_text(const PlannedParameter& parameter) {
  if (parameter.pieces == 0) return "all";
  if (parameter.first_owner == parameter.last_owner) return concat(parameter.first_owner);
  return concat(parameter.first_owner, "-", parameter.last_owner);
}

/// "12.3 GB", in steps of a thousand.
std::string bytes_text(double bytes) {
  constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB", "PB"};
  size_t unit = 0;
  for (; bytes >= 999.95 && unit + 1 < std::size(kUnits); ++unit) bytes /= 1e3;
  char text[32];
  std::snprintf(text, sizeof(text), unit == 0 ? "%.0f %s" : "%.1f %s", bytes, kUnits[unit]);
  return text;
}

void print_parameters(const TrainPlan& plan) {
  std::printf("%-44s %-12s %-20s %10s  %-15s %s\n", "parameter", "rule", "shape", "units", "of",
              "owner");
  for (const PlannedParameter& p : plan.parameters) {
    std::printf("%-44s %-12s %-20s %10lld  %-15s %s\n", p.name.c_str(), rule_name(p.rule),
                shape_text(p.shape).c_str(), static_cast<long long>(p.units),
                shape_text(p.unit_shape).c_str(), owners_text(p).c_str());
  }
}

void print_shares(const TrainPlan& plan) {
  const train::ZeroPlan& zero = plan.zero;
  std::printf("\nranks %lld, rows a step %lld, on a rank at most %lld\n",
              static_cast<long long>(zero.ranks), static_cast<long long>(plan.rows),
              static_cast<long long>(plan.rows_of_rank));
  std::printf(
      "dense matrices: at most %lld ranks share them: %lld group%s; on a rank %.2f on "
      "average, %lld at most; padding %.2f %%\n",
      static_cast<long long>(zero.cap), static_cast<long long>(zero.groups),
      zero.groups == 1 ? "" : "s", zero.mean_dense_matrices(),
      static_cast<long long>(zero.most_dense_matrices()), 100 * zero.padding(Pool::kDense));
  std::printf("experts: padding %.2f %%; AdamW: padding %.2f %%\n",
              100 * zero.padding(Pool::kExperts), 100 * zero.padding(Pool::kElements));
}

/// What both forms print of the step: name, value, and whether it is bytes.
struct Figure {
  const char* name;
  const char* text;
  double value;
};

std::vector<Figure> memory_figures(const TrainPlan& plan) {
  const train::RankMemory& m = plan.fullest;
  return {{"weights", "weights that passes read", m.weights},
          {"masters", "FP32 masters of its own", m.masters},
          {"moments", "moments of its own", m.moments},
          {"gradients", "gradients of its rows, sums of its own", m.gradients},
          {"activations", "streams between blocks, one row", m.activations},
          {"checkpoint", "copy of its own for a checkpoint", m.checkpoint},
          {"total", "in all, without other activations", m.total()}};
}

std::vector<Figure> traffic_figures(const TrainPlan& plan) {
  return {{"gradients_sent", "gradients sent", plan.gradients_sent},
          {"gradients_received", "gradients received", plan.gradients_received},
          {"values_received", "values received", plan.values_received}};
}

std::vector<Figure> time_figures(const TrainPlan& plan) {
  return {{"passes", "forward and backward", plan.pass_seconds},
          {"exchange", "gradients to owners", plan.exchange_seconds},
          {"optimizer", "Newton-Schulz", plan.optimizer_seconds},
          {"spread", "values from owners", plan.spread_seconds},
          {"step", "a step, one after the other", plan.step_seconds()}};
}

void print_table(const TrainPlan& plan, const TrainPlanFlags& flags) {
  print_parameters(plan);
  print_shares(plan);
  std::printf("\nmemory of the fullest rank\n");
  for (const Figure& figure : memory_figures(plan))
    std::printf("  %-40s %12s\n", figure.text, bytes_text(figure.value).c_str());
  std::printf("\ntraffic of a step, the busiest rank\n");
  for (const Figure& figure : traffic_figures(plan))
    std::printf("  %-40s %12s\n", figure.text, bytes_text(figure.value).c_str());
  std::printf("\ntime at %g TFLOP/s and %g GB/s a rank\n", flags.teraflops, flags.link_gigabytes);
  for (const Figure& figure : time_figures(plan))
    std::printf("  %-40s %10.4g s\n", figure.text, figure.value);
}

void add_figures(JsonWriter& out, const char* key, const std::vector<Figure>& figures) {
  out.key(key).begin_object();
  for (const Figure& figure : figures) out.field(figure.name, figure.value);
  out.end_object();
}

void print_json(const TrainPlan& plan) {
  const train::ZeroPlan& zero = plan.zero;
  JsonWriter out;
  out.begin_object().key("parameters").begin_array();
  for (const PlannedParameter& p : plan.parameters) {
    out.begin_object()
        .field("name", std::string_view(p.name))
        .field("rule", rule_name(p.rule))
        .field("shape", p.shape)
        .field("units", p.units)
        .field("unit_shape", p.unit_shape)
        .field("pieces", p.pieces)
        .field("first_owner", p.first_owner)
        .field("last_owner", p.last_owner)
        .end_object();
  }
  out.end_array().field("ranks", zero.ranks).field("rows", plan.rows);
  out.field("rows_of_rank", plan.rows_of_rank).field("dense_cap", zero.cap);
  out.field("dense_groups", zero.groups).field("dense_matrices_mean", zero.mean_dense_matrices());
  out.field("dense_matrices_most", zero.most_dense_matrices());
  out.field("padding_dense", zero.padding(Pool::kDense));
  out.field("padding_experts", zero.padding(Pool::kExperts));
  out.field("padding_adamw", zero.padding(Pool::kElements));
  add_figures(out, "memory_bytes", memory_figures(plan));
  add_figures(out, "traffic_bytes", traffic_figures(plan));
  add_figures(out, "seconds", time_figures(plan));
  out.end_object();
  std::fputs(out.str().c_str(), stdout);
}

}  // namespace

int print_train_plan(const std::string& run, int64_t ranks, const TrainPlanFlags& flags) {
  Subject subject = subject_of(run);
  subject.config.drafter = {};  // a run trains none
  TrainPlanParams& params = subject.params;
  params.ranks = ranks;
  params.cap = flags.dense_ranks;
  if (flags.step_tokens > 0) params.step_tokens = flags.step_tokens;
  if (flags.row_length > 0) params.row_length = flags.row_length;
  params.flops_per_second = flags.teraflops * 1e12;
  params.bytes_per_second = flags.link_gigabytes * 1e9;
  const TrainPlan plan = train::make_train_plan(subject.config, params);
  flags.json ? print_json(plan) : print_table(plan, flags);
  return 0;
}

}  // namespace hadal::apps
