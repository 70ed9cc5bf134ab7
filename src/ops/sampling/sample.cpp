#include "ops/sampling/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "base/hash.h"
#include "base/parallel.h"
#include "base/philox.h"

namespace hadal::ops {
namespace {

/// The place of the largest logit that is neither NaN nor -infinity, or -1.
int64_t find_largest(std::span<const float> logits) {
  int64_t best = -1;
  float highest = -INFINITY;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] > highest)) continue;
    best = static_cast<int64_t>(i);
    highest = logits[i];
  }
  return best;
}

/// Orders places of a row by value, ties to the lower place.
template <typename Row>
auto likelier_in(const Row& row) {
  return [&row](int64_t a, int64_t b) {
    const auto x = row[static_cast<size_t>(a)], y = row[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
}

/// Marks the tokens outside the top_k most likely (0: all), and of those outside the smallest most
/// likely set of mass >= top_p.
std::vector<bool> outside_top(const std::vector<double>& scaled, int64_t top_k, double top_p) {
  std::vector<int64_t> order(scaled.size());
  std::iota(order.begin(), order.end(), 0);
  const auto likelier = likelier_in(scaled);
  auto last = order.end();
  if (top_k > 0 && top_k < static_cast<int64_t>(order.size())) {
    last = order.begin() + top_k;
    std::nth_element(order.begin(), last, order.end(), likelier);
    std::sort(order.begin(), last);  // their mass is summed in the order of the row
  }
  std::vector<bool> outside(scaled.size(), true);
  if (top_p >= 1.0) {
    for (auto i = order.begin(); i != last; ++i) outside[static_cast<size_t>(*i)] = false;
    return outside;
  }
  std::vector<double> weight(scaled.size());
  double total = 0.0;
  for (auto i = order.begin(); i != last; ++i) {
    const auto place = static_cast<size_t>(*i);
    weight[place] = std::exp(scaled[place]);
    total += weight[place];
  }
  // The set is small, so only as much of the order is made as it needs.
  double mass = 0.0;
  auto end = order.begin();
  for (int64_t step = 256; end != last; step *= 2) {
    const auto begin = end;
    end += std::min(step, last - begin);
    if (end != last) std::nth_element(begin, end, last, likelier);
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
        choice_(uint64_t{params.choice} << 32),
        random_(params.seed, fnv1a64("sample") ^ static_cast<uint64_t>(position)) {}

  double scaled(int64_t token) const {
    return (logits_[static_cast<size_t>(token)] - highest_) / temperature_;
  }
  double key(int64_t token) const {
    // Minus the logarithm of an exponential draw, which must not be 0.
    const double uniform = random_.uniform(counter(token));
    return scaled(token) - std::log(std::max(-std::log1p(-uniform), 1e-300));
  }
  /// Whether the key can be as large as `bound`, without a logarithm: a uniform draw of at least
  /// 2^-n has noise of at most n ln 2, because -log(1 - u) >= u.
  bool may_reach(int64_t token, double bound) const {
    const uint32_t leading = random_.block(counter(token))[0];
    if (leading == 0) return true;
    const double noise = 0.6931472 * (1 + std::countl_zero(leading));
    const double apart = logits_[static_cast<size_t>(token)] - highest_;
    return !(apart * inverse_ + noise + kSlack < bound);
  }

 private:
  static constexpr double kSlack = 1e-3;  ///< far above every rounding on the way

  /// Token ids stay below 2^32.
  uint64_t counter(int64_t token) const { return choice_ | static_cast<uint64_t>(token); }

  std::span<const float> logits_;
  double highest_, temperature_, inverse_;
  uint64_t choice_;
  Philox random_;
};

/// log of the sum of exp(logits - highest).
double log_total(std::span<const float> logits, double highest) {
  double total = 0.0;
  for (const float x : logits) {
    if (!std::isnan(x)) total += std::exp(static_cast<double>(x) - highest);
  }
  return std::log(total);
}

float penalised(float logit, const SamplingParams& params, int64_t in_answer) {
  double x = logit;
  x = x > 0.0 ? x / params.repetition_penalty : x * params.repetition_penalty;
  if (in_answer > 0) {
    x -= params.frequency_penalty * static_cast<double>(in_answer) + params.presence_penalty;
  }
  return static_cast<float>(x);
}

void apply_mask(std::span<float> logits, std::span<const uint32_t> mask) {
  for (size_t begin = 0; begin < logits.size(); begin += 32) {
    const uint32_t word = begin / 32 < mask.size() ? mask[begin / 32] : 0;
    if (word == ~uint32_t{0}) continue;
    const size_t count = std::min<size_t>(32, logits.size() - begin);
    for (size_t bit = 0; bit < count; ++bit) {
      if ((word >> bit & 1u) == 0) logits[begin + bit] = -INFINITY;
    }
  }
}

}  // namespace

void TokenHistory::add_prompt(std::span<const int64_t> tokens) {
  for (const int64_t token : tokens) counts_[token].in_prompt = true;
}

void TokenHistory::remove(int64_t token) {
  const auto found = counts_.find(token);
  HADAL_CHECK(found != counts_.end() && found->second.in_answer > 0, "sample: token ", token,
              " is not in the answer");
  --found->second.in_answer;
}

bool adjusts_logits(const SamplingParams& params) {
  return !params.logit_bias.empty() || params.repetition_penalty != 1.0 ||
         params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
}

void adjust_logits(std::span<float> logits,
                   const SamplingParams& params,
                   const TokenHistory& history,
                   std::span<const uint32_t> mask) {
  const auto size = static_cast<int64_t>(logits.size());
  HADAL_CHECK(params.repetition_penalty > 0.0, "sample: repetition penalty ",
              params.repetition_penalty, ", expected > 0");
  for (const auto& [token, bias] : params.logit_bias) {
    HADAL_CHECK(token >= 0 && token < size, "sample: logit bias of token ", token, " of ", size);
    float& logit = logits[static_cast<size_t>(token)];
    logit = static_cast<float>(logit + bias);
  }
  const bool any_penalty = params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 ||
                           params.frequency_penalty != 0.0;
  if (any_penalty) {
    // Each token on its own, so the order does not matter.
    for (const auto& [token, count] : history.counts_) {
      HADAL_CHECK(token >= 0 && token < size, "sample: token ", token, " of ", size);
      if (!count.in_prompt && count.in_answer == 0) continue;
      float& logit = logits[static_cast<size_t>(token)];
      logit = penalised(logit, params, count.in_answer);
    }
  }
  if (!mask.empty()) apply_mask(logits, mask);
}

int64_t sample_token(std::span<const float> logits,
                     const SamplingParams& params,
                     int64_t position) {
  const int64_t best = find_largest(logits);
  HADAL_CHECK(best >= 0, "sample: no usable logit among ", logits.size());
  if (params.temperature <= 0.0) return best;
  const Keys keys(logits, logits[static_cast<size_t>(best)], params, position);
  const auto count = static_cast<int64_t>(logits.size());
  std::vector<bool> outside;
  if (params.top_p < 1.0 || (params.top_k > 0 && params.top_k < count)) {
    std::vector<double> scaled(logits.size(), -INFINITY);
    for (int64_t i = 0; i < count; ++i) {
      const auto place = static_cast<size_t>(i);
      if (!std::isnan(logits[place])) scaled[place] = keys.scaled(i);
    }
    outside = outside_top(scaled, params.top_k, params.top_p);
  }
  // The likeliest token's scaled logit is 0.
  const double least = params.min_p > 0.0 ? std::log(std::min(params.min_p, 1.0))
                                          : -std::numeric_limits<double>::max();
  // The most likely token is always inside: its key sets what the others have to reach.
  Candidate chosen{.key = keys.key(best), .token = best};
  std::mutex mutex;
  parallel_for(count, 2048, [&, first = chosen](int64_t begin, int64_t end) {
    Candidate local = first;
    for (int64_t i = begin; i < end; ++i) {
      const auto place = static_cast<size_t>(i);
      if (std::isnan(logits[place]) || (!outside.empty() && outside[place])) continue;
      if (!keys.may_reach(i, local.key) || keys.scaled(i) < least) continue;
      const Candidate candidate{.key = keys.key(i), .token = i};
      if (beats(candidate, local)) local = candidate;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (beats(local, chosen)) chosen = local;
  });
  return chosen.token;
}

double log_probability(std::span<const float> logits, int64_t token) {
  const int64_t best = find_largest(logits);
  HADAL_CHECK(best >= 0, "sample: no usable logit among ", logits.size());
  const double highest = logits[static_cast<size_t>(best)];
  return static_cast<double>(logits[static_cast<size_t>(token)]) - highest -
         log_total(logits, highest);
}

std::vector<TokenLogprob> top_log_probabilities(std::span<const float> logits, int64_t count) {
  const int64_t best = find_largest(logits);
  HADAL_CHECK(best >= 0, "sample: no usable logit among ", logits.size());
  std::vector<int64_t> order;
  order.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!std::isnan(logits[i])) order.push_back(static_cast<int64_t>(i));
  }
  const auto kept = std::min(count, static_cast<int64_t>(order.size()));
  std::partial_sort(order.begin(), order.begin() + kept, order.end(), likelier_in(logits));
  const double highest = logits[static_cast<size_t>(best)];
  const double total = log_total(logits, highest);
  std::vector<TokenLogprob> top;
  for (int64_t rank = 0; rank < kept; ++rank) {
    const int64_t token = order[static_cast<size_t>(rank)];
    const double logit = logits[static_cast<size_t>(token)];
    top.push_back({.token = token, .logprob = logit - highest - total});
  }
  return top;
}

}  // namespace hadal::ops
