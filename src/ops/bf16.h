// BF16 numbers as bits, on the host. Free of ATen.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace hadal::ops {

inline float bf16_value(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

/// To nearest, ties to even; a NaN stays one.
inline uint16_t round_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace hadal::ops
