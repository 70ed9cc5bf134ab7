#include "engine/sampler.h"

#include <memory>
#include <random>
#include <vector>

#include <gtest/gtest.h>

namespace hadal::engine {
namespace {

constexpr int64_t kVocab = 200;

std::vector<float> random_row(std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> row(kVocab);
  for (float& x : row) x = normal(random);
  return row;
}

TEST(ModelSampler, WhatItRemembersChangesNoToken) {
  std::mt19937 random(5);
  ModelSampler sampler(kVocab);
  for (int round = 0; round < 40; ++round) {
    Sampling sampling;
    sampling.temperature = round % 2 == 0 ? 0.0 : 0.8;
    sampling.repetition_penalty = round % 4 < 2 ? 1.0 : 1.3;
    sampling.presence_penalty = round % 3 == 0 ? 0.0 : 0.7;
    sampling.frequency_penalty = round % 5 == 0 ? 0.0 : 0.2;
    if (round % 7 == 0) sampling.logit_bias = {{3, 2.0}};
    std::vector<int64_t> tokens;
    for (int i = 0; i < 30; ++i) tokens.push_back(static_cast<int64_t>(random() % kVocab));
    const size_t prompt_size = tokens.size();
    std::unique_ptr<engine_core::SamplerMemory> memory;
    for (int token = 0; token < 50; ++token) {
      const std::vector<float> row = random_row(random), other = random_row(random);
      const std::span<const int64_t> all = tokens;
      engine_core::Draw draw{.sampling = &sampling,
                             .choice = 1,
                             .pos = static_cast<int64_t>(tokens.size()),
                             .prompt = all.first(prompt_size),
                             .answer = all.subspan(prompt_size)};
      const auto sample = [&](const std::vector<float>& logits) {
        const engine_core::DrawInput input{.draw = draw, .logits = logits};
        engine_core::Sampled sampled;
        sampler.sample({&input, 1}, {&sampled, 1});
        return sampled.token;
      };
      const int64_t wanted = sample(row);
      draw.memory = &memory;
      // A draft from other logits comes between, or a whole answer's worth is counted at once.
      if (random() % 2 == 0) static_cast<void>(sample(other));
      if (random() % 8 == 0) memory.reset();
      ASSERT_EQ(sample(row), wanted) << "round " << round << " token " << token;
      if (draw.answer.size() > 1) {
        // The last tokens as drafts of the rest: of the same choice, which has not got them yet.
        draw.ahead = draw.answer.last(2);
        draw.answer = draw.answer.first(draw.answer.size() - 2);
        memory.reset();
        ASSERT_EQ(sample(row), wanted) << "round " << round << " token " << token;
      }
      tokens.push_back(wanted);
    }
  }
}

}  // namespace
}  // namespace hadal::engine
