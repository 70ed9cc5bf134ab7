#include "load/report.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include <fmt/format.h>

#include "base/json.h"
#include "base/svg_chart.h"

namespace hadal::load {
namespace {

constexpr double kMilli = 1000;

void print_row(const char* name, const Percentiles& values) {
  if (values.empty()) return;
  std::fputs(fmt::format("  {:<24} {:>9} {:>10.2f} {:>10.2f} {:>10.2f} {:>10.2f}\n", name,
                         values.count(), kMilli * values.at(50), kMilli * values.at(90),
                         kMilli * values.at(99), kMilli * values.max())
                 .c_str(),
             stdout);
}

void write_row(JsonWriter& out, const char* name, const Percentiles& values) {
  out.key(name)
      .begin_object()
      .field("count", static_cast<int64_t>(values.count()))
      .field("mean", kMilli * values.mean())
      .field("p50", kMilli * values.at(50))
      .field("p90", kMilli * values.at(90))
      .field("p99", kMilli * values.at(99))
      .field("max", kMilli * values.max())
      .end_object();
}

Chart chart_of(const char* title, const char* of, const Percentiles& values) {
  Chart chart;
  chart.title = title;
  chart.x_label = fmt::format("% of {} within", of);
  chart.y_label = "milliseconds";
  chart.from_zero = true;
  chart.width = 520;
  chart.height = 380;
  Series series{.label = fmt::format("{} {}", values.count(), of), .points = {}};
  // Steps of 1 %, and of 0.1 % in the last one.
  for (int step = 0; step <= 109 && !values.empty(); ++step) {
    const double percent = step <= 99 ? step : 99 + 0.1 * (step - 99);
    series.points.emplace_back(percent, kMilli * values.at(percent));
  }
  chart.series.push_back(std::move(series));
  if (!values.empty()) chart.marks = {{50, "p50"}, {90, "p90"}, {99, "p99"}};
  return chart;
}

}  // namespace

void LoadReport::add(const Outcome& outcome) {
  using End = Outcome::End;
  latest_ = std::max(latest_, outcome.ended);
  late_values_.push_back(outcome.sent - outcome.planned);
  slow_ += outcome.slow ? 1 : 0;
  if (outcome.end == End::kDone) ++done_;
  if (outcome.end == End::kCancelled) ++cancelled_;
  if (outcome.end == End::kFailed) {
    ErrorKind& kind = errors_[outcome.error];
    ++kind.count;
    if (kind.example.empty()) kind.example = outcome.detail;
  }
  answer_tokens_ += outcome.tokens();
  if (outcome.prompt_tokens >= 0) prompt_known_ = true, prompt_tokens_ += outcome.prompt_tokens;
  if (outcome.cached_tokens >= 0) cached_known_ = true, cached_tokens_ += outcome.cached_tokens;
  if (outcome.slow) return;
  if (outcome.first >= 0) first_values_.push_back(outcome.first - outcome.planned);
  gap_values_.insert(gap_values_.end(), outcome.gaps.begin(), outcome.gaps.end());
  if (outcome.end == End::kDone) whole_values_.push_back(outcome.ended - outcome.planned);
}

void LoadReport::finish(double seconds, int64_t sent) {
  // The watch's last look comes a little after the last answer.
  seconds_ = latest_ > 0 ? latest_ : seconds;
  sent_ = sent;
  first_ = Percentiles(std::move(first_values_));
  gap_ = Percentiles(std::move(gap_values_));
  whole_ = Percentiles(std::move(whole_values_));
  late_ = Percentiles(std::move(late_values_));
}

int64_t LoadReport::failed() const {
  int64_t count = 0;
  for (const auto& [name, kind] : errors_) count += kind.count;
  return count;
}

void LoadReport::print(const std::string& title) const {
  std::string text = fmt::format("{}\n\n", title);
  text += fmt::format("  {} requests in {:.2f} s: {} answered, {} cancelled, {} failed", sent_,
                      seconds_, done_, cancelled_, failed());
  const int64_t open = sent_ - done_ - cancelled_ - failed();
  if (open > 0) text += fmt::format(", {} left open", open);
  if (slow_ > 0) text += fmt::format("; {} read slowly, not in the times below", slow_);
  text += fmt::format("\n  {:.2f} requests/s, {:.1f} tokens/s; tokens: {} of answers",
                      static_cast<double>(done_) / seconds_,
                      static_cast<double>(answer_tokens_) / seconds_, answer_tokens_);
  if (prompt_known_) text += fmt::format(", {} of prompts", prompt_tokens_);
  if (cached_known_) text += fmt::format(" ({} cached)", cached_tokens_);
  text += fmt::format("\n\n  {:<24} {:>9} {:>10} {:>10} {:>10} {:>10}\n", "milliseconds", "count",
                      "p50", "p90", "p99", "max");
  std::fputs(text.c_str(), stdout);
  print_row("to the first token", first_);
  print_row("between tokens", gap_);
  print_row("to the end", whole_);
  print_row("sent late by", late_);
  if (errors_.empty()) return;
  std::fputs("\n  errors\n", stdout);
  for (const auto& [name, kind] : errors_)
    std::fputs(fmt::format("  {:>9}  {}{}{}\n", kind.count, name, kind.example.empty() ? "" : ": ",
                           kind.example)
                   .c_str(),
               stdout);
}

void LoadReport::write_json(JsonWriter& out) const {
  out.field("seconds", seconds_).field("requests", sent_).field("answered", done_);
  out.field("cancelled", cancelled_).field("failed", failed()).field("slow_readers", slow_);
  out.field("requests_per_s", static_cast<double>(done_) / seconds_);
  out.field("tokens_per_s", static_cast<double>(answer_tokens_) / seconds_);
  out.field("answer_tokens", answer_tokens_);
  if (prompt_known_) out.field("prompt_tokens", prompt_tokens_);
  if (cached_known_) out.field("cached_tokens", cached_tokens_);
  write_row(out, "first_token_ms", first_);
  write_row(out, "gap_ms", gap_);
  write_row(out, "end_to_end_ms", whole_);
  write_row(out, "sent_late_ms", late_);
  out.key("errors").begin_array();
  for (const auto& [name, kind] : errors_)
    out.begin_object()
        .field("kind", std::string_view(name))
        .field("count", kind.count)
        .field("example", std::string_view(kind.example))
        .end_object();
  out.end_array();
}

std::string LoadReport::draw() const {
  const Chart charts[] = {chart_of("Time to the first token", "requests", first_),
                          chart_of("Time between tokens", "gaps", gap_)};
  return draw_svg(charts);
}

}  // namespace hadal::load
