// Products of few rows, again and again with all processors full: the same bits every time.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "ops/gemm/linear_sm90.h"
#include "testing/on_device.h"

namespace hadal::ops {
namespace {

using testing::OnDevice;

struct Shape {
  int64_t in, outputs, rows;
};

class SteadyProducts : public ::testing::TestWithParam<Shape> {};

std::vector<uint8_t> codes(int64_t count, std::mt19937& random) {
  std::vector<uint8_t> all(static_cast<size_t>(count));
  for (uint8_t& code : all) {
    do code = static_cast<uint8_t>(random());
    while ((code & 0x7f) > 0x60);
  }
  return all;
}
std::vector<float> scales(int64_t count, std::mt19937& random) {
  std::vector<float> all(static_cast<size_t>(count));
  for (float& scale : all) scale = std::ldexp(1.0f, static_cast<int>(random() % 8) - 12);
  return all;
}

TEST_P(SteadyProducts, StaysTheSame) {
  const auto [in, outputs, rows] = GetParam();
  const int64_t slabs = in / 128, groups = (rows + 7) / 8;
  std::mt19937 random(3);
  const OnDevice<uint8_t> x(codes(groups * 8 * in, random)), w(codes(outputs * in, random));
  const OnDevice<float> x_scale(scales(slabs * groups * 8, random)),
      w_scale(scales(slabs * ((outputs + 127) / 128), random)),
      y(static_cast<size_t>(rows * outputs));
  const LinearSm90Params p{.x = x.get(),
                           .w = w.get(),
                           .x_groups = groups,
                           .w_groups = outputs / 8,
                           .x_scale = x_scale.get(),
                           .w_scale = w_scale.get(),
                           .rows = rows,
                           .outputs = outputs,
                           .slabs = slabs,
                           .out = {y.get(), outputs, ElementType::kF32}};
  std::vector<float> first;
  for (int round = 0; round < 60; ++round) {
    for (int launch = 0; launch < 4; ++launch) linear_fp8_sm90(p, nullptr);
    const std::vector<float> again = y.read();
    if (first.empty()) first = again;
    ASSERT_EQ(std::memcmp(again.data(), first.data(), first.size() * sizeof(float)), 0)
        << "round " << round;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes,
                         SteadyProducts,
                         ::testing::Values(Shape{1024, 40960, 1},
                                           Shape{2048, 32768, 8},
                                           Shape{1024, 40960, 12},
                                           Shape{2048, 32768, 16},
                                           Shape{1024, 40960, 32},
                                           Shape{2048, 32768, 64},
                                           Shape{8192, 4096, 4},
                                           Shape{4096, 4096, 16}));

}  // namespace
}  // namespace hadal::ops
