// What one thread does of a matrix's packing (pack_sm90.h): the kernels and their twins share it.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops/gemm/linear_cpu.h"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::sm90 {

/// Eight FP4 codes in the order of their inputs, four bits each, as a word of the tile
/// (fp4_word(), whose four codes of each half are the halves of `codes`).
HADAL_HOST_DEVICE uint32_t fp4_word_of(uint32_t codes) {
  const uint32_t signs = codes & 0x88888888u;
  const auto spread = [](uint32_t half) {  // bits 3, 7, 11, 15 to 3, 11, 19, 27
    const uint32_t bytes = (half & 0x00ffu) | (half & 0xff00u) << 8;
    return (bytes & 0x00080008u) | (bytes & 0x00800080u) << 4;
  };
  return (codes & 0x77777777u) | spread(signs & 0xffffu) << 4 | spread(signs >> 16);
}

/// Entry `entry` (0 to 255, 16 bytes) of an FP4 tile: of a tile's codes, `rows` rows that lie
/// `stride` bytes apart, of which `steps` k steps of 32 exist.
HADAL_HOST_DEVICE void fp4_entry(
    const uint8_t* codes, int64_t stride, int rows, int steps, int entry, uint32_t* words) {
  const int thread = entry % 128, q = thread % 4;
  const int row = thread / 32 * 16 + thread % 32 / 4;
  for (int i = 0; i < 4; ++i) {
    const int step = entry / 128 * 2 + i / 2, r = row + i % 2 * 8;
    words[i] = 0;
    if (r >= rows || step >= steps) continue;
    const uint8_t* at = codes + r * stride + step * 16 + 2 * q;
    const uint32_t four = static_cast<uint32_t>(at[0] | at[1] << 8);
    const uint32_t others = static_cast<uint32_t>(at[8] | at[9] << 8);
    words[i] = fp4_word_of(four | others << 16);
  }
}

/// The scales of a row's slab of `steps` groups as the tile holds them. Groups of zeros take the
/// largest scale of the others. False where they have no exact form.
HADAL_HOST_DEVICE bool fp4_scale_word(const uint8_t* codes,
                                      const uint8_t* scales,
                                      int steps,
                                      uint32_t* word) {
  bool zero[4] = {}, exact = true;
  int base = 0;
  for (int g = 0; g < steps; ++g) {
    uint32_t magnitude = 0;
    for (int i = 0; i < 16; ++i) magnitude |= codes[g * 16 + i] & 0x77u;
    zero[g] = magnitude == 0;
    if (zero[g]) continue;
    exact = exact && scales[g] >= kMinScaleByte && scales[g] <= kMaxScaleByte;
    if (scales[g] > base) base = scales[g];
  }
  if (base == 0) base = 127;
  *word = static_cast<uint32_t>(base);
  for (int g = 0; g < steps; ++g) {
    const int exponent = kMaxSpread + (zero[g] ? 0 : scales[g] - base);
    exact = exact && exponent >= 0;
    if (exponent >= 0) *word |= static_cast<uint32_t>(exponent) << (16 + 4 * g);
  }
  return exact;
}

/// Byte of a matrix's rows that piece `piece` (16 bytes, in the operand's order) comes from; -1 for
/// a piece of zeros.
HADAL_HOST_DEVICE int64_t operand_source(int64_t piece,
                                         int64_t groups,
                                         int64_t outputs,
                                         int64_t row_bytes) {
  const int64_t r = piece / 8 % kGroupRows, group = piece / 64 % groups;
  const int64_t row = group * kGroupRows + r;
  const int64_t k = piece / 64 / groups * kSlabBytes + ((piece % 8) ^ r) * 16;
  return row < outputs && k < row_bytes ? row * row_bytes + k : -1;
}

/// Entry `entry` (16 bytes) of the tiles of a matrix that is widened.
HADAL_HOST_DEVICE void widened_entry(
    const uint8_t* codes, int64_t outputs, int64_t in, int64_t entry, uint8_t* bytes) {
  const int64_t thread = entry % 128, pair = entry / 128 % 4, tiles = outputs / kTileRows;
  const int64_t tile = entry / 512 % tiles, slab = entry / 512 / tiles;
  const int64_t row = tile * kTileRows + thread / 32 * 16 + thread % 32 / 4;
  for (int i = 0; i < 16; i += 2) {
    const int64_t step = pair * 2 + i / 8, r = row + i % 8 / 4 * 8;
    const int64_t input = slab * 128 + step * 16 + i % 4 / 2 * 8 + thread % 4 * 2;
    const uint8_t* from = codes + r * in + input;
    bytes[i] = from[0];
    bytes[i + 1] = from[1];
  }
}

/// The FP32 form of an E8M0 scale between 1 and 254.
HADAL_HOST_DEVICE float scale_value(uint8_t scale) {
  const uint32_t bits = static_cast<uint32_t>(scale) << 23;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace hadal::ops::sm90
