#include "model/cost.h"

#include <cmath>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/presets.h"

namespace hadal::model {
namespace {

double round2(double x) { return std::round(x * 100) / 100; }

// The figures of model.md 16.
TEST(Cost, PublishedRatiosAtAMillionTokens) {
  const Cost old = decode_cost_v3_2(1000000);
  const Cost flash = decode_cost(deepseek_v4_flash(), 1000000);
  const Cost pro = decode_cost(deepseek_v4_pro(), 1000000);
  EXPECT_DOUBLE_EQ(round2(old.equivalent_flops() / flash.equivalent_flops()), 9.83);
  EXPECT_DOUBLE_EQ(round2(old.equivalent_flops() / pro.equivalent_flops()), 3.69);
  EXPECT_DOUBLE_EQ(round2(old.kv_bytes_per_token / flash.kv_bytes_per_token), 13.68);
  EXPECT_DOUBLE_EQ(round2(old.kv_bytes_per_token / pro.kv_bytes_per_token), 9.55);
}

TEST(Cost, ShorterContexts) {
  const struct {
    int64_t tokens;
    double old, flash, pro;
  } rows[] = {
      {4096, 150.8, 33.0, 122.7}, {32768, 179.4, 35.4, 128.1}, {131072, 277.7, 43.7, 146.6}};
  for (const auto& row : rows) {
    EXPECT_NEAR(decode_cost_v3_2(row.tokens).equivalent_flops() / 1e9, row.old, 0.15) << row.tokens;
    EXPECT_NEAR(decode_cost(deepseek_v4_flash(), row.tokens).equivalent_flops() / 1e9, row.flash,
                0.1)
        << row.tokens;
    EXPECT_NEAR(decode_cost(deepseek_v4_pro(), row.tokens).equivalent_flops() / 1e9, row.pro, 0.1)
        << row.tokens;
  }
}

TEST(Cost, RawCountsAtOneMebi) {
  EXPECT_NEAR(decode_cost_v3_2(1 << 20).raw_flops() / 1e9, 1157.7, 0.1);
  EXPECT_NEAR(decode_cost(deepseek_v4_flash(), 1 << 20).raw_flops() / 1e9, 140.4, 0.1);
  EXPECT_NEAR(decode_cost(deepseek_v4_pro(), 1 << 20).raw_flops() / 1e9, 303.3, 0.1);
}

TEST(Cost, KvBytes) {
  EXPECT_EQ(latent_bytes(deepseek_v4_flash()), 584);
  EXPECT_EQ(index_key_bytes(deepseek_v4_flash()), 68);
  const Cost flash = decode_cost(deepseek_v4_flash(), 1 << 20);
  EXPECT_DOUBLE_EQ(flash.kv_bytes_per_token, 3514.25);
  EXPECT_DOUBLE_EQ(flash.window_bytes, 43.0 * 128 * 584);
  EXPECT_NEAR(flash.state_bytes / 1e6, 12.2, 0.05);
  EXPECT_NEAR(decode_cost(deepseek_v4_pro(), 1 << 20).state_bytes / 1e6, 18.7, 0.05);
  EXPECT_DOUBLE_EQ(decode_cost_v3_2(1).kv_bytes_per_token, 48068.0);
}

TEST(Cost, EmptyContextIsAnError) {
  EXPECT_THROW(decode_cost(deepseek_v4_flash(), 0), InputError);
  EXPECT_THROW(decode_cost_v3_2(-1), InputError);
}

}  // namespace
}  // namespace hadal::model
