#include "ops/sampling/sample.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "base/check.h"
#include "base/hash.h"
#include "base/parallel.h"
#include "base/philox.h"
#include "ops/sampling/sample_cpu.h"

namespace hadal::ops {

constinit CpuSlot<void(const ReachParams&, int64_t, int64_t, uint64_t*)> reaching_cpu;
constinit CpuSlot<void(const MassParams&, double*)> masses_cpu;
constinit CpuSlot<void(const float*, int64_t, int64_t*)> largest_cpu;

namespace {

/// The place of the largest logit that is neither NaN nor -infinity, or -1.
int64_t find_largest(std::span<const float> logits) {
  int64_t place = -1;
  largest_cpu(logits.data(), static_cast<int64_t>(logits.size()), &place);
  return place;
}

/// Orders places of a row by value, ties to the lower place.
template <typename Row>
auto likelier_in(const Row& row) {
  return [&row](int64_t a, int64_t b) {
    const auto x = row[static_cast<size_t>(a)], y = row[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
}

/// The row with -infinity for all but its `count` most likely tokens.
std::vector<float> keep_top(std::span<const float> logits, int64_t count) {
  std::vector<int64_t> order;
  order.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!std::isnan(logits[i])) order.push_back(static_cast<int64_t>(i));
  }
  std::vector<float> kept(logits.size(), -INFINITY);
  const auto last = order.begin() + std::min(count, static_cast<int64_t>(order.size()));
  std::nth_element(order.begin(), last, order.end(), likelier_in(logits));
  for (auto i = order.begin(); i != last; ++i) {
    kept[static_cast<size_t>(*i)] = logits[static_cast<size_t>(*i)];
  }
  return kept;
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
       int64_t best,
       const Sampling& sampling,
       int64_t position,
       int64_t choice)
      : logits_(logits),
        best_(best),
        highest_(logits[static_cast<size_t>(best)]),
        temperature_(sampling.temperature),
        inverse_(static_cast<float>(1.0 / sampling.temperature)),
        choice_(static_cast<uint32_t>(choice)),
        seed_(sampling.seed),
        stream_(fnv1a64("sample") ^ static_cast<uint64_t>(position)),
        random_(seed_, stream_) {}

