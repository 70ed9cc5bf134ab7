// Exact percentiles of a set of measurements.
#pragma once

#include <cstddef>
#include <vector>

namespace hadal {

/// Holds all values, sorted. Percentiles are nearest ranks: always one of the values.
class Percentiles {
 public:
  Percentiles() = default;
  explicit Percentiles(std::vector<double> values);

  bool empty() const { return sorted_.empty(); }
  size_t count() const { return sorted_.size(); }
  /// The smallest value that `percent` % of all values do not exceed; percent in [0, 100]. NaN when
  /// there is no value.
  double at(double percent) const;
  double max() const { return at(100); }
  double mean() const;

 private:
  std::vector<double> sorted_;
};

}  // namespace hadal
