#include "base/percentiles.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "base/check.h"

namespace hadal {

Percentiles::Percentiles(std::vector<double> values) : sorted_(std::move(values)) {
  std::sort(sorted_.begin(), sorted_.end());
}

double Percentiles::at(double percent) const {
  HADAL_CHECK(percent >= 0 && percent <= 100, "percentiles: ", percent);
  if (sorted_.empty()) return std::numeric_limits<double>::quiet_NaN();
  // The small term keeps 99 % of 100 values at rank 99 whatever the division rounds to.
  const double rank = std::ceil(percent * static_cast<double>(sorted_.size()) / 100 - 1e-9);
  return sorted_[rank < 1 ? 0 : static_cast<size_t>(rank) - 1];
}

double Percentiles::mean() const {
  if (sorted_.empty()) return std::numeric_limits<double>::quiet_NaN();
  return std::accumulate(sorted_.begin(), sorted_.end(), 0.0) / static_cast<double>(sorted_.size());
}

}  // namespace hadal
