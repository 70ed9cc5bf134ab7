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

Sampled ModelSampler::sample(const SampleInput& input) {
  const auto row = input.logits.first(
      static_cast<size_t>(std::min(vocab_size_, static_cast<int64_t>(input.logits.size()))));
  const ops::SamplingParams params = params_of(input);
  Sampled result;
  if (input.mask.empty() && !ops::adjusts_logits(params)) {
    result.token = ops::sample_token(row, params, input.pos);
  } else {
    std::unique_ptr<SamplerMemory> none;
    const bool penalises = params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 ||
                           params.frequency_penalty != 0.0;
    const ops::TokenHistory empty;
    const ops::TokenHistory& history =
        penalises ? history_of(input, input.memory != nullptr ? *input.memory : none) : empty;
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
