// Random operands of matrix products, the same on every machine, and digests of results. Free of
// ATen: tests that run on a card use them, too.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace hadal::testing {

/// What the values look like: all codes alike; half zeros; mostly subnormal; one sign.
enum class Data { kWide, kSparse, kSmall, kPositive };

inline std::vector<uint8_t> random_codes(size_t count, Data data, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> codes(count);
  for (uint8_t& code : codes) {
    code = static_cast<uint8_t>(random());
    if ((code & 0x7f) == 0x7f) code ^= 1;
    if (data == Data::kSparse && random() % 2 != 0) code = 0;
    if (data == Data::kSmall) code &= 0x8f;
    if (data == Data::kPositive) code &= 0x7f;
  }
  return codes;
}

inline std::vector<float> random_powers(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> powers(count);
  for (float& power : powers) power = std::ldexp(1.0f, static_cast<int>(random() % 13) - 6);
  return powers;
}

inline std::vector<uint16_t> random_bf16(size_t count, Data data, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) {
    const auto exponent = static_cast<unsigned>(
        data == Data::kWide ? 107 + random() % 40
                            : (data == Data::kSmall ? random() % 70 : 120 + random() % 8));
    value = static_cast<uint16_t>((random() & 0x807f) | exponent << 7);
    if (data == Data::kSparse && random() % 2 != 0) value = 0;
    if (data == Data::kPositive) value &= 0x7fff;
  }
  return values;
}

/// FNV-1a over the bits of FP32 values.
inline uint64_t digest(const std::vector<float>& values) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const float value : values) {
    const auto bits = std::bit_cast<uint32_t>(value);
    for (int i = 0; i < 4; ++i) hash = (hash ^ (bits >> (8 * i) & 255)) * 0x100000001b3u;
  }
  return hash;
}

/// A product whose result a card computed once: seeds 1 (x), 2 (w), 3 (scales of x), 4 (scales of
/// w).
struct GoldenProduct {
  int64_t rows, outputs, in;
  Data data;
  uint64_t fp8, bf16;  ///< digests of y [rows, outputs]
};
inline constexpr GoldenProduct kGoldenProducts[] = {
    {9, 72, 1184, Data::kWide, 0x6db36643f2c54a50u, 0xe4d17df78d61082fu},
    {9, 72, 1184, Data::kSparse, 0xbb73af08bdf45b02u, 0x7fdab5b71131fedcu},
    {9, 72, 1184, Data::kSmall, 0x5c84af67d460eca5u, 0x103b610bbd36cc9fu},
    {9, 72, 1184, Data::kPositive, 0x67889eee896a9ff1u, 0x00a580d48c408bb1u},
};

}  // namespace hadal::testing
