// hadal plan: what one decoded token costs at a context length, against V3.2 (model.md section 8).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <sstream>
#include <vector>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "model/cost.h"

namespace hadal::apps {
namespace {

using model::Cost;

struct Options {
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

/// One panel: two curves over the context (logarithmic, 4K to 1M), linear from zero upwards.
class Panel {
 public:
  Panel(std::ostringstream& out, double left, const char* title, double top)
      : out_(out), left_(left), top_(nice(top)) {
    out_ << "<text x='" << left_ << "' y='34' font-weight='600'>" << title << "</text>\n";
    for (int line = 0; line <= 4; ++line) {
      const double value = top_ * line / 4;
      out_ << "<path d='M" << left_ << " " << y(value) << "h" << kWidth << "' stroke='#ddd'/>"
           << "<text x='" << left_ - 8 << "' y='" << y(value) + 4
           << "' text-anchor='end' fill='#555'>" << value << "</text>\n";
    }
    for (int power = 12; power <= 20; power += 2)
      out_ << "<text x='" << x(std::exp2(power)) << "' y='" << kBottom + 20
           << "' text-anchor='middle' fill='#555'>"
           << (power == 20 ? "1M" : std::to_string((1 << power) / 1024) + "K") << "</text>\n";
  }
  template <typename Value>
  void curve(const char* colour, const char* label, double label_y, Value value) {
    out_ << "<path fill='none' stroke-width='2.5' stroke='" << colour << "' d='";
    for (int step = 0; step <= 64; ++step) {
      const double tokens = std::exp2(12 + step / 8.0);
      out_ << (step == 0 ? "M" : "L") << x(tokens) << " " << y(value(tokens));
    }
    out_ << "'/><text x='" << left_ + 12 << "' y='" << label_y << "' fill='" << colour << "'>"
         << label << "</text>\n";
  }

 private:
  static constexpr double kWidth = 330, kTop = 56, kBottom = 320;
  static double nice(double top) {
    const double unit = std::pow(10, std::floor(std::log10(std::max(top, 1e-3))));
    for (const double factor : {1.0, 2.0, 4.0, 6.0, 8.0})
      if (top <= factor * unit) return factor * unit;
    return 10 * unit;
  }
  double x(double tokens) const { return left_ + kWidth * (std::log2(tokens) - 12) / 8; }
  double y(double value) const { return kBottom - (kBottom - kTop) * value / top_; }

  std::ostringstream& out_;
  double left_, top_;
};

std::string draw(const model::ModelConfig& config) {
  const auto at = [&](double tokens, bool ours) {
    const auto count = static_cast<int64_t>(tokens);
    return ours ? model::decode_cost(config, count) : model::decode_cost_v3_2(count);
  };
  const auto flops = [&](bool ours) {
    return [&at, ours](double tokens) { return at(tokens, ours).equivalent_flops() / 1e9; };
  };
  const auto kv = [&](bool ours) {
    return
        [&at, ours](double tokens) { return at(tokens, ours).kv_bytes_per_token * tokens / 1e9; };
  };
  constexpr double kEnd = 1048576;
  std::ostringstream out;
  out << "<svg xmlns='http://www.w3.org/2000/svg' width='880' height='360' "
         "font-family='sans-serif' font-size='13'><rect width='880' height='360' fill='#fff'/>\n";
  Panel left(out, 70, "GFLOP per token (FP8 equivalents) by context",
             std::max(flops(false)(kEnd), flops(true)(kEnd)));
  left.curve("#b33", "V3.2", 76, flops(false));
  left.curve("#26a", "this model", 96, flops(true));
  Panel right(out, 510, "KV cache, GB by context", std::max(kv(false)(kEnd), kv(true)(kEnd)));
  right.curve("#b33", "V3.2", 76, kv(false));
  right.curve("#26a", "this model", 96, kv(true));
  out << "</svg>\n";
  return out.str();
}

int run(const Options& options) {
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
  auto options = std::make_shared<Options>();  // outlives define(), shared with the parser
  app.add_option("--config", options->config, "a config.json")->required();
  app.add_option("--context", options->context, "tokens of context")->capture_default_str();
  app.add_option("--against", options->against, "the model to compare with")->capture_default_str();
  app.add_option("--svg", options->svg, "write both curves over 4K to 1M here");
  app.add_flag("--json", options->json, "print JSON");
  return [options] { return run(*options); };
}

}  // namespace hadal::apps
