// One row into its packed bytes. Free of ATen: the tests of kernels pack rows, too.
#include <bit>
#include <cmath>
#include <cstring>

#include "ops/cache/kv_rows.h"

namespace hadal::ops {
namespace {

float bf16_value(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

/// The exponent k of the scale 2^k = 2^ceil(log2(amax / largest)), largest = significand * 2^shift
/// with significand in [1, 2); 0 for a group of zeros.
int scale_exponent(float amax, float significand, int shift) {
  if (amax == 0.0f) return 0;
  int exponent = 0;
  const float fraction = 2.0f * std::frexp(amax, &exponent);  // amax = fraction * 2^(exponent - 1)
  return exponent - 1 - shift + (fraction > significand ? 1 : 0);
}

/// Nearest code is not asked for: false unless |x| is an E4M3 value.
bool encode_e4m3(float x, uint8_t* code) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result = 0;
  if (magnitude >= 0x3c800000u) {                                              // 2^-6: normal
    if (magnitude > 0x43e00000u || (magnitude & 0xfffffu) != 0) return false;  // 448, 3 bits
    result = (magnitude >> 20) - (120u << 3);
  } else {
    const float steps = std::bit_cast<float>(magnitude) * 512.0f;
    result = static_cast<uint32_t>(steps);
    if (static_cast<float>(result) != steps) return false;
  }
  *code = static_cast<uint8_t>(result | (bits >> 31 << 7));
  return true;
}

constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

bool encode_e2m1(float x, uint8_t* code) {
  for (uint8_t i = 0; i < 8; ++i) {
    if (std::fabs(x) != kE2m1[i]) continue;
    *code = static_cast<uint8_t>(i | (std::signbit(x) ? 8 : 0));
    return true;
  }
  return false;
}

/// Packs groups of `size` values with `encode(scaled value, index)`; scales go to `scales`.
template <typename Encode>
bool pack_groups(const uint16_t* row,
                 int64_t count,
                 int64_t size,
                 float significand,
                 int shift,
                 uint8_t* scales,
                 Encode&& encode) {
  for (int64_t first = 0; first < count; first += size) {
    float amax = 0.0f;
    for (int64_t i = first; i < first + size; ++i)
      amax = std::fmax(amax, std::fabs(bf16_value(row[i])));
    const int exponent = scale_exponent(amax, significand, shift);
    if (!std::isfinite(amax) || exponent < -126 || exponent > 127) return false;
    scales[first / size] = static_cast<uint8_t>(exponent + 127);
    // Two steps, since 2^127 has no normal inverse.
    const float half = std::ldexp(1.0f, -exponent / 2),
                rest = std::ldexp(1.0f, -exponent - -exponent / 2);
    for (int64_t i = first; i < first + size; ++i) {
      if (!encode(bf16_value(row[i]) * half * rest, i)) return false;
    }
  }
  return true;
}

}  // namespace

bool pack_row(const uint16_t* row, const RowFormat& format, uint8_t* out) {
  std::memset(out, 0, static_cast<size_t>(format.bytes()));
  if (format.kind == RowKind::kLatent) {
    const int64_t rounded = format.width - format.rotary;
    std::memcpy(out + rounded, row + rounded, static_cast<size_t>(2 * format.rotary));
    return pack_groups(row, rounded, 64, 1.75f, 8, out + rounded + 2 * format.rotary,
                       [&](float x, int64_t i) { return encode_e4m3(x, out + i); });
  }
  return pack_groups(row, format.width, 32, 1.5f, 2, out + format.width / 2,
                     [&](float x, int64_t i) {
                       uint8_t code = 0;
                       const bool exact = encode_e2m1(x, &code);
                       out[i / 2] = static_cast<uint8_t>(out[i / 2] | code << (i % 2 * 4));
                       return exact;
                     });
}

}  // namespace hadal::ops
