#include "engine/sampler.h"

#include <algorithm>
#include <vector>

#include "ops/sampling/sample.h"

namespace hadal::engine {
namespace {

ops::SamplingParams params_of(const SampleInput& input) {
  const Sampling& s = input.sampling;
  return {.temperature = s.temperature,
          .top_p = s.top_p,
          .seed = s.seed,
          .choice = static_cast<uint32_t>(input.choice),
          .top_k = s.top_k,
          .min_p = s.min_p,
          .repetition_penalty = s.repetition_penalty,
          .presence_penalty = s.presence_penalty,
          .frequency_penalty = s.frequency_penalty,
          .logit_bias = s.logit_bias};
}

}  // namespace

Sampled ModelSampler::sample(const SampleInput& input) {
  const auto row = input.logits.first(
      static_cast<size_t>(std::min(vocab_size_, static_cast<int64_t>(input.logits.size()))));
  const ops::SamplingParams params = params_of(input);
  Sampled result;
  if (input.mask.empty() && !ops::adjusts_logits(params)) {
    result.token = ops::sample_token(row, params, input.pos);
  } else {
    ops::TokenHistory history;
    if (ops::adjusts_logits(params)) {
      history.add_prompt(input.prompt);
      for (const int64_t token : input.answer) history.add(token);
    }
    std::vector<float> adjusted(row.begin(), row.end());
    const std::span<const uint32_t> mask(reinterpret_cast<const uint32_t*>(input.mask.data()),
                                         input.mask.size());
    ops::adjust_logits(adjusted, params, history, mask);
    result.token = ops::sample_token(adjusted, params, input.pos);
  }
  if (input.top_logprobs >= 0) {
    result.logprob = ops::log_probability(row, result.token);
    for (const auto& [token, logprob] : ops::top_log_probabilities(row, input.top_logprobs))
      result.top.push_back({.token = token, .logprob = logprob});
  }
  return result;
}

}  // namespace hadal::engine
