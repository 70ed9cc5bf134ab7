#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include <gtest/gtest.h>

#include "base/hash.h"
#include "ops/sampling/sample.h"
#include "ops/sampling/sample_sm90.h"
#include "testing/sampling_data.h"

namespace hadal::ops {
namespace {

// The op has the C library's logarithms and adds masses another way: the same tokens all the same.
TEST(SampleTwin, DrawsTheTokensOfTheCpu) {
  for (const int64_t vocab : {37, 5000}) {
    const testing::SamplingWorld w(vocab, 400, static_cast<unsigned>(vocab));
    std::vector<int32_t> tokens(static_cast<size_t>(w.num_rows));
    sample_twin(w.params(tokens.data()));
    for (int64_t r = 0; r < w.num_rows; ++r) {
      const SamplingRowSm90& s = w.rows[static_cast<size_t>(r)];
      const std::vector<float> row(w.logits.begin() + r * w.stride,
                                   w.logits.begin() + r * w.stride + vocab);
      Sampling p{.temperature = s.temperature,
                 .top_p = s.top_p,
                 .seed = s.seed,
                 .top_k = s.top_k,
                 .min_p = std::isinf(s.least) ? 0.0 : std::exp(s.least),
                 .repetition_penalty = s.repetition_penalty,
                 .presence_penalty = s.presence_penalty,
                 .frequency_penalty = s.frequency_penalty};
      TokenHistory history;
      for (int32_t i = s.changes; i < s.changes + s.num_changes; ++i) {
        const LogitChangeSm90& c = w.changes[static_cast<size_t>(i)];
        p.logit_bias.emplace_back(c.token, c.bias);
        const int64_t token = c.token;
        if (c.in_answer == 0) history.add_prompt(std::span(&token, 1));
        for (int32_t n = 0; n < c.in_answer; ++n) history.add(token);
      }
      std::vector<uint32_t> mask;
      if (s.mask >= 0)
        mask.assign(w.masks.begin() + s.mask * w.mask_words,
                    w.masks.begin() + (s.mask + 1) * w.mask_words);
      const std::vector<int64_t> avoided(w.avoided.begin() + s.avoided,
                                         w.avoided.begin() + s.avoided + s.num_avoided);
      // The stream is the purpose's hash and the position, so any stream is some position's.
      const DrawRow draw{
          .logits = row,
          .adjustment = {.sampling = p, .history = &history, .mask = mask, .avoided = avoided},
          .position = static_cast<int64_t>(s.stream ^ fnv1a64("sample")),
          .choice = s.choice};
      Drawn drawn;
      draw_rows(std::span(&draw, 1), std::span(&drawn, 1));
      EXPECT_EQ(tokens[static_cast<size_t>(r)], drawn.token)
          << "row " << r << " temperature " << s.temperature << " top_p " << s.top_p << " top_k "
          << s.top_k << " least " << s.least;
    }
  }
}

TEST(LogProbsTwin, AreThoseOfTheCpu) {
  const testing::SamplingWorld w(3000, 40, 9);
  constexpr int64_t kCount = 7;
  std::vector<int32_t> picked, tokens(static_cast<size_t>(w.num_rows * kCount));
  std::vector<double> picked_logprob(static_cast<size_t>(w.num_rows)), logprobs(tokens.size()),
      log_sum_exp(picked_logprob.size());
  for (int64_t r = 0; r < w.num_rows; ++r) picked.push_back(static_cast<int32_t>(r * 71));
  log_probs_twin({w.logits.data(), picked.data(), picked_logprob.data(), tokens.data(),
                  logprobs.data(), log_sum_exp.data(), w.num_rows, w.vocab, w.stride, kCount});
  for (int64_t r = 0; r < w.num_rows; ++r) {
    const std::span<const float> row(w.logits.data() + r * w.stride, static_cast<size_t>(w.vocab));
    const LogSoftmax exact(row);
    const auto top = exact.top(kCount);
    for (size_t i = 0; i < kCount; ++i) {
      const size_t at = static_cast<size_t>(r) * kCount + i;
      EXPECT_EQ(tokens[at], top[i].token) << r;
      EXPECT_NEAR(logprobs[at], top[i].logprob, 4e-7) << r;
    }
    const size_t at = static_cast<size_t>(r);
    const float logit = row[static_cast<size_t>(picked[at])];
    if (!(logit > -INFINITY)) continue;
    EXPECT_NEAR(picked_logprob[at], exact.of(picked[at]), 4e-7) << r;
    EXPECT_NEAR(logit - log_sum_exp[at], picked_logprob[at], 1e-12) << r;
  }
}

}  // namespace
}  // namespace hadal::ops
