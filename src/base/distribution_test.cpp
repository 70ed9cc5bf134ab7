#include "base/distribution.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/percentiles.h"
#include "base/philox.h"

namespace hadal {
namespace {

std::vector<double> draws(const std::string& text, uint64_t count) {
  const LengthDistribution distribution = LengthDistribution::parse(text, "--length");
  const Philox random(1, 2);
  std::vector<double> values;
  for (uint64_t i = 0; i < count; ++i)
    values.push_back(static_cast<double>(distribution.draw(random.block(i))));
  return values;
}

TEST(LengthDistribution, DrawsWhatItIsTold) {
  for (const double value : draws("17", 50)) EXPECT_EQ(value, 17);
  for (const double value : draws("fixed:17", 50)) EXPECT_EQ(value, 17);

  std::vector<double> uniform = draws("3:6", 4000);
  for (const double value : {3, 4, 5, 6}) {
    const auto count = std::count(uniform.begin(), uniform.end(), value);
    EXPECT_NEAR(static_cast<double>(count), 1000, 120) << value;
  }
  EXPECT_EQ(uniform, draws("uniform:3:6", 4000));

  // Quantiles of the logarithm: the median, and one sigma at 84.13 %.
  const Percentiles lognormal(draws("lognormal:1000:0.5", 20000));
  EXPECT_NEAR(std::log(lognormal.at(50) / 1000), 0, 0.02);
  EXPECT_NEAR(std::log(lognormal.at(84.134) / 1000), 0.5, 0.02);
  EXPECT_NEAR(std::log(lognormal.at(15.866) / 1000), -0.5, 0.02);
  EXPECT_GE(Percentiles(draws("lognormal:1:10", 1000)).at(0), 1);
}

TEST(LengthDistribution, RefusesWhatItDoesNotUnderstand) {
  for (const char* text : {"", "0", "x", "1.5", "6:3", "1:2:3", "normal:1:2", "lognormal:10",
                           "lognormal:0:1", "lognormal:5:-1", "3:", ":3", "nan", "1e99", "17 "})
    EXPECT_THROW(LengthDistribution::parse(text, "--length"), InputError) << text;
  try {
    LengthDistribution::parse("6:3", "--length");
  } catch (const InputError& error) {
    EXPECT_TRUE(std::string(error.what()).starts_with("--length: expected")) << error.what();
  }
}

TEST(Percentiles, AreNearestRanks) {
  std::vector<double> values;
  for (int i = 100; i >= 1; --i) values.push_back(i);
  const Percentiles hundred(values);
  EXPECT_EQ(hundred.at(0), 1);
  EXPECT_EQ(hundred.at(50), 50);
  EXPECT_EQ(hundred.at(99), 99);
  EXPECT_EQ(hundred.at(99.1), 100);
  EXPECT_EQ(hundred.max(), 100);
  EXPECT_EQ(hundred.mean(), 50.5);
  const Percentiles one({7});
  EXPECT_EQ(one.at(1), 7);
  EXPECT_EQ(one.at(50), 7);
  EXPECT_TRUE(std::isnan(Percentiles().at(50)));
  EXPECT_TRUE(std::isnan(Percentiles().mean()));
}

}  // namespace
}  // namespace hadal
