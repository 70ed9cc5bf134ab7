// What /metrics says, held to the rules of Prometheus' text format and to the naming rules that
// `promtool check metrics` knows, by a checker of our own.
#include "server/metrics.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace hadal::server {
namespace {

struct Sample {
  std::string name;
  std::map<std::string, std::string> labels;
  double value = 0;
};
struct Family {
  std::string type, help;
  std::vector<Sample> samples;
};

bool is_name(std::string_view text) {
  if (text.empty() || (text[0] >= '0' && text[0] <= '9')) return false;
  return std::ranges::all_of(text, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == ':';
  });
}

/// Reads an exposition; every problem is a line.
class Checker {
 public:
  explicit Checker(const std::string& text) {
    if (!text.ends_with('\n')) problem("the text does not end with a line feed");
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
      if (line.starts_with("# ")) {
        take_comment(line);
      } else if (!line.empty()) {
        take_sample(line);
      }
    }
    for (const auto& [name, family] : families_) {
      check_names(name, family);
      if (family.type == "histogram") check_histogram(name, family);
    }
  }
  const std::vector<std::string>& problems() const { return problems_; }
  const std::map<std::string, Family>& families() const { return families_; }

 private:
  void problem(const std::string& what) { problems_.push_back(what); }

  void take_comment(const std::string& line) {
    std::istringstream words(line);
    std::string hash, kind, name, rest;
    words >> hash >> kind >> name;
    std::getline(words >> std::ws, rest);
    if (kind != "HELP" && kind != "TYPE") return;  // any other comment
    if (!is_name(name)) problem("no name: " + line);
    Family& family = families_[name];
    if (kind == "HELP") {
      if (!family.help.empty()) problem("a second HELP: " + name);
      if (rest.empty()) problem("an empty HELP: " + name);
      family.help = rest;
    } else {
      if (!family.type.empty()) problem("a second TYPE: " + name);
      if (!family.samples.empty()) problem("TYPE behind samples: " + name);
      if (!std::set<std::string>{"counter", "gauge", "histogram", "summary", "untyped"}.contains(
              rest))
        problem("no type: " + line);
      family.type = rest;
    }
    current_ = name;
    if (closed_.contains(name)) problem("the lines of " + name + " are apart");
    for (const auto& [other, unused] : families_) {
      if (other != name) closed_.insert(other);
    }
  }

  void take_sample(const std::string& line) {
    Sample sample;
    size_t pos = std::min(line.find_first_of("{ "), line.size());
    sample.name = line.substr(0, pos);
    if (!is_name(sample.name)) return problem("no name: " + line);
    if (pos < line.size() && line[pos] == '{' && !take_labels(line, pos, sample))
      return problem("labels: " + line);
    const std::string value = pos < line.size() ? line.substr(pos + 1) : "";
    if (value == "+Inf" || value == "NaN") {
      sample.value = value == "NaN" ? NAN : INFINITY;
    } else {
      const auto end = std::from_chars(value.data(), value.data() + value.size(), sample.value);
      if (end.ec != std::errc() || end.ptr != value.data() + value.size())
        return problem("no value: " + line);
    }
    std::string key = sample.name;
    for (const auto& [label, text] : sample.labels) key += "," + label + "=" + text;
    if (!seen_.insert(key).second) problem("twice: " + key);
    const std::string owner = owner_of(sample.name);
    if (owner != current_) problem("a sample outside its family: " + line);
    families_[owner].samples.push_back(std::move(sample));
  }

  static bool take_labels(const std::string& line, size_t& pos, Sample& sample) {
    ++pos;
    while (pos < line.size() && line[pos] != '}') {
      const size_t equals = line.find("=\"", pos);
      if (equals == std::string::npos) return false;
      const std::string label = line.substr(pos, equals - pos);
      if (!is_name(label) || label.find(':') != std::string::npos || label.starts_with("__"))
        return false;
      std::string value;
      for (pos = equals + 2; pos < line.size() && line[pos] != '"'; ++pos) {
        if (line[pos] == '\\' &&
            std::string_view("\\\"n").find(line.at(++pos)) == std::string_view::npos)
          return false;
        value += line[pos];
      }
      if (!sample.labels.emplace(label, value).second) return false;
      ++pos;
      if (pos < line.size() && line[pos] == ',') ++pos;
    }
    return pos < line.size() && line[pos++] == '}' && pos < line.size() && line[pos] == ' ';
  }

  /// The family a sample belongs to: histograms' samples carry suffixes.
  std::string owner_of(const std::string& name) const {
    for (const std::string_view suffix : {"_bucket", "_sum", "_count"}) {
      if (!name.ends_with(suffix)) continue;
      std::string base = name.substr(0, name.size() - suffix.size());
      const auto family = families_.find(base);
      if (family != families_.end() && family->second.type == "histogram") return base;
    }
    return name;
  }

  /// The rules of promtool's linter.
  void check_names(const std::string& name, const Family& family) {
    if (family.help.empty()) problem("no HELP: " + name);
    if (family.type.empty()) problem("no TYPE: " + name);
    const bool counter = family.type == "counter", histogram = family.type == "histogram";
    if (counter != name.ends_with("_total"))
      problem("'_total' is for counters, and all of them: " + name);
    for (const char* suffix : {"_bucket", "_count", "_sum", "_info"}) {
      if (!histogram && name.ends_with(suffix)) problem(suffix + (" is not for " + name));
    }
    for (const char* word : {"counter", "gauge", "histogram", "summary"}) {
      if (("_" + name + "_").find(std::string("_") + word + "_") != std::string::npos)
        problem("the type in the name: " + name);
    }
    for (const char* unit : {"milliseconds", "microseconds", "ms", "us", "minutes", "hours",
                             "kilobytes", "megabytes", "kib", "mib", "gib", "bits", "percent"}) {
      if (("_" + name + "_").find(std::string("_") + unit + "_") != std::string::npos)
        problem("no base unit: " + name);
    }
    if (name.find(':') != std::string::npos) problem("colons are for rules: " + name);
    if (std::ranges::any_of(name, [](char c) { return c >= 'A' && c <= 'Z'; }))
      problem("capital letters: " + name);
    for (const Sample& sample : family.samples) {
      if (!histogram && (sample.labels.contains("le") || sample.labels.contains("quantile")))
        problem("label le or quantile: " + name);
      if (counter && !(sample.value >= 0)) problem("a counter below zero: " + name);
      if (!std::isfinite(sample.value)) problem("no finite value: " + name);
    }
  }

  void check_histogram(const std::string& name, const Family& family) {
    double last = -INFINITY, count = -1;
    std::optional<double> total, sum;
    bool infinite = false;
    for (const Sample& sample : family.samples) {
      if (sample.name == name + "_sum") {
        sum = sample.value;
      } else if (sample.name == name + "_count") {
        total = sample.value;
      } else if (sample.name == name + "_bucket" && sample.labels.contains("le")) {
        const std::string& bound = sample.labels.at("le");
        infinite = bound == "+Inf";
        const double at = infinite ? INFINITY : std::stod(bound);
        if (!(at > last)) problem("buckets out of order: " + name);
        if (sample.value < count) problem("buckets that shrink: " + name);
        last = at;
        count = sample.value;
      } else {
        problem("what is " + sample.name + " in a histogram?");
      }
    }
    if (!infinite) problem("no last bucket +Inf: " + name);
    if (!total || *total != count) problem("the count is not the last bucket's: " + name);
    if (!sum || !(*sum >= 0)) problem("no sum: " + name);
  }

  std::map<std::string, Family> families_;
  std::set<std::string> seen_, closed_;
  std::string current_;
  std::vector<std::string> problems_;
};

