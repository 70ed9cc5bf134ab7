#include "engine/sampler.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "ops/sampling/sample.h"
#include "ops/sampling/sm90_draws.h"

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

ops::Adjustment adjustment_of(const engine_core::Draw& draw,
                              std::vector<std::unique_ptr<engine_core::SamplerMemory>>& forgotten) {
  const ops::TokenHistory* history = nullptr;
  if (ops::has_penalties(*draw.sampling))
    history = &history_of(draw, draw.memory != nullptr ? *draw.memory : forgotten.emplace_back());
  return {.sampling = *draw.sampling,
          .history = history,
          .ahead = draw.ahead,
          .mask = {reinterpret_cast<const uint32_t*>(draw.mask.data()), draw.mask.size()},
          .avoided = draw.avoided};
}

class LaunchedSample final : public DeviceSampler::Launched {
 public:
  LaunchedSample(ops::LaunchedDraws draws, std::vector<engine_core::Sampled*> answers)
      : draws_(std::move(draws)), answers_(std::move(answers)) {}
  void finish() override {
    std::vector<ops::Drawn> drawn = draws_.read();
    for (size_t i = 0; i < drawn.size(); ++i)
      *answers_[i] = {
          .token = drawn[i].token, .logprob = drawn[i].logprob, .top = std::move(drawn[i].top)};
  }

 private:
  ops::LaunchedDraws draws_;
  std::vector<engine_core::Sampled*> answers_;
};

}  // namespace

int64_t ModelSampler::num_with_text(int64_t row_size) const {
  return std::min(vocab_size_, row_size);
}

std::span<const float> ModelSampler::with_text(std::span<const float> logits) const {
  return logits.first(static_cast<size_t>(num_with_text(std::ssize(logits))));
}

bool ModelSampler::serves(const engine_core::Draw& draw, int64_t row_size) const {
  return ops::serves_draw_sm90({.sampling = *draw.sampling,
                                .num_avoided = std::ssize(draw.avoided),
                                .top_logprobs = draw.top_logprobs,
                                .sampled_logprob = draw.sampled_logprob,
                                .vocab = num_with_text(row_size),
                                .stride = row_size});
}

std::unique_ptr<DeviceSampler::Launched> ModelSampler::launch(const at::Tensor& logits,
                                                              std::span<const DeviceDraw> draws) {
  std::vector<ops::DeviceDrawRow> rows;
  std::vector<std::unique_ptr<engine_core::SamplerMemory>> forgotten;
  rows.reserve(draws.size());
  forgotten.reserve(draws.size());
  for (const auto& [draw, row, sampled] : draws) {
    rows.push_back({.row = row,
                    .adjustment = adjustment_of(*draw, forgotten),
                    .position = draw->pos,
                    .choice = draw->choice,
                    .top_logprobs = draw->top_logprobs});
  }
  std::vector<engine_core::Sampled*> answers;
  for (const DeviceDraw& draw : draws) answers.push_back(draw.sampled);
  return std::make_unique<LaunchedSample>(
      ops::LaunchedDraws(logits, num_with_text(logits.size(1)), rows), std::move(answers));
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
    rows.push_back({.logits = with_text(input.logits),
                    .adjustment = adjustment_of(draw, forgotten),
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
