#include <algorithm>
#include <vector>

#include "ops/sampling/sample_math.h"
#include "ops/sampling/sample_sm90.h"

namespace hadal::ops {
namespace {

/// Ranks of all tokens that can be chosen, likeliest first.
std::vector<uint64_t> ranks_of(const std::vector<float>& logits) {
  std::vector<uint64_t> ranks;
  for (size_t t = 0; t < logits.size(); ++t) {
    const uint64_t rank = rank_of(logits[t], static_cast<int64_t>(t));
    if (rank != 0) ranks.push_back(rank);
  }
  std::sort(ranks.rbegin(), ranks.rend());
  return ranks;
}

std::vector<float> changed_row(const SampleSm90Params& p, int64_t r) {
  const SamplingRowSm90& row = p.rows[r];
  const float* logits = p.logits + r * p.stride;
  std::vector<float> result(logits, logits + p.vocab);
  for (int32_t i = row.changes; i < row.changes + row.num_changes; ++i) {
    float& logit = result[static_cast<size_t>(p.changes[i].token)];
    logit = changed_logit(logit, p.changes[i], row);
  }
  for (int64_t t = 0; row.mask >= 0 && t < p.vocab; ++t) {
    const uint32_t* mask = p.masks + row.mask * p.mask_words;
    if (t / 32 >= p.mask_words || (mask[t / 32] >> t % 32 & 1) == 0)
      result[static_cast<size_t>(t)] = -INFINITY;
  }
  std::vector<float> without = result;
  for (int32_t i = row.avoided; i < row.avoided + row.num_avoided; ++i)
    without[static_cast<size_t>(p.avoided[i])] = -INFINITY;
  return ranks_of(without).empty() ? result : without;
}

/// The tokens that top-k, then top-p and min-p leave: the first of the ranks, by a walk from the
/// likeliest.
void restrict_ranks(std::vector<uint64_t>& ranks,
                    const std::vector<float>& logits,
                    const SamplingRowSm90& row) {
  const auto logit = [&](uint64_t rank) { return logits[static_cast<size_t>(token_of(rank))]; };
  const float highest = logit(ranks[0]), inverse = static_cast<float>(1.0 / row.temperature);
  const auto mass = [&](uint64_t rank) { return mass_of((logit(rank) - highest) * inverse); };
  if (row.top_k > 0) ranks.resize(std::min(ranks.size(), static_cast<size_t>(row.top_k)));
  uint64_t total = 0, before = 0;
  for (const uint64_t rank : ranks) total += mass(rank);
  size_t kept = 1;
  for (before = mass(ranks[0]); kept < ranks.size(); before += mass(ranks[kept++])) {
    if (scaled_logit(logit(ranks[kept]), highest, row) < row.least) break;
    if (row.top_p < 1.0 && !(static_cast<double>(before) < row.top_p * static_cast<double>(total)))
      break;
  }
  ranks.resize(kept);
}

int32_t sample_row(const SampleSm90Params& p, int64_t r) {
  const SamplingRowSm90& row = p.rows[r];
  const std::vector<float> logits = changed_row(p, r);
  std::vector<uint64_t> ranks = ranks_of(logits);
  if (ranks.empty()) return -1;
  if (row.temperature <= 0.0) return token_of(ranks[0]);
  const float highest = logits[static_cast<size_t>(token_of(ranks[0]))];
  restrict_ranks(ranks, logits, row);
  const Philox random(row.seed, row.stream);
  double best = 0.0;
  int32_t chosen = -1;
  for (const uint64_t rank : ranks) {
    const int32_t token = token_of(rank);
    const auto words =
        random.block(static_cast<uint64_t>(row.choice) << 32 | static_cast<uint32_t>(token));
    const double key =
        scaled_logit(logits[static_cast<size_t>(token)], highest, row) + gumbel(words[0], words[1]);
    if (chosen >= 0 && (key < best || (key == best && token > chosen))) continue;
    best = key;
    chosen = token;
  }
  return chosen;
}

}  // namespace

void sample_twin(const SampleSm90Params& p) {
  for (int64_t r = 0; r < p.num_rows; ++r) p.tokens[r] = sample_row(p, r);
}

void log_probs_twin(const LogProbsSm90Params& p) {
  for (int64_t r = 0; r < p.num_rows; ++r) {
    const float* row = p.logits + r * p.stride;
    const std::vector<float> logits(row, row + p.vocab);
    const std::vector<uint64_t> ranks = ranks_of(logits);
    uint64_t total = 0;
    const float highest = ranks.empty() ? -INFINITY : row[token_of(ranks[0])];
    for (const float logit : logits) total += mass_of(logit - highest);
    const double log_total = total == 0 ? -INFINITY : log_mass(total);
    const auto logprob = [&](int64_t token) {
      return static_cast<double>(row[token]) - static_cast<double>(highest) - log_total;
    };
    for (int64_t i = 0; i < p.count; ++i) {
      const bool any = i < static_cast<int64_t>(ranks.size());
      const int32_t token = any ? token_of(ranks[static_cast<size_t>(i)]) : -1;
      p.tokens[r * p.count + i] = token;
      p.logprobs[r * p.count + i] = any ? logprob(token) : -INFINITY;
    }
    if (p.picked != nullptr)
      p.picked_logprob[r] = p.picked[r] < 0 ? -INFINITY : logprob(p.picked[r]);
    if (p.log_sum_exp != nullptr) p.log_sum_exp[r] = static_cast<double>(highest) + log_total;
  }
}

}  // namespace hadal::ops
