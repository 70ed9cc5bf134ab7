#include "ops/gemm/sm90_pack.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::sm90 {

std::vector<uint8_t> pack_operand(const uint8_t* rows,
                                  int64_t num_rows,
                                  int64_t row_bytes,
                                  int64_t groups) {
  HADAL_CHECK(num_rows <= groups * kGroupRows && row_bytes % 16 == 0,
              "pack_operand: rows of a multiple of 16 bytes, not more than the groups hold; ",
              num_rows, " rows of ", row_bytes, " bytes in ", groups, " groups");
  const int64_t slabs = round_up(row_bytes, kSlabBytes) / kSlabBytes;
  std::vector<uint8_t> result(static_cast<size_t>(slabs * groups * kGroupRows * kSlabBytes));
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t k = 0; k < row_bytes; k += 16)
      std::memcpy(result.data() + operand_offset(row, k, groups), rows + row * row_bytes + k, 16);
  }
  return result;
}

int64_t fp4_bytes(int64_t outputs, int64_t in) {
  return round_up(outputs, kTileRows) / kTileRows * (round_up(in, kFp8Chain) / kFp8Chain) *
         kFp4TileBytes;
}

namespace {

/// The four E8M0 scales of a row's slab as base and exponents; false where they spread too far.
struct Exponents {
  int base = 0;
  int group[4] = {};
};

bool split_scales(const uint8_t* scales, int64_t groups, Exponents& e) {
  e.base = *std::max_element(scales, scales + groups);
  bool exact = true;
  for (int64_t i = 0; i < groups; ++i) {
    const int exponent = kFp4Unity + 6 + scales[i] - e.base;
    exact = exact && exponent >= 0;
    e.group[i] = exponent;
  }
  return exact;
}

}  // namespace

int64_t pack_fp4(
    const uint8_t* packed, const uint8_t* scales, int64_t outputs, int64_t in, uint8_t* tiles) {
  HADAL_CHECK(in % 32 == 0, "pack_fp4: in must be a multiple of 32, is ", in);
  const int64_t num_tiles = round_up(outputs, kTileRows) / kTileRows;
  std::memset(tiles, 0, static_cast<size_t>(fp4_bytes(outputs, in)));
  int64_t wide = 0;
  for (int64_t row = 0; row < outputs; ++row) {
    const int64_t r = row % kTileRows, warp = r / 16, g = r % 8, half = r % 16 / 8;
    for (int64_t first = 0; first < in; first += kFp8Chain) {
      uint8_t* tile = tiles + (first / kFp8Chain * num_tiles + row / kTileRows) * kFp4TileBytes;
      const int64_t groups = std::min(kFp8Chain, in - first) / 32;
      Exponents e;
      if (!split_scales(scales + (row * in + first) / 32, groups, e)) ++wide;
      uint32_t exponents = static_cast<uint32_t>(e.base);
      for (int64_t step = 0; step < groups; ++step) {
        if (e.group[step] < 0) continue;
        exponents |= static_cast<uint32_t>(e.group[step]) << (16 + 4 * step);
        for (int64_t q = 0; q < 4; ++q) {
          uint8_t codes[2][4];
          for (int64_t i = 0; i < 8; ++i) {
            const int64_t at = row * in + first + step * 32 + i / 4 * 16 + 4 * q + i % 4;
            codes[i / 4][i % 4] = packed[at / 2] >> (at % 2 * 4) & 15;
          }
          const uint32_t word = fp4_word(codes[0], codes[1]);
          const int64_t thread = warp * 32 + g * 4 + q;
          std::memcpy(tile + step / 2 * 2048 + thread * 16 + (step % 2 * 2 + half) * 4, &word, 4);
        }
      }
      std::memcpy(tile + 4096 + r * 4, &exponents, 4);
    }
  }
  return wide;
}

void pack_widened(const uint8_t* codes, int64_t outputs, int64_t in, uint8_t* tiles) {
  HADAL_CHECK(outputs % kTileRows == 0 && in % 128 == 0, "sm90_pack: ", outputs, " x ", in,
              " values in tiles of 64 x 128");
  for (int64_t slab = 0; slab < in / 128; ++slab) {
    for (int64_t first = 0; first < outputs; first += kTileRows) {
      for (int64_t step = 0; step < 8; ++step) {
        for (int64_t thread = 0; thread < 128; ++thread) {
          const int64_t q = thread % 4, row = first + thread / 32 * 16 + thread % 32 / 4;
          for (int64_t i = 0; i < 8; ++i) {  // two rows of four inputs
            const int64_t input = i % 4 / 2 * 8 + 2 * q + i % 2;
            tiles[((step / 2) * 128 + thread) * 16 + step % 2 * 8 + i] =
                codes[(row + i / 4 * 8) * in + slab * 128 + step * 16 + input];
          }
        }
      }
      tiles += kWideTileBytes;
    }
  }
}

}  // namespace hadal::ops::sm90
