// hadal plot: curves out of a run's metrics.jsonl, as SVG.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <set>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "apps/command.h"
#include "apps/flags.h"
#include "base/check.h"
#include "base/file.h"
#include "base/join.h"
#include "base/svg_chart.h"
#include "data/text_source.h"

namespace hadal::apps {
namespace {

struct PlotFlags {
  std::string file, out, x = "tokens", title;
  std::vector<std::string> keys;
  int64_t smooth = 1;
};

using Points = std::vector<std::pair<double, double>>;

struct Metrics {
  std::map<std::string, Points> series;
  std::vector<ChartMark> stages;  ///< where a stage begins, the first left out
};

Metrics read_metrics(const std::string& path, const std::string& x_key) {
  Metrics metrics;
  double last_stage = -1.0;
  data::for_each_line(path, [&](const std::string& line, int64_t number) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    HADAL_INPUT_CHECK(json.is_object(), path, ": line ", number, " is no JSON object");
    const auto x = json.find(x_key);
    HADAL_INPUT_CHECK(x != json.end() && x->is_number(), path, ": line ", number,
                      ": expected a number \"", x_key, "\"");
    for (const auto& [name, value] : json.items()) {
      if (value.is_number()) metrics.series[name].emplace_back(*x, value.get<double>());
    }
    const auto stage = json.find("stage");
    if (stage == json.end() || !stage->is_number()) return;
    if (last_stage >= 0.0 && *stage != last_stage)
      metrics.stages.push_back({x->get<double>(), concat("stage ", stage->get<double>())});
    last_stage = stage->get<double>();
  });
  for (const char* name : {"step", "tokens", "time"}) metrics.series.erase(name);
  HADAL_INPUT_CHECK(!metrics.series.empty(), path, ": holds no metrics");
  for (auto& [name, points] : metrics.series)
    std::stable_sort(points.begin(), points.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
  return metrics;
}

/// Means over up to `width` points around each.
Points smoothed(const Points& points, int64_t width) {
  const auto count = static_cast<int64_t>(points.size());
  std::vector<double> sums = {0.0};
  for (const auto& [x, y] : points) sums.push_back(sums.back() + y);
  Points result;
  for (int64_t i = 0; i < count; ++i) {
    // As many on either side, so that the ends do not lag behind.
    const int64_t half = std::min({(width - 1) / 2, i, count - 1 - i});
    const double sum =
        sums[static_cast<size_t>(i + half + 1)] - sums[static_cast<size_t>(i - half)];
    result.emplace_back(points[static_cast<size_t>(i)].first,
                        sum / static_cast<double>(2 * half + 1));
  }
  return result;
}

std::vector<std::string> chosen_keys(const PlotFlags& flags, const Metrics& metrics) {
  std::vector<std::string> present;
  for (const auto& [name, points] : metrics.series) present.push_back(name);
  std::vector<std::string> keys;
  for (const std::string& key : flags.keys) {
    HADAL_INPUT_CHECK(metrics.series.contains(key), flags.file, ": has no \"", key, "\"; it has ",
                      join(present));
    keys.push_back(key);
  }
  if (!keys.empty()) return keys;
  for (const char* key : {"loss/main", "validation/loss"})
    if (metrics.series.contains(key)) keys.emplace_back(key);
  HADAL_INPUT_CHECK(!keys.empty(), flags.file,
                    ": has neither loss/main nor validation/loss; choose --keys from ",
                    join(present));
  return keys;
}

/// What a metric is measured in; metrics of one unit share an axis.
std::string unit_of(const std::string& key) {
  if (key.find("loss") != std::string::npos) return "loss (nats per token)";
  if (key.find("_mass") != std::string::npos || key.starts_with("clamped/")) return "share";
  if (key == "tokens_per_second") return "tokens per second";
  if (key == "batch_tokens") return "tokens a step";
  return key;
}

/// One panel: metrics of one unit.
Chart panel_of(const PlotFlags& flags,
               const Metrics& metrics,
               const std::vector<std::string>& keys) {
  Chart chart;
  chart.title = join(keys);
  chart.x_label = flags.x;
  chart.y_label = keys.size() == 1 ? keys[0] : unit_of(keys[0]);
  chart.marks = metrics.stages;
  for (const std::string& key : keys) {
    const Points& points = metrics.series.at(key);
    // Rare points (validation) say more than their means would.
    const bool smooth = flags.smooth > 1 && static_cast<int64_t>(points.size()) > 2 * flags.smooth;
    if (smooth) chart.series.push_back({.label = key, .points = points, .faint = true});
    chart.series.push_back(
        {.label = key, .points = smooth ? smoothed(points, flags.smooth) : points, .faint = false});
  }
  return chart;
}

int run(const PlotFlags& flags) {
  const Metrics metrics = read_metrics(flags.file, flags.x);
  const std::vector<std::string> keys = chosen_keys(flags, metrics);
  std::vector<std::vector<std::string>> panels;
  for (const std::string& key : keys) {
    const auto same = std::find_if(panels.begin(), panels.end(), [&](const auto& panel) {
      return unit_of(panel.front()) == unit_of(key);
    });
    if (same != panels.end()) {
      same->push_back(key);
    } else {
      panels.push_back({key});
    }
  }
  std::vector<Chart> charts;
  for (const auto& panel : panels) charts.push_back(panel_of(flags, metrics, panel));
  if (!flags.title.empty()) charts.front().title = flags.title;
  if (charts.size() > 1)
    for (Chart& chart : charts) chart.height = 300;
  write_file_atomic(flags.out, draw_svg(charts, ChartOrder::kBelow));
  std::printf("%s: %s\n", flags.out.c_str(), join(keys).c_str());
  return 0;
}

}  // namespace

std::function<int()> define_plot(CLI::App& app) {
  auto flags = std::make_shared<PlotFlags>();
  app.add_option("METRICS", flags->file, "a run's metrics.jsonl")->required();
  app.add_option("--out", flags->out, "SVG file to write")->required();
  app.add_option("--keys", flags->keys,
                 "what to draw, separated by commas, a panel for each unit; default: "
                 "loss/main,validation/loss")
      ->delimiter(',');
  app.add_option("--smooth", flags->smooth, "means over this many points, in front of the points")
      ->check(above(0));
  app.add_option("--x", flags->x, "tokens or step")
      ->check(CLI::IsMember({"tokens", "step"}))
      ->capture_default_str();
  app.add_option("--title", flags->title, "above the plot");
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
