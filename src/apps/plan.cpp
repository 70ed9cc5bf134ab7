// hadal plan: what one decoded token costs at a context length, against V3.2 (model.md 16).
#include <cmath>
#include <cstdio>
#include <memory>
#include <utility>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/flags.h"
#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "base/svg_chart.h"
#include "model/cost.h"

namespace hadal::apps {
namespace {

using model::Cost;

struct PlanFlags {
  std::string config, against = "v3.2", svg;
  int64_t context = 1000000;
  bool json = false;
};

void print_table(const Cost& ours, const Cost& old, int64_t context) {
  const auto tokens = static_cast<double>(context);
  std::printf("one decoded token at %lld tokens of context, GFLOP\n\n",
              static_cast<long long>(context));
  std::printf("  %-24s %-5s %12s %12s\n", "part", "as", "raw", "FP8 equiv.");
  for (const model::Work& work : ours.work)
    std::printf("  %-24s %-5s %12.3f %12.3f\n", work.part.c_str(),
                model::precision_name(work.precision), work.flops / 1e9,
                work.flops * model::equivalent_weight(work.precision) / 1e9);
  std::printf("  %-30s %12.3f %12.3f\n", "total", ours.raw_flops() / 1e9,
              ours.equivalent_flops() / 1e9);
  std::printf("  %-30s %12.3f %12.3f\n\n", "V3.2", old.raw_flops() / 1e9,
              old.equivalent_flops() / 1e9);
  std::printf("  KV cache        %10.2f bytes per token, %.3f GB  (V3.2: %.0f, %.3f GB)\n",
              ours.kv_bytes_per_token, ours.kv_bytes_per_token * tokens / 1e9,
              old.kv_bytes_per_token, old.kv_bytes_per_token * tokens / 1e9);
  std::printf("  windows         %10.3f MB per sequence\n", ours.window_bytes / 1e6);
  std::printf("  states          %10.3f MB per sequence\n\n", ours.state_bytes / 1e6);
  std::printf("%.2fx fewer FLOPs, ", old.equivalent_flops() / ours.equivalent_flops());
  if (ours.kv_bytes_per_token > 0)
    std::printf("%.2fx less KV than V3.2\n", old.kv_bytes_per_token / ours.kv_bytes_per_token);
  else
    std::printf("no KV that grows with the context\n");
}

void print_json(const Cost& ours, const Cost& old, int64_t context) {
  JsonWriter out;
  out.begin_object().field("context", context).key("work").begin_array();
  for (const model::Work& work : ours.work)
    out.begin_object()
        .field("part", std::string_view(work.part))
        .field("precision", model::precision_name(work.precision))
        .field("flops", work.flops)
        .end_object();
  out.end_array().field("equivalent_flops", ours.equivalent_flops());
  out.field("raw_flops", ours.raw_flops()).field("kv_bytes_per_token", ours.kv_bytes_per_token);
  out.field("window_bytes", ours.window_bytes).field("state_bytes", ours.state_bytes);
  out.field("v3_2_equivalent_flops", old.equivalent_flops());
  out.field("v3_2_kv_bytes_per_token", old.kv_bytes_per_token);
  out.field("flops_ratio", old.equivalent_flops() / ours.equivalent_flops());
  // Infinite, hence null, for a model whose cache does not grow.
  out.field("kv_ratio", old.kv_bytes_per_token / ours.kv_bytes_per_token).end_object();
  std::fputs(out.str().c_str(), stdout);
}

/// A value of both models over the contexts 4K to 1M.
template <typename Value>
Chart chart_of(const char* title, const char* y_label, Value value) {
  Chart chart;
  chart.title = title;
  chart.x_label = "tokens of context";
  chart.y_label = y_label;
  chart.x_scale = XScale::kLog2;
  chart.from_zero = true;
  chart.width = 520;
  chart.height = 380;
  for (const bool ours : {true, false}) {
    Series series{.label = ours ? "this model" : "V3.2", .points = {}};
    for (int step = 0; step <= 64; ++step) {
      const double tokens = std::exp2(12 + step / 8.0);
      series.points.emplace_back(tokens, value(tokens, ours));
    }
    chart.series.push_back(std::move(series));
  }
  return chart;
}

std::string draw(const model::ModelConfig& config) {
  const auto at = [&](double tokens, bool ours) {
    const auto count = static_cast<int64_t>(tokens);
    return ours ? model::decode_cost(config, count) : model::decode_cost_v3_2(count);
  };
  const Chart charts[] = {
      chart_of("Work of one decoded token", "GFLOP (FP8 equivalents)",
               [&](double tokens, bool ours) { return at(tokens, ours).equivalent_flops() / 1e9; }),
      chart_of("KV cache", "GB", [&](double tokens, bool ours) {
        return at(tokens, ours).kv_bytes_per_token * tokens / 1e9;
      })};
  return draw_svg(charts);
}

int run(const PlanFlags& options) {
  HADAL_INPUT_CHECK(options.against == "v3.2", "plan: --against knows only v3.2, found ",
                    options.against);
  const model::ModelConfig config = model::load_config(options.config);
  const Cost ours = model::decode_cost(config, options.context);
  const Cost old = model::decode_cost_v3_2(options.context);
  if (!options.svg.empty()) write_file_atomic(options.svg, draw(config));
  options.json ? print_json(ours, old, options.context) : print_table(ours, old, options.context);
  return 0;
}

}  // namespace

std::function<int()> define_plan(CLI::App& app) {
  auto options = std::make_shared<PlanFlags>();  // outlives define(), shared with the parser
  app.add_option("--config", options->config, "a config.json")->required();
  app.add_option("--context", options->context, "tokens of context")
      ->check(between(1, 1e12))
      ->capture_default_str();
  app.add_option("--against", options->against, "the model to compare with")->capture_default_str();
  app.add_option("--svg", options->svg, "write both curves over 4K to 1M here");
  app.add_flag("--json", options->json, "print JSON");
  return [options] { return run(*options); };
}

}  // namespace hadal::apps
