#include "engine/sampler.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "ops/sampling/sample.h"

namespace hadal::engine {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

/// Unless nothing else could be drawn.
void avoid(std::span<float> logits, std::span<const int64_t> tokens) {
  std::vector<float> before;
  for (const int64_t token : tokens)
    before.push_back(std::exchange(logits[static_cast<size_t>(token)], kNever));
  if (std::ranges::any_of(logits, [](float logit) { return logit > kNever; })) return;
  for (size_t i = tokens.size(); i-- > 0;) logits[static_cast<size_t>(tokens[i])] = before[i];
}

/// The tokens of a choice, counted once.
struct Counted final : SamplerMemory {
  ops::TokenHistory history;
  size_t answer = 0;  ///< tokens of the answer that are counted
};

const ops::TokenHistory& history_of(const SampleInput& input,
                                    std::unique_ptr<SamplerMemory>& memory) {
  auto* counted = dynamic_cast<Counted*>(memory.get());
  if (counted == nullptr || counted->answer > input.answer.size()) {
    auto fresh = std::make_unique<Counted>();
    // The other penalties are for the answer alone.
    if (input.sampling.repetition_penalty != 1.0) fresh->history.add_prompt(input.prompt);
    counted = fresh.get();
    memory = std::move(fresh);
  }
  for (; counted->answer < input.answer.size(); ++counted->answer)
    counted->history.add(input.answer[counted->answer]);
  return counted->history;
}

}  // namespace

std::span<const float> ModelSampler::with_text(std::span<const float> logits) const {
  return logits.first(static_cast<size_t>(std::min(vocab_size_, std::ssize(logits))));
}

TokenScore ModelSampler::score(std::span<const float> logits, int64_t token, int64_t top) const {
  const std::span<const float> row = with_text(logits);
  const float own = row[static_cast<size_t>(token)];
  TokenScore score{
      .logprob = ops::log_probability(row, token),
      .rank = 1 + std::ranges::count_if(row, [own](float logit) { return logit > own; }),
      .top = {}};
  for (const auto& [other, logprob] : ops::top_log_probabilities(row, top))
    score.top.push_back({.token = other, .logprob = logprob});
  return score;
}

Sampled ModelSampler::sample(const SampleInput& input) {
  const std::span<const float> row = with_text(input.logits);
  const Sampling& sampling = input.sampling;
  Sampled result;
  if (input.mask.empty() && input.avoided.empty() && !ops::adjusts_logits(sampling)) {
    result.token = ops::sample_token(row, sampling, input.pos, input.choice);
  } else {
    std::unique_ptr<SamplerMemory> none;
    const bool penalises = sampling.repetition_penalty != 1.0 || sampling.presence_penalty != 0.0 ||
                           sampling.frequency_penalty != 0.0;
    const ops::TokenHistory empty;
    const ops::TokenHistory& history =
        penalises ? history_of(input, input.memory != nullptr ? *input.memory : none) : empty;
    std::vector<float> adjusted(row.begin(), row.end());
    const std::span<const uint32_t> mask(reinterpret_cast<const uint32_t*>(input.mask.data()),
                                         input.mask.size());
    ops::adjust_logits(adjusted, sampling, history, mask);
    avoid(adjusted, input.avoided);
    result.token = ops::sample_token(adjusted, sampling, input.pos, input.choice);
  }
  if (input.top_logprobs >= 0) {
    result.logprob = ops::log_probability(row, result.token);
    for (const auto& [token, logprob] : ops::top_log_probabilities(row, input.top_logprobs))
      result.top.push_back({.token = token, .logprob = logprob});
  }
  return result;
}

}  // namespace hadal::engine
