// Matrices packed on a card against the twin, byte for byte.
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "base/math.h"
#include "ops/gemm/pack_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/gemm/sm90_pack.h"
#include "testing/on_device.h"

namespace hadal::ops {
namespace {

using testing::OnDevice;

std::vector<uint8_t> random_bytes(int64_t count, unsigned seed, int least = 0, int most = 255) {
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes)
    byte = static_cast<uint8_t>(
        least + static_cast<int>(random() % static_cast<unsigned>(most - least + 1)));
  return bytes;
}

struct Size {
  int64_t matrices, out, in;
};
constexpr Size kSizes[] = {{2, 64, 128}, {3, 70, 160}, {1, 200, 384}, {2, 2048, 1024}, {5, 3, 32}};

TEST(PackKernels, Fp4) {
  for (const auto& [matrices, out, in] : kSizes) {
    for (const bool exact : {true, false}) {
      std::vector<uint8_t> codes = random_bytes(matrices * out * in / 2, 1);
      // Whole groups of zeros, with scales that nothing allows.
      std::vector<uint8_t> scales =
          random_bytes(matrices * out * in / 32, 2, 120, exact ? 134 : 136);
      for (size_t group = 0; group < scales.size(); group += 7) {
        std::fill_n(codes.begin() + static_cast<std::ptrdiff_t>(group * 16), 16, 0x08);
        scales[group] = 255;
      }
      std::vector<uint8_t> wanted(static_cast<size_t>(matrices * sm90::fp4_bytes(out, in)));
      PackFp4Sm90Params p{.codes = codes.data(),
                          .scales = scales.data(),
                          .matrices = matrices,
                          .outputs = out,
                          .in = in,
                          .tiles = wanted.data(),
                          .inexact = nullptr};
      int32_t inexact = 0;
      p.inexact = &inexact;
      pack_fp4_twin(p);
      const OnDevice<uint8_t> codes_there(codes), scales_there(scales), tiles(wanted.size());
      const OnDevice<int32_t> flag(std::vector<int32_t>{0});
      p.codes = codes_there.get(), p.scales = scales_there.get(), p.tiles = tiles.get();
      p.inexact = flag.get();
      pack_fp4_sm90(p, nullptr);
      EXPECT_EQ(tiles.read(), wanted) << out << " x " << in;
      EXPECT_EQ(flag.read()[0], inexact) << out << " x " << in;
    }
  }
}

TEST(PackKernels, Operands) {
  for (const auto& [matrices, out, in] : kSizes) {
    const std::vector<uint8_t> rows = random_bytes(matrices * out * in, 3);
    const int64_t groups = sm90::round_up(out, 64) / 8;
    std::vector<uint8_t> wanted(
        static_cast<size_t>(matrices * ceil_div(in, int64_t{128}) * groups * 1024));
    PackOperandSm90Params p{.rows = rows.data(),
                            .matrices = matrices,
                            .outputs = out,
                            .row_bytes = in,
                            .operand = wanted.data()};
    pack_operand_twin(p);
    const OnDevice<uint8_t> rows_there(rows), operand(wanted.size());
    p.rows = rows_there.get(), p.operand = operand.get();
    pack_operand_sm90(p, nullptr);
    EXPECT_EQ(operand.read(), wanted) << out << " x " << in;
  }
}

TEST(PackKernels, WidenedTiles) {
  for (const auto& [matrices, out, in] : kSizes) {
    if (out % 64 != 0 || in % 128 != 0) continue;
    const std::vector<uint8_t> codes = random_bytes(matrices * out * in, 4);
    std::vector<uint8_t> wanted(codes.size());
    PackWidenedSm90Params p{.codes = codes.data(),
                            .matrices = matrices,
                            .outputs = out,
                            .in = in,
                            .tiles = wanted.data()};
    pack_widened_twin(p);
    const OnDevice<uint8_t> codes_there(codes), tiles(wanted.size());
    p.codes = codes_there.get(), p.tiles = tiles.get();
    pack_widened_sm90(p, nullptr);
    EXPECT_EQ(tiles.read(), wanted) << out << " x " << in;
  }
}

TEST(PackKernels, Scales) {
  for (const auto& [matrices, out, in] : kSizes) {
    for (const int most : {134, 187}) {
      std::vector<uint8_t> codes = random_bytes(matrices * out * in, 5);
      const int64_t count = matrices * ceil_div(out, int64_t{128}) * ceil_div(in, int64_t{128});
      const std::vector<uint8_t> scales = random_bytes(count, 6, 100, 140);
      // The first matrix is zeros of either sign.
      for (int64_t i = 0; i < out * in; ++i) codes[static_cast<size_t>(i)] &= 0x80;
      std::vector<float> wanted(static_cast<size_t>(count));
      int32_t inexact = 0;
      PackScalesSm90Params p{.codes = codes.data(),
                             .scales = scales.data(),
                             .matrices = matrices,
                             .outputs = out,
                             .in = in,
                             .most = most,
                             .out = wanted.data(),
                             .inexact = &inexact};
      pack_scales_twin(p);
      const OnDevice<uint8_t> codes_there(codes), scales_there(scales);
      const OnDevice<float> found(wanted.size());
      const OnDevice<int32_t> flag(std::vector<int32_t>{0});
      p.codes = codes_there.get(), p.scales = scales_there.get(), p.out = found.get();
      p.inexact = flag.get();
      pack_scales_sm90(p, nullptr);
      EXPECT_EQ(found.read(), wanted) << out << " x " << in;
      EXPECT_EQ(flag.read()[0], inexact) << out << " x " << in;
    }
  }
}

}  // namespace
}  // namespace hadal::ops
