#include "engine/sampler.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "ops/sampling/sample.h"

namespace hadal::engine {
namespace {

/// The tokens of a choice, counted once.
struct Counted final : engine_core::SamplerMemory {
  ops::TokenHistory history;
  size_t answer = 0;  ///< tokens of the answer that are counted
};

const ops::TokenHistory& history_of(const engine_core::Draw& draw,
                                    std::unique_ptr<engine_core::SamplerMemory>& memory) {
  auto* counted = dynamic_cast<Counted*>(memory.get());
  if (counted == nullptr || counted->answer > draw.answer.size()) {
    auto fresh = std::make_unique<Counted>();
    // The other penalties are for the answer alone.
    if (draw.sampling->repetition_penalty != 1.0) fresh->history.add_prompt(draw.prompt);
    counted = fresh.get();
    memory = std::move(fresh);
  }
  for (; counted->answer < draw.answer.size(); ++counted->answer)
    counted->history.add(draw.answer[counted->answer]);
  return counted->history;
}

}  // namespace

std::span<const float> ModelSampler::with_text(std::span<const float> logits) const {
  return logits.first(static_cast<size_t>(std::min(vocab_size_, std::ssize(logits))));
}

engine_core::TokenScore ModelSampler::score(std::span<const float> logits,
                                            int64_t token,
                                            int64_t top) const {
  const std::span<const float> row = with_text(logits);
  const float own = row[static_cast<size_t>(token)];
  const ops::LogSoftmax model(row);
  return {.logprob = model.of(token),
          .rank = 1 + std::ranges::count_if(row, [own](float logit) { return logit > own; }),
          .top = model.top(top)};
}

void ModelSampler::sample(std::span<const engine_core::DrawInput> inputs,
                          std::span<engine_core::Sampled> sampled) {
  std::vector<ops::DrawRow> rows;
  std::vector<std::unique_ptr<engine_core::SamplerMemory>> forgotten;  // of draws without a memory
  rows.reserve(inputs.size());
  forgotten.reserve(inputs.size());
  for (const engine_core::DrawInput& input : inputs) {
    const engine_core::Draw& draw = input.draw;
    const ops::TokenHistory* history = nullptr;
    if (ops::has_penalties(*draw.sampling))
      history = &history_of(draw, draw.memory != nullptr ? *draw.memory : forgotten.emplace_back());
    rows.push_back({.logits = with_text(input.logits),
                    .adjustment = {.sampling = *draw.sampling,
                                   .history = history,
                                   .ahead = draw.ahead,
                                   .mask = {reinterpret_cast<const uint32_t*>(draw.mask.data()),
                                            draw.mask.size()},
                                   .avoided = draw.avoided},
                    .position = draw.pos,
                    .choice = draw.choice,
                    .top_logprobs = draw.top_logprobs,
                    .sampled_logprob = draw.sampled_logprob});
  }
  std::vector<ops::Drawn> drawn(rows.size());
  ops::draw_rows(rows, drawn);
  for (size_t i = 0; i < drawn.size(); ++i) {
    sampled[i] = {.token = drawn[i].token,
                  .logprob = drawn[i].logprob,
                  .top = std::move(drawn[i].top),
                  .sampled_logprob = drawn[i].sampled_logprob};
  }
}

}  // namespace hadal::engine
