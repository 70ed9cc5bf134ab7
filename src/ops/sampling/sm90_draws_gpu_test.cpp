// Draws on a card against those on the CPU.
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/sampling/sm90_draws.h"
#include "testing/draw_data.h"

namespace hadal::ops {
namespace {

TEST(DrawsOnGpu, AreThoseOfTheCpu) {
  if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "no CUDA device";
  for (const auto& [vocab, rows, count] :
       {std::tuple{int64_t{300}, 9, 500}, {int64_t{8192}, 64, 64}, {int64_t{129'280}, 4, 40}}) {
    const testing::DrawWorld w(vocab, rows, count, static_cast<unsigned>(vocab));
    const auto host = w.host_rows();
    std::vector<Drawn> wanted(host.size()), found;
    draw_rows(host, wanted);
    const at::Tensor logits =
        at::tensor(w.logits, at::kFloat).reshape({w.num_rows, w.stride}).to(at::kCUDA);
    found = LaunchedDraws(logits, vocab, w.device_rows()).read();
    ASSERT_EQ(found.size(), wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
      ASSERT_EQ(found[i].token, wanted[i].token) << vocab << " " << i;
      EXPECT_NEAR(found[i].logprob, wanted[i].logprob, 4e-7) << i;
      ASSERT_EQ(found[i].top.size(), wanted[i].top.size()) << i;
      for (size_t k = 0; k < wanted[i].top.size(); ++k) {
        EXPECT_EQ(found[i].top[k].token, wanted[i].top[k].token) << i << " " << k;
        EXPECT_NEAR(found[i].top[k].logprob, wanted[i].top[k].logprob, 4e-7) << i << " " << k;
      }
    }
  }
}

}  // namespace
}  // namespace hadal::ops
