// The sampler on a card against its twin.
#include <cmath>
#include <vector>

#include "ops/sampling/sample_sm90.h"
#include "testing/on_device.h"
#include "testing/sampling_data.h"

namespace hadal::ops {
namespace {

using testing::differences;
using testing::OnDevice;
using testing::SamplingWorld;

struct Size {
  int64_t vocab, rows;
};

class SampleSm90 : public ::testing::TestWithParam<Size> {};

TEST_P(SampleSm90, DrawsTheTwinsTokens) {
  const SamplingWorld w(GetParam().vocab, GetParam().rows, 1);
  std::vector<int32_t> tokens(static_cast<size_t>(w.num_rows));
  sample_twin(w.params(tokens.data()));
  const OnDevice<float> logits(w.logits);
  const OnDevice<SamplingRowSm90> rows(w.rows);
  const OnDevice<LogitChangeSm90> changes(w.changes);
  const OnDevice<uint32_t> masks(w.masks);
  const OnDevice<int32_t> avoided(w.avoided), found(tokens.size());
  sample_sm90({logits.get(), rows.get(), changes.get(), masks.get(), avoided.get(), found.get(),
               w.num_rows, w.vocab, w.stride, w.mask_words},
              nullptr);
  const auto there = found.read();
  for (size_t r = 0; r < tokens.size(); ++r) {
    const SamplingRowSm90& s = w.rows[r];
    EXPECT_EQ(there[r], tokens[r])
        << "row " << r << " temperature " << s.temperature << " top_p " << s.top_p << " top_k "
        << s.top_k << " least " << s.least << " mask " << s.mask;
  }
}

TEST_P(SampleSm90, LogProbabilitiesAreTheTwins) {
  const SamplingWorld w(GetParam().vocab, GetParam().rows, 2);
  constexpr int64_t kCount = 5;
  const auto n = static_cast<size_t>(w.num_rows);
  std::vector<int32_t> picked, tokens(n * kCount);
  for (size_t r = 0; r < n; ++r)
    picked.push_back(r % 4 == 3 ? -1
                                : static_cast<int32_t>(r * 977 % static_cast<size_t>(w.vocab)));
  std::vector<double> picked_logprob(n), logprobs(n * kCount), log_sum_exp(n);
  log_probs_twin({w.logits.data(), picked.data(), picked_logprob.data(), tokens.data(),
                  logprobs.data(), log_sum_exp.data(), w.num_rows, w.vocab, w.stride, kCount});
  const OnDevice<float> logits(w.logits);
  const OnDevice<int32_t> picked_there(picked), tokens_there(tokens.size());
  const OnDevice<double> picked_logprob_there(n), logprobs_there(n * kCount), log_sum_exp_there(n);
  log_probs_sm90(
      {logits.get(), picked_there.get(), picked_logprob_there.get(), tokens_there.get(),
       logprobs_there.get(), log_sum_exp_there.get(), w.num_rows, w.vocab, w.stride, kCount},
      nullptr);
  EXPECT_EQ(differences(tokens_there.read(), tokens), 0);
  const auto same = [](std::vector<double> found, std::vector<double> expected) {
    for (std::vector<double>* values : {&found, &expected}) {
      for (double& v : *values) v = std::isnan(v) ? NAN : v;  // a NaN's bits are not told
    }
    return differences(found, expected);
  };
  EXPECT_EQ(same(logprobs_there.read(), logprobs), 0);
  EXPECT_EQ(same(picked_logprob_there.read(), picked_logprob), 0);
  EXPECT_EQ(same(log_sum_exp_there.read(), log_sum_exp), 0);
}

INSTANTIATE_TEST_SUITE_P(
    Sizes,
    SampleSm90,
    ::testing::Values(Size{5, 40}, Size{1000, 500}, Size{32768, 100}, Size{129280, 150}));

}  // namespace
}  // namespace hadal::ops
