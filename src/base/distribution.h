// Distributions of whole numbers as a user writes them, drawn reproducibly.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace hadal {

/// A positive whole number: always N, uniform in [a, b], or log-normal around a median, rounded and
/// kept within [1, kMax].
class LengthDistribution {
 public:
  static constexpr int64_t kMax = int64_t{1} << 24;

  /// "N" or "fixed:N", "A:B" or "uniform:A:B", "lognormal:MEDIAN:SIGMA"; else an InputError that
  /// begins with `name`.
  static LengthDistribution parse(const std::string& text, const std::string& name);

  /// The number that these 128 random bits stand for.
  int64_t draw(const std::array<uint32_t, 4>& random) const;

 private:
  enum class Kind { kUniform, kLogNormal };
  Kind kind_ = Kind::kUniform;
  int64_t low_ = 1, high_ = 1;
  double median_ = 1, sigma_ = 0;
};

}  // namespace hadal