  double scaled(int64_t token) const {
    return (logit(token) - static_cast<double>(highest_)) / temperature_;
  }
  Candidate candidate(int64_t token) const {
    // Minus the logarithm of an exponential draw, which must not be 0.
    const double uniform = random_.uniform(uint64_t{choice_} << 32 | static_cast<uint64_t>(token));
    const double exponential = std::max(-std::log1p(-uniform), 1e-300);
    return {.key = scaled(token) - std::log(exponential), .token = token};
  }
  /// The largest key, of the tokens likelier than `excluded` if there is one.
  Candidate largest(std::optional<int64_t> excluded) const {
    constexpr int64_t kPiece = 256;  // tokens between two looks at the best key so far
    const auto likelier = likelier_in(logits_);
    Candidate chosen = candidate(best_);
    std::mutex mutex;
    const auto vocab = static_cast<int64_t>(logits_.size());
    parallel_for(vocab, 16'384, [&, first = chosen](int64_t begin, int64_t end) {
      Candidate local = first;
      for (int64_t piece = begin; piece < end; piece += kPiece) {
        std::array<uint64_t, kPiece / 64> words{};
        reaching_cpu(reach(local.key, excluded), piece, std::min(piece + kPiece, end),
                     words.data());
        for (size_t w = 0; w < words.size(); ++w) {
          for (uint64_t left = words[w]; left != 0; left &= left - 1) {
            const int64_t token = piece + static_cast<int64_t>(64 * w) + std::countr_zero(left);
            if (std::isnan(logit(token)) || (excluded && !likelier(token, *excluded))) continue;
            if (const Candidate other = candidate(token); beats(other, local)) local = other;
          }
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      if (beats(local, chosen)) chosen = local;
    });
    return chosen;
  }
  /// Whether the tokens likelier than `token` have less than `share` of the mass.
  bool within(int64_t token, double share) const {
    std::array<double, 2> masses{};
    masses_cpu({.logits = logits_.data(),
                .vocab = static_cast<int64_t>(logits_.size()),
                .highest = highest_,
                .inverse = inverse_,
                .token = token},
               masses.data());
    return masses[1] < share * masses[0];
  }

 private:
  float logit(int64_t token) const { return logits_[static_cast<size_t>(token)]; }
  /// What the kernel needs to find the tokens whose keys can be as large as `bound`.
  ReachParams reach(double bound, std::optional<int64_t> excluded) const {
    constexpr double kSlack = 1e-3;  // far above every rounding on the way
    return {.logits = logits_.data(),
            .highest = highest_,
            .inverse = inverse_,
            .bound = static_cast<float>(bound - kSlack),
            .floor = excluded ? logit(*excluded) : -INFINITY,
            .seed = seed_,
            .stream = stream_,
            .choice = choice_};
  }

  std::span<const float> logits_;
  int64_t best_;
  float highest_;
  double temperature_;
  float inverse_;
  uint32_t choice_;
  uint64_t seed_, stream_;
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

float penalised(float logit, const Sampling& sampling, int64_t in_answer) {
  double x = logit;
  x = x > 0.0 ? x / sampling.repetition_penalty : x * sampling.repetition_penalty;
  if (in_answer > 0) {
    x -= sampling.frequency_penalty * static_cast<double>(in_answer) + sampling.presence_penalty;
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

bool adjusts_logits(const Sampling& sampling) {
  return !sampling.logit_bias.empty() || sampling.repetition_penalty != 1.0 ||
         sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
}

void adjust_logits(std::span<float> logits,
                   const Sampling& sampling,
                   const TokenHistory& history,
                   std::span<const uint32_t> mask) {
  const auto size = static_cast<int64_t>(logits.size());
  HADAL_CHECK(sampling.repetition_penalty > 0.0, "sample: repetition penalty ",
              sampling.repetition_penalty, ", expected > 0");
  for (const auto& [token, bias] : sampling.logit_bias) {
    HADAL_CHECK(token >= 0 && token < size, "sample: logit bias of token ", token, " of ", size);
    float& logit = logits[static_cast<size_t>(token)];
    logit = static_cast<float>(logit + bias);
  }
  const bool any_penalty = sampling.repetition_penalty != 1.0 || sampling.presence_penalty != 0.0 ||
                           sampling.frequency_penalty != 0.0;
  if (any_penalty) {
    // Each token on its own, so the order does not matter.
    for (const auto& [token, count] : history.counts_) {
      HADAL_CHECK(token >= 0 && token < size, "sample: token ", token, " of ", size);
      if (!count.in_prompt && count.in_answer == 0) continue;
      float& logit = logits[static_cast<size_t>(token)];
      logit = penalised(logit, sampling, count.in_answer);
    }
  }
  if (!mask.empty()) apply_mask(logits, mask);
}

int64_t sample_token(std::span<const float> logits,
                     const Sampling& sampling,
                     int64_t position,
                     int64_t choice) {
  const int64_t best = find_largest(logits);
  HADAL_CHECK(best >= 0, "sample: no usable logit among ", logits.size());
  if (sampling.temperature <= 0.0) return best;
  std::vector<float> top;
  if (sampling.top_k > 0 && sampling.top_k < static_cast<int64_t>(logits.size())) {
    top = keep_top(logits, sampling.top_k);
    logits = top;
  }
  const Keys keys(logits, best, sampling, position, choice);
  // The likeliest token's scaled logit is 0.
  const double least = sampling.min_p > 0.0 ? std::log(std::min(sampling.min_p, 1.0)) : -INFINITY;
  // Whom top-p or min-p excludes, they exclude with everybody who is less likely, so the next best
  // is looked for among the likelier ones. The most likely token is never excluded.
  Candidate chosen = keys.largest({});
  while (chosen.token != best &&
         (keys.scaled(chosen.token) < least ||
          (sampling.top_p < 1.0 && !keys.within(chosen.token, sampling.top_p)))) {
    chosen = keys.largest(chosen.token);
  }
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