TEST(MetricsPage, KeepTheRulesOfPrometheus) {
  ApiMetrics metrics;
  const auto check = [&](const engine_core::EngineStats& stats) {
    const std::string text = metrics.text(stats, {});
    const Checker checker(text);
    EXPECT_TRUE(checker.problems().empty()) << ::testing::PrintToString(checker.problems());
    EXPECT_GT(checker.families().size(), 30u);
    return text;
  };
  check({});  // before anything happened
  using std::chrono::milliseconds;
  for (const int ms : {0, 1, 7, 30, 900, 20'000, 10'000'000})
    metrics.first_token.observe(milliseconds(ms));
  metrics.count_response("/v1/messages", 200);
  metrics.count_response("/v1/messages", 429);
  metrics.count_response("other", 404);
  metrics.finished.add(3);
  engine_core::EngineStats stats;
  stats.model_seconds = 1.5e-7;
  stats.sampling_seconds = 1e17;
  stats.disk_bytes = int64_t{1} << 50;
  check(stats);
}

TEST(MetricsPage, TheCheckerFindsEveryFault) {
  const std::string good =
      "# HELP a_total what\n# TYPE a_total counter\na_total{route=\"x\"} 1\n"
      "# HELP b what\n# TYPE b gauge\nb -2.5\n"
      "# HELP c_seconds what\n# TYPE c_seconds histogram\n"
      "c_seconds_bucket{le=\"0.5\"} 1\nc_seconds_bucket{le=\"+Inf\"} 3\nc_seconds_count 3\n"
      "c_seconds_sum 4.5\n";
  EXPECT_TRUE(Checker(good).problems().empty())
      << ::testing::PrintToString(Checker(good).problems());
  const std::pair<std::string, std::string> faults[] = {
      {"# HELP b what\n", ""},
      {"# HELP b what\n", "# HELP b\n"},
      {"# TYPE b gauge\n", ""},
      {"# TYPE b gauge\n", "# TYPE b gouge\n"},
      {"# TYPE a_total counter\n", "# TYPE a_total gauge\n"},
      {"# TYPE b gauge\n", "# TYPE b counter\n"},
      {"# TYPE b gauge\nb -2.5\n", "b -2.5\n# TYPE b gauge\n"},
      {"b -2.5\n", "b -2.5\nb 3\n"},
      {"b -2.5\n", "b two\n"},
      {"b -2.5\n", "b NaN\n"},
      {"b -2.5\n", "b{le=\"1\"} 3\n"},
      {"b -2.5\n", "b -2.5\na_total 4\n"},
      {"b -2.5\n", "b{x=\"1} 3\n"},
      {"b -2.5\n", "b{x=\"\\q\"} 3\n"},
      {"a_total{route=\"x\"} 1\n", "a_total{route=\"x\"} -1\n"},
      {"a_total{route=\"x\"} 1\n", "a_total{9=\"x\"} 1\n"},
      {"{le=\"0.5\"} 1\n", "{le=\"0.5\"} 4\n"},
      {"c_seconds_bucket{le=\"+Inf\"} 3\n", ""},
      {"c_seconds_count 3\n", "c_seconds_count 2\n"},
      {"c_seconds_sum 4.5\n", ""},
      {"c_seconds_sum 4.5\n", "c_seconds_sum 4.5"},
  };
  for (const auto& [from, to] : faults) {
    std::string bad = good;
    bad.replace(bad.find(from), from.size(), to);
    EXPECT_FALSE(Checker(bad).problems().empty()) << bad;
  }
  for (const char* name : {"b_ms", "b_gauge", "bCamel", "b:x", "b_total", "b_count"}) {
    const std::string bad =
        std::string("# HELP ") + name + " what\n# TYPE " + name + " gauge\n" + name + " 1\n";
    EXPECT_FALSE(Checker(bad).problems().empty()) << bad;
  }
}

}  // namespace
}  // namespace hadal::server
