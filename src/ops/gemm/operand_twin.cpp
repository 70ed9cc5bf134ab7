#include "ops/gemm/operand_twin.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "ops/bf16.h"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops {
namespace {

using sm90::operand_offset;

/// 2^ceil(log2(largest / 448)), the scale of Q8_128.
uint32_t scale_bits(float largest) {
  const auto r = std::bit_cast<uint32_t>(std::max(largest, 1e-4f) * (1.0f / 448.0f));
  return ((r >> 23) + ((r & 0x7fffffu) != 0 ? 1u : 0u)) << 23;
}

/// The nearest E4M3 code, ties to even, at most 448 in magnitude.
uint8_t e4m3_code(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 31 << 7, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;
  if (magnitude < 0x3c800000u) {  // below 2^-6: a multiple of 2^-9
    const float steps = std::nearbyint(std::bit_cast<float>(magnitude) * 512.0f);
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(steps));
  }
  const uint32_t rounded = (magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20;
  return static_cast<uint8_t>(sign | std::min(rounded - (120u << 3), 0x7eu));
}

/// The magnitudes of E2M1 in units of a half.
constexpr int kHalves[8] = {0, 1, 2, 3, 4, 6, 8, 12};

/// The E4M3 code of a number of units of 2^-9.
uint8_t code_of_units(int units) {
  if (units < 8) return static_cast<uint8_t>(units);
  const int top = std::bit_width(static_cast<unsigned>(units)) - 1;
  return static_cast<uint8_t>((top - 2) << 3 | (units >> (top - 3) & 7));
}

/// Word `half` of step `step` of entry `entry` of a thread, in tiles of [entries][128 threads][2
/// steps][2 halves of the rows].
uint32_t tile_word(const uint8_t* tile, int entry, int thread, int step, int half) {
  uint32_t word;
  std::memcpy(&word, tile + (((entry * 128 + thread) * 2 + step) * 2 + half) * 4, 4);
  return word;
}

}  // namespace

std::vector<uint8_t> rows_of_operand(
    const uint8_t* operand, int64_t groups, int64_t first, int64_t count, int64_t slabs) {
  std::vector<uint8_t> rows(static_cast<size_t>(count * slabs * sm90::kSlabBytes));
  uint8_t* out = rows.data();
  for (int64_t row = first; row < first + count; ++row) {
    for (int64_t k = 0; k < slabs * sm90::kSlabBytes; k += 16, out += 16)
      std::memcpy(out, operand + operand_offset(row, k, groups), 16);
  }
  return rows;
}

void quantise_row_twin(
    const uint16_t* x, int64_t in, int64_t row, uint8_t* codes, float* scales, int64_t groups) {
  for (int64_t slab = 0; slab < in / 128; ++slab) {
    float values[128] = {}, largest = 0.0f;
    for (int64_t i = 0; x != nullptr && i < 128; ++i) {
      values[i] = bf16_value(x[slab * 128 + i]);
      largest = std::fmax(largest, std::fabs(values[i]));
    }
    const uint32_t bits = scale_bits(largest);
    const auto inverse = std::bit_cast<float>((254u << 23) - bits);
    uint8_t row_codes[128];
    for (int64_t i = 0; i < 128; ++i) row_codes[i] = e4m3_code(values[i] * inverse);
    for (int64_t i = 0; i < 128; i += 16)
      std::memcpy(codes + operand_offset(row, slab * 128 + i, groups), row_codes + i, 16);
    scales[slab * groups * sm90::kGroupRows + row] = std::bit_cast<float>(bits);
  }
}

