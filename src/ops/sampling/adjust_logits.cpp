#include "ops/sampling/adjust_logits.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/check.h"
#include "ops/sampling/sample_cpu.h"

namespace hadal::ops {
namespace {

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

void avoid(std::span<float> logits, std::span<const int64_t> tokens) {
  std::vector<float> before;
  for (const int64_t token : tokens) {
    HADAL_CHECK(token >= 0 && token < std::ssize(logits), "sample: token ", token, " of ",
                logits.size());
    before.push_back(std::exchange(logits[static_cast<size_t>(token)], -INFINITY));
  }
  int64_t best = -1;
  largest_cpu(logits.data(), std::ssize(logits), &best);
  if (best >= 0) return;
  for (size_t i = tokens.size(); i-- > 0;) logits[static_cast<size_t>(tokens[i])] = before[i];
}

}  // namespace

void TokenHistory::add_prompt(std::span<const int64_t> tokens) {
  for (const int64_t token : tokens) counts_[token].in_prompt = true;
}

bool has_penalties(const Sampling& sampling) {
  return sampling.repetition_penalty != 1.0 || sampling.presence_penalty != 0.0 ||
         sampling.frequency_penalty != 0.0;
}

bool Adjustment::any() const {
  return !sampling.logit_bias.empty() || has_penalties(sampling) || !mask.empty() ||
         !avoided.empty();
}

// Each token on its own, so the order does not matter.
void penalise(std::span<float> logits,
              const Sampling& sampling,
              const TokenHistory& history,
              std::span<const int64_t> ahead) {
  const auto penalise_one = [&](int64_t token, int64_t in_answer) {
    HADAL_CHECK(token >= 0 && token < std::ssize(logits), "sample: token ", token, " of ",
                logits.size());
    float& logit = logits[static_cast<size_t>(token)];
    logit = penalised(logit, sampling, in_answer + std::ranges::count(ahead, token));
  };
  for (const auto& [token, count] : history.counts()) penalise_one(token, count.in_answer);
  for (auto token = ahead.begin(); token != ahead.end(); ++token) {
    const bool seen = std::find(ahead.begin(), token, *token) != token;
    if (!seen && !history.counts().contains(*token)) penalise_one(*token, 0);
  }
}

void adjust_logits(std::span<float> logits, const Adjustment& adjustment) {
  const Sampling& sampling = adjustment.sampling;
  HADAL_CHECK(sampling.repetition_penalty > 0.0, "sample: repetition penalty ",
              sampling.repetition_penalty, ", expected > 0");
  for (const auto& [token, bias] : sampling.logit_bias) {
    HADAL_CHECK(token >= 0 && token < std::ssize(logits), "sample: logit bias of token ", token,
                " of ", logits.size());
    float& logit = logits[static_cast<size_t>(token)];
    logit = static_cast<float>(logit + bias);
  }
  if (has_penalties(sampling)) {
    const TokenHistory none;
    penalise(logits, sampling, adjustment.history != nullptr ? *adjustment.history : none,
             adjustment.ahead);
  }
  if (!adjustment.mask.empty()) apply_mask(logits, adjustment.mask);
  if (!adjustment.avoided.empty()) avoid(logits, adjustment.avoided);
}

}  // namespace hadal::ops
