#include "apps/flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace hadal::apps {
namespace {

/// The whole text as a number; nothing when it is none.
template <typename Number>
std::optional<Number> parse(const std::string& text) {
  Number value{};
  const char* begin = text.data() + (text.starts_with('+') ? 1 : 0);
  const char* end = text.data() + text.size();
  const auto [at, error] = std::from_chars(begin, end, value);
  if (error != std::errc() || at != end) return std::nullopt;
  return value;
}

/// A number of a person's length.
std::string shown(double value) {
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof(text), value);
  return {text, end};
}

template <typename Fits>
CLI::Validator range(const std::string& expected, Fits fits) {
  return {[expected, fits](std::string& text) {
            const std::optional<double> value = parse<double>(text);
            if (value && fits(*value)) return std::string();
            return concat("expected ", expected, ", found ", text.substr(0, 60));
          },
          ""};
}

CLI::Validator of_kind(const std::string& expected, bool (*fits)(const std::string&)) {
  return {[expected, fits](std::string& text) {
            if (fits(text)) return std::string();
            return concat("expected ", expected, ", found ", text.substr(0, 60));
          },
          ""};
}

bool is_finite(const std::string& text) {
  const std::optional<double> value = parse<double>(text);
  return value && std::isfinite(*value);
}

}  // namespace

CLI::Validator at_least(double least) {
  return range(concat("a number of at least ", shown(least)),
               [least](double value) { return value >= least; });
}

CLI::Validator above(double least) {
  return range(concat("a number above ", shown(least)),
               [least](double value) { return value > least; });
}

CLI::Validator between(double least, double most) {
  return range(concat("a number from ", shown(least), " to ", shown(most)),
               [least, most](double value) { return value >= least && value <= most; });
}

void check_numbers(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    // The type is followed by the names of checks.
    const std::string type = option->get_type_name();
    if (type.starts_with("FLOAT")) {
      option->check(of_kind("a finite number", is_finite));
    } else if (type.starts_with("UINT")) {
      option->check(
          of_kind("a whole number from 0 to 18446744073709551615",
                  [](const std::string& text) { return parse<uint64_t>(text).has_value(); }));
    } else if (type.starts_with("INT")) {
      option->check(of_kind("a whole number", [](const std::string& text) {
        return parse<int64_t>(text).has_value();
      }));
    }
  }
  for (CLI::App* sub : app.get_subcommands({})) check_numbers(*sub);
}

void SamplingFlags::define(CLI::App& app) {
  app.add_option("--temperature", temperature,
                 "0: always the most likely token; default: the model's")
      ->check(between(0, 100));
  app.add_option("--top-p", top_p, "keep the most likely tokens of this mass; default: the model's")
      ->check(between(0, 1));
  app.add_option("--top-k", top_k, "keep so many of them; 0: all; default: the model's")
      ->check(between(0, 1e9));
  app.add_option("--min-p", min_p,
                 "keep those with this share of the likeliest's probability; default: the model's")
      ->check(between(0, 0.999999));
  app.add_option("--repetition-penalty", repetition_penalty,
                 "above 1: tokens that are there become less likely; default: the model's")
      ->check(between(0.01, 10));
  app.add_option("--seed", seed, "same seed, same text");
}

Sampling SamplingFlags::over(Sampling model) const {
  model.temperature = temperature.value_or(model.temperature);
  // 0 means the most likely token alone, which the smallest share gives.
  model.top_p = std::max(top_p.value_or(model.top_p), 1e-9);
  model.top_k = top_k.value_or(model.top_k);
  model.min_p = min_p.value_or(model.min_p);
  model.repetition_penalty = repetition_penalty.value_or(model.repetition_penalty);
  model.seed = seed;
  return model;
}

}  // namespace hadal::apps