void fp4_tile_codes(
    const uint8_t* tile, uint8_t* codes, int64_t stride, float* scales, int64_t scale_stride) {
  constexpr int kSigns[8] = {7, 15, 23, 31, 3, 11, 19, 27};
  uint8_t table[15][8];  // of exponent and magnitude
  for (int exponent = 0; exponent < 15; ++exponent) {
    for (int m = 0; m < 8; ++m) table[exponent][m] = code_of_units(kHalves[m] << exponent);
  }
  for (int row = 0; row < sm90::kTileRows; ++row) {
    const uint8_t* scale = tile + 4096 + row * 4;
    const int thread = row / 16 * 32 + row % 8 * 4, half = row % 16 / 8;
    scales[row * scale_stride] = std::ldexp(1.0f, scale[0] - 127 - 6);
    for (int group = 0; group < 4; ++group) {  // of 32 inputs, which are a k step
      const int exponent = scale[2 + group / 2] >> (group % 2 * 4) & 15;
      for (int q = 0; q < 4; ++q) {
        const uint32_t word = tile_word(tile, group / 2, thread + q, group % 2, half);
        for (int i = 0; i < 8; ++i) {
          const uint32_t sign = word >> kSigns[i] & 1;
          codes[row * stride + group * 32 + i / 4 * 16 + q * 4 + i % 4] =
              static_cast<uint8_t>(sign << 7 | table[std::min(exponent, 14)][word >> (4 * i) & 7]);
        }
      }
    }
  }
}

void wide_tile_codes(const uint8_t* tile, uint8_t* codes, int64_t stride) {
  for (int row = 0; row < sm90::kTileRows; ++row) {
    const int thread = row / 16 * 32 + row % 8 * 4, half = row % 16 / 8;
    for (int step = 0; step < 8; ++step) {  // of 16 inputs
      for (int q = 0; q < 4; ++q) {
        const uint32_t word = tile_word(tile, step / 2, thread + q, step % 2, half);
        for (int i = 0; i < 4; ++i)
          codes[row * stride + step * 16 + i / 2 * 8 + q * 2 + i % 2] =
              static_cast<uint8_t>(word >> (8 * i));
      }
    }
  }
}

float e4m3_value(uint8_t code) {
  const int field = code >> 3 & 15, fraction = code & 7;
  const float magnitude = field == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                                     : std::ldexp(static_cast<float>(8 + fraction), field - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

void quantise_operand_twin(const QuantiseSm90Params& p) {
  const auto* x = static_cast<const uint16_t*>(p.x);
  for (int64_t row = 0; row < p.x_groups * sm90::kGroupRows; ++row) {
    const int64_t from = row >= p.rows ? -1 : p.source != nullptr ? p.source[row] : row;
    quantise_row_twin(from < 0 ? nullptr : x + from * p.stride, p.in, row, p.codes, p.scales,
                      p.x_groups);
  }
}

void bf16_operand_twin(const Bf16OperandSm90Params& p) {
  const auto* x = static_cast<const uint8_t*>(p.x);
  const int64_t bytes = sm90::round_up(2 * p.in, sm90::kSlabBytes);
  for (int64_t row = 0; row < p.x_groups * sm90::kGroupRows; ++row) {
    const int64_t from = row >= p.rows ? -1 : p.source != nullptr ? p.source[row] : row;
    for (int64_t k = 0; k < bytes; k += 16) {
      uint8_t* to = p.operand + operand_offset(row, k, p.x_groups);
      if (from >= 0 && k < 2 * p.in) {
        std::memcpy(to, x + from * p.stride * 2 + k, 16);
      } else {
        std::memset(to, 0, 16);
      }
    }
  }
}

void pad_groups_twin(const PadGroupsSm90Params& p) {
  std::fill(p.source, p.source + p.rows, -1);
  int32_t first_row = 0, num_runs = 0;
  for (int64_t expert = 0; expert < p.num_experts; ++expert) {
    const auto begin = static_cast<int32_t>(p.offsets[expert]),
               count = static_cast<int32_t>(p.offsets[expert + 1]) - begin;
    if (count == 0) continue;
    p.runs[num_runs++] = {static_cast<int32_t>(expert), first_row, count};
    for (int32_t i = 0; i < count; ++i) {
      p.source[first_row + i] = begin + i;
      p.place[begin + i] = first_row + i;
    }
    first_row += static_cast<int32_t>(sm90::round_up(count, sm90::kGroupRows));
  }
  *p.num_runs = num_runs;
}

}  // namespace hadal::ops
