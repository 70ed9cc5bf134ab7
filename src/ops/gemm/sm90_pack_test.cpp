// The layouts of sm90_layout.h, read back as its comment describes them.
#include "ops/gemm/sm90_pack.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::sm90 {
namespace {

std::vector<uint8_t> random_bytes(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

TEST(Sm90Pack, OperandsLieInSwizzledSlabs) {
  const int64_t rows = 13, row_bytes = 160, groups = 2;
  const std::vector<uint8_t> bytes = random_bytes(static_cast<size_t>(rows * row_bytes), 1);
  const std::vector<uint8_t> packed = pack_operand(bytes.data(), rows, row_bytes, groups);
  ASSERT_EQ(packed.size(), 2U * 2 * 8 * 128);  // two slabs of two groups
  for (int64_t row = 0; row < groups * 8; ++row) {
    for (int64_t k = 0; k < 256; ++k) {
      const int64_t group = k / 128 * groups + row / 8, piece = k % 128 / 16 ^ row % 8;
      const uint8_t found =
          packed[static_cast<size_t>((group * 8 + row % 8) * 128 + piece * 16 + k % 16)];
      const bool real = row < rows && k < row_bytes;
      EXPECT_EQ(found, real ? bytes[static_cast<size_t>(row * row_bytes + k)] : 0)
          << row << " " << k;
    }
  }
  EXPECT_THROW(pack_operand(bytes.data(), 17, 32, 2), Error);
  EXPECT_THROW(pack_operand(bytes.data(), 1, 24, 1), Error);
}

double e2m1(int code) {
  constexpr double kValues[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return (code & 8) != 0 ? -kValues[code & 7] : kValues[code & 7];
}

/// The value of one weight as the kernel decodes it out of the tiles.
double decoded(const std::vector<uint8_t>& tiles, int64_t outputs, int64_t row, int64_t k) {
  const int64_t num_tiles = (outputs + 63) / 64, r = row % 64, step = k % 128 / 32, i = k % 32;
  const uint8_t* tile = tiles.data() + (k / 128 * num_tiles + row / 64) * kFp4TileBytes;
  const int64_t q = i % 16 / 4, nibble = i / 16 * 4 + i % 4;  // of thread g * 4 + q's word
  const int64_t thread = r / 16 * 32 + r % 8 * 4 + q;
  uint32_t word = 0, scales = 0;
  std::memcpy(&word, tile + step / 2 * 2048 + thread * 16 + (step % 2 * 2 + r % 16 / 8) * 4, 4);
  std::memcpy(&scales, tile + 4096 + r * 4, 4);
  const int sign = static_cast<int>(nibble < 4 ? word >> (7 + 8 * nibble) & 1
                                               : word >> (3 + 8 * (nibble - 4)) & 1);
  const int magnitude = static_cast<int>(word >> (4 * nibble) & 7);
  const int exponent = static_cast<int>(scales >> (16 + 4 * step) & 15);
  const int base = static_cast<int>(scales & 255);
  return e2m1(magnitude | sign << 3) * std::ldexp(1.0, exponent - 8) *
         std::ldexp(1.0, base - 127 - 6);
}

TEST(Sm90Pack, Fp4TilesHoldTheValues) {
  const int64_t outputs = 70, in = 160;  // a second tile and slab, both in part
  const std::vector<uint8_t> codes = random_bytes(static_cast<size_t>(outputs * in / 2), 2);
  std::vector<uint8_t> scales = random_bytes(static_cast<size_t>(outputs * in / 32), 3);
  for (uint8_t& scale : scales) scale = static_cast<uint8_t>(120 + scale % 15);  // within 2^14
  std::vector<uint8_t> tiles(static_cast<size_t>(fp4_bytes(outputs, in)), 0xAA);
  EXPECT_EQ(pack_fp4(codes.data(), scales.data(), outputs, in, tiles.data()), 0);
  for (int64_t row = 0; row < 128; ++row) {
    for (int64_t k = 0; k < 256; ++k) {
      double expected = 0;
      if (row < outputs && k < in) {
        const int64_t at = row * in + k;
        expected = e2m1(codes[static_cast<size_t>(at / 2)] >> (at % 2 * 4) & 15) *
                   std::ldexp(1.0, scales[static_cast<size_t>(at / 32)] - 127);
      }
      ASSERT_EQ(decoded(tiles, outputs, row, k), expected) << row << " " << k;
    }
  }
}

TEST(Sm90Pack, ScalesThatSpreadTooFarAreCounted) {
  const int64_t outputs = 2, in = 128;
  const std::vector<uint8_t> codes(static_cast<size_t>(outputs * in / 2), 0x77);
  std::vector<uint8_t> scales(8, 130);
  std::vector<uint8_t> tiles(static_cast<size_t>(fp4_bytes(outputs, in)));
  scales[5] = 130 - 15;  // of the second row
  EXPECT_EQ(pack_fp4(codes.data(), scales.data(), outputs, in, tiles.data()), 1);
  scales[5] = 130 - 14;
  EXPECT_EQ(pack_fp4(codes.data(), scales.data(), outputs, in, tiles.data()), 0);
  EXPECT_EQ(decoded(tiles, outputs, 1, 32), 6 * std::ldexp(1.0, 130 - 14 - 127));
  EXPECT_THROW(pack_fp4(codes.data(), scales.data(), 1, 48, tiles.data()), Error);
}

// The place of every code, by the header's words.
TEST(Sm90Pack, WidenedTilesAreWhatTheLayoutSays) {
  const int64_t outputs = 128, in = 256, tiles = outputs / 64;
  std::vector<uint8_t> codes(static_cast<size_t>(outputs * in)), packed(codes.size());
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
  pack_widened(codes.data(), outputs, in, packed.data());
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < in; ++i) {
      const int64_t step = i % 128 / 16, k = i % 16, row = o % 64;
      const int64_t thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
      const int64_t word = step % 2 * 2 + row % 16 / 8;
      const int64_t at = (i / 128 * tiles + o / 64) * kWideTileBytes +
                         (step / 2 * 128 + thread) * 16 + word * 4 + k / 8 * 2 + k % 2;
      ASSERT_EQ(packed[static_cast<size_t>(at)], codes[static_cast<size_t>(o * in + i)]);
    }
  }
}

}  // namespace
}  // namespace hadal::ops::sm90
