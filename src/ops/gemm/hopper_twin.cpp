#include "ops/gemm/hopper_twin.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "ops/gemm/sm90_layout.h"

namespace hadal::ops {

constinit CpuSlot<void(const TwinFp8Task&)> twin_fp8_cpu;
constinit CpuSlot<void(const TwinBf16Task&)> twin_bf16_cpu;

namespace {

/// significand * 2^(exponent - fraction), |significand| < 2^(fraction + 1); exponent as stored, not
/// normalised.
struct Number {
  int64_t significand;
  int exponent, fraction;
};

Number decode(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int field = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int64_t fraction = bits & ((1u << fraction_bits) - 1);
  const int64_t magnitude = field != 0 ? fraction | int64_t{1} << fraction_bits : fraction;
  const bool negative = (bits >> (exponent_bits + fraction_bits) & 1) != 0;
  return {negative ? -magnitude : magnitude, (field != 0 ? field : 1) - bias, fraction_bits};
}

/// Where the largest exponent of a sum stops (found with BF16 products whose sums are subnormal;
/// E4M3 products are far above).
constexpr int kLeastExponent = -133;

/// The fused sum of `count` terms: every term cut toward zero to a multiple of 2^(E - frac), E the
/// largest exponent of a nonzero term, but at least kLeastExponent; the sum cut toward zero to
/// 1 + result bits.
float fused_sum(const Number* terms, int count, int frac, int result) {
  int largest = -100000;
  for (int i = 0; i < count; ++i) {
    if (terms[i].significand != 0) largest = std::max(largest, terms[i].exponent);
  }
  if (largest == -100000) return 0.0f;
  largest = std::max(largest, kLeastExponent);
  int64_t sum = 0;
  for (int i = 0; i < count; ++i) {
    const int shift = (largest - frac) - (terms[i].exponent - terms[i].fraction);
    const int64_t magnitude = std::abs(terms[i].significand);
    const int64_t cut = shift <= 0 ? magnitude << -shift : (shift > 62 ? 0 : magnitude >> shift);
    sum += terms[i].significand < 0 ? -cut : cut;
  }
  if (sum == 0) return 0.0f;
  uint64_t magnitude = static_cast<uint64_t>(std::abs(sum));
  int unit = largest - frac;
  const int top = static_cast<int>(std::bit_width(magnitude)) - 1 + unit;
  const int least = std::max(top, -126) - result;
  if (least > unit) {
    magnitude = least - unit > 63 ? 0 : magnitude >> (least - unit);
    unit = least;
  }
  if (magnitude == 0) return 0.0f;
  const double value = std::ldexp(static_cast<double>(magnitude), unit);
  return static_cast<float>(sum < 0 ? -value : value);
}

bool is_nan_bf16(uint16_t bits) { return (bits & 0x7fff) > 0x7f80; }
bool is_nan_e4m3(uint8_t code) { return (code & 0x7f) == 0x7f; }

}  // namespace

float wgmma_e4m3(const uint8_t* a, const uint8_t* b, float c) {
  Number terms[33];
  bool nan = std::isnan(c);
  for (int k = 0; k < 32; ++k) {
    const Number x = decode(a[k], 4, 3), y = decode(b[k], 4, 3);
    terms[k] = {x.significand * y.significand, x.exponent + y.exponent, 6};
    nan = nan || is_nan_e4m3(a[k]) || is_nan_e4m3(b[k]);
  }
  terms[32] = decode(std::bit_cast<uint32_t>(c), 8, 23);
  return nan ? std::bit_cast<float>(0x7fffffffu) : fused_sum(terms, 33, 13, 13);
}

float wgmma_bf16(const uint16_t* a, const uint16_t* b, float c) {
  Number terms[17];
  bool nan = std::isnan(c);
  for (int k = 0; k < 16; ++k) {
    const Number x = decode(a[k], 8, 7), y = decode(b[k], 8, 7);
    terms[k] = {x.significand * y.significand, x.exponent + y.exponent, 14};
    nan = nan || is_nan_bf16(a[k]) || is_nan_bf16(b[k]);
  }
  terms[16] = decode(std::bit_cast<uint32_t>(c), 8, 23);
  return nan ? std::bit_cast<float>(0x7fffffffu) : fused_sum(terms, 17, 25, 23);
}

bool fold_fp4(
    const uint8_t* packed, const uint8_t* scales, int64_t in, uint8_t* codes, float* slab_scales) {
  // E4M3 codes of the E2M1 magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 in units of 2^-9.
  constexpr int kHalves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  for (int64_t first = 0; first < in; first += sm90::kFp8Chain) {
    const int64_t groups = std::min(sm90::kFp8Chain, in - first) / 32;
    const uint8_t* s = scales + first / 32;
    const int base = *std::max_element(s, s + groups);
    if (base - *std::min_element(s, s + groups) > sm90::kMaxSpread) return false;
    slab_scales[first / sm90::kFp8Chain] = std::ldexp(1.0f, base - 127 - 6);
    for (int64_t i = 0; i < groups * 32; ++i) {
      const int64_t at = first + i;
      const int code = packed[at / 2] >> (at % 2 * 4) & 15;
      // magnitude * 2^(6 + scale - base) as a multiple of 2^-9, the least subnormal
      const int units = kHalves[code & 7] << (14 + s[i / 32] - base);
      const int top = std::bit_width(static_cast<unsigned>(units)) - 1;
      const int magnitude =
          units < 8 ? units : (top - 2) << 3 | ((top >= 3 ? units >> (top - 3) : 0) & 7);
      codes[at] = static_cast<uint8_t>((code & 8) << 4 | magnitude);
    }
  }
  return true;
}

}  // namespace hadal::ops
