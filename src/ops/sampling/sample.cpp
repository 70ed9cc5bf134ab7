#include "ops/sampling/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <mutex>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "base/hash.h"
#include "base/parallel.h"
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
  std::vector<double> weight(scaled.size());
  double total = 0.0;
  for (size_t i = 0; i < scaled.size(); ++i) {
    weight[i] = std::exp(scaled[i]);
    total += weight[i];
  }
  const auto likelier = [&](int64_t a, int64_t b) {
    const double x = scaled[static_cast<size_t>(a)], y = scaled[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
  std::vector<bool> outside(scaled.size(), true);
  // The set is small, so only as much of the order is made as it needs.
  double mass = 0.0;
  auto end = order.begin();
  for (int64_t step = 256; end != order.end(); step *= 2) {
    const auto begin = end;
    end += std::min(step, order.end() - begin);
    if (end != order.end()) std::nth_element(begin, end, order.end(), likelier);
    std::sort(begin, end, likelier);
    for (auto i = begin; i != end; ++i) {
      if (mass >= top_p * total) return outside;
      outside[static_cast<size_t>(*i)] = false;
      mass += weight[static_cast<size_t>(*i)];
    }
  }
  return outside;
}

/// A candidate and its key: log p + Gumbel noise. The largest key wins, ties to the lower id.
struct Candidate {
  double key;
  int64_t token;
};

bool beats(const Candidate& a, const Candidate& b) {
  return a.key > b.key || (a.key == b.key && a.token < b.token);
}

/// The keys of one row.
class Keys {
 public:
  Keys(std::span<const float> logits,
       double highest,
       const SamplingParams& params,
       int64_t position)
      : logits_(logits),
        highest_(highest),
        temperature_(params.temperature),
        inverse_(1.0 / params.temperature),
        random_(params.seed, fnv1a64("sample") ^ static_cast<uint64_t>(position)) {}

  double scaled(int64_t token) const {
    return (logits_[static_cast<size_t>(token)] - highest_) / temperature_;
  }
  double key(int64_t token) const {
    // Minus the logarithm of an exponential draw, which must not be 0.
    const double uniform = random_.uniform(static_cast<uint64_t>(token));
    return scaled(token) - std::log(std::max(-std::log1p(-uniform), 1e-300));
  }
  /// Whether the key can be as large as `bound`, without a logarithm: a uniform draw of at least
  /// 2^-n has noise of at most n ln 2, because -log(1 - u) >= u.
  bool may_reach(int64_t token, double bound) const {
    const uint32_t leading = random_.block(static_cast<uint64_t>(token))[0];
    if (leading == 0) return true;
    const double noise = 0.6931472 * (1 + std::countl_zero(leading));
    const double apart = logits_[static_cast<size_t>(token)] - highest_;
    return !(apart * inverse_ + noise + kSlack < bound);
  }

 private:
  static constexpr double kSlack = 1e-3;  ///< far above every rounding on the way

  std::span<const float> logits_;
  double highest_, temperature_, inverse_;
  Philox random_;
};

}  // namespace

int64_t sample_token(std::span<const float> logits,
                     const SamplingParams& params,
                     int64_t position) {
  const int64_t best = largest(logits);
  if (params.temperature <= 0.0) return best;
  const Keys keys(logits, logits[static_cast<size_t>(best)], params, position);
  const auto count = static_cast<int64_t>(logits.size());
  std::vector<bool> outside;
  if (params.top_p < 1.0) {
    std::vector<double> scaled(logits.size(), -INFINITY);
    for (int64_t i = 0; i < count; ++i) {
      const auto place = static_cast<size_t>(i);
      if (!std::isnan(logits[place])) scaled[place] = keys.scaled(i);
    }
    outside = outside_top_p(scaled, params.top_p);
  }
  // The most likely token is always inside: its key sets what the others have to reach.
  Candidate chosen{.key = keys.key(best), .token = best};
  std::mutex mutex;
  parallel_for(count, 2048, [&, first = chosen](int64_t begin, int64_t end) {
    Candidate local = first;
    for (int64_t i = begin; i < end; ++i) {
      const auto place = static_cast<size_t>(i);
      if (std::isnan(logits[place]) || (!outside.empty() && outside[place])) continue;
      if (!keys.may_reach(i, local.key) || keys.scaled(i) == -INFINITY) continue;
      const Candidate candidate{.key = keys.key(i), .token = i};
      if (beats(candidate, local)) local = candidate;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (beats(local, chosen)) chosen = local;
  });
  return chosen.token;
}

double log_probability(std::span<const float> logits, int64_t token) {
  const double highest = logits[static_cast<size_t>(largest(logits))];
  double total = 0.0;
  for (const float x : logits) total += std::exp(static_cast<double>(x) - highest);
  return static_cast<double>(logits[static_cast<size_t>(token)]) - highest - std::log(total);
}

}  // namespace hadal::ops
