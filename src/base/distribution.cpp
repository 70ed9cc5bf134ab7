#include "base/distribution.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numbers>
#include <optional>
#include <string_view>
#include <vector>

#include "base/check.h"

namespace hadal {
namespace {

std::optional<double> number(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return {};
  return value;
}

std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> parts;
  while (true) {
    const size_t colon = text.find(':');
    parts.push_back(text.substr(0, colon));
    if (colon == std::string_view::npos) return parts;
    text.remove_prefix(colon + 1);
  }
}

/// Uniform in (0, 1), of 64 bits.
double uniform(uint32_t high, uint32_t low) {
  return (static_cast<double>((uint64_t{high} << 20) | (low >> 12)) + 0.5) * 0x1p-52;
}

}  // namespace

LengthDistribution LengthDistribution::parse(const std::string& text, const std::string& name) {
  std::vector<std::string_view> parts = split(text);
  std::string_view kind = parts.size() == 1 ? "fixed" : "uniform";
  if (!parts[0].empty() && (parts[0][0] < '0' || parts[0][0] > '9')) {
    kind = parts[0];
    parts.erase(parts.begin());
  }
  const bool known = (kind == "fixed" && parts.size() == 1) ||
                     ((kind == "uniform" || kind == "lognormal") && parts.size() == 2);
  std::array<std::optional<double>, 2> values;
  for (size_t i = 0; known && i < parts.size(); ++i) values[i] = number(parts[i]);
  if (kind == "fixed") values[1] = values[0];
  HADAL_INPUT_CHECK(known && values[0] && values[1], name,
                    ": expected N, A:B or lognormal:MEDIAN:SIGMA, found ", text);
  const double low = *values[0], high = *values[1];
  LengthDistribution result;
  if (kind == "lognormal") {
    HADAL_INPUT_CHECK(low >= 1 && low <= kMax && high >= 0 && high <= 10, name,
                      ": expected a median of 1 to ", kMax, " and a sigma of 0 to 10, found ",
                      text);
    result.kind_ = Kind::kLogNormal;
    result.median_ = low;
    result.sigma_ = high;
    return result;
  }
  HADAL_INPUT_CHECK(
      low >= 1 && low <= high && high <= kMax && low == std::floor(low) && high == std::floor(high),
      name, ": expected whole numbers from 1 to ", kMax, ", the smaller one first, found ", text);
  result.low_ = static_cast<int64_t>(low);
  result.high_ = static_cast<int64_t>(high);
  return result;
}

int64_t LengthDistribution::draw(const std::array<uint32_t, 4>& random) const {
  const double u = uniform(random[0], random[1]);
  if (kind_ == Kind::kUniform) {
    const auto offset = static_cast<int64_t>(u * static_cast<double>(high_ - low_ + 1));
    return std::min(high_, low_ + offset);
  }
  const double angle = 2 * std::numbers::pi * uniform(random[2], random[3]);
  const double normal = std::sqrt(-2 * std::log(u)) * std::cos(angle);
  const double length = std::round(median_ * std::exp(sigma_ * normal));
  return static_cast<int64_t>(std::clamp(length, 1.0, static_cast<double>(kMax)));
}

}  // namespace hadal
