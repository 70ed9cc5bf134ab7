#include "ops/sampling/sample.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "base/hash.h"
#include "base/philox.h"

namespace hadal::ops {
namespace {

int64_t largest(std::span<const float> logits) {
  int64_t best = -1;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i])) continue;
    if (best < 0 || logits[i] > logits[static_cast<size_t>(best)]) best = static_cast<int64_t>(i);
  }
  HADAL_CHECK(best >= 0, "sample: no usable logit among ", logits.size());
  return best;
}

/// Marks the tokens outside the smallest most likely set of mass >= top_p, ties to the lower id.
std::vector<bool> outside_top_p(const std::vector<double>& scaled, double top_p) {
  std::vector<int64_t> order(scaled.size());
  std::iota(order.begin(), order.end(), 0);
  const auto score = [&](int64_t i) { return scaled[static_cast<size_t>(i)]; };
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return score(a) > score(b) || (score(a) == score(b) && a < b);
  });
  double total = 0.0;
  for (const double x : scaled) total += std::exp(x);
  std::vector<bool> outside(scaled.size(), false);
  double mass = 0.0;
  for (const int64_t i : order) {
    outside[static_cast<size_t>(i)] = mass >= top_p * total;
    mass += std::exp(score(i));
  }
  return outside;
}

}  // namespace

int64_t sample_token(std::span<const float> logits,
                     const SamplingParams& params,
                     int64_t position) {
  const int64_t best = largest(logits);
  if (params.temperature <= 0.0) return best;
  const double highest = logits[static_cast<size_t>(best)];
  std::vector<double> scaled(logits.size(), -INFINITY);
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!std::isnan(logits[i])) scaled[i] = (logits[i] - highest) / params.temperature;
  }
  std::vector<bool> outside(logits.size(), false);
  if (params.top_p < 1.0) outside = outside_top_p(scaled, params.top_p);
  const Philox random(params.seed, fnv1a64("sample") ^ static_cast<uint64_t>(position));
  int64_t chosen = best;
  double highest_key = -INFINITY;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (outside[i] || scaled[i] == -INFINITY) continue;
    // argmax of log p + Gumbel noise: minus the logarithm of an exponential draw, which must not be
    // 0.
    const double exponential = std::max(-std::log1p(-random.uniform(i)), 1e-300);
    const double key = scaled[i] - std::log(exponential);
    if (key > highest_key) {
      highest_key = key;
      chosen = static_cast<int64_t>(i);
    }
  }
  return chosen;
}

double log_probability(std::span<const float> logits, int64_t token) {
  const double highest = logits[static_cast<size_t>(largest(logits))];
  double total = 0.0;
  for (const float x : logits) total += std::exp(static_cast<double>(x) - highest);
  return static_cast<double>(logits[static_cast<size_t>(token)]) - highest - std::log(total);
}

}  // namespace hadal::ops
