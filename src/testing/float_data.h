// Random values for the tests of kernels, the same on every machine, and the count of values whose
// bits differ. Free of ATen.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

namespace hadal::testing {

inline std::vector<float> normals(size_t count, float deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(count);
  for (float& value : values) {
    float sum = 0.0f;  // twelve uniforms: the same on every machine
    for (int i = 0; i < 12; ++i) sum += static_cast<float>(random() >> 8) / 16777216.0f;
    value = deviation * (sum - 6.0f);
  }
  return values;
}

inline std::vector<uint16_t> normals_bf16(size_t count, float deviation, unsigned seed) {
  std::vector<uint16_t> result(count);
  const auto values = normals(count, deviation, seed);
  for (size_t i = 0; i < count; ++i)
    result[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(values[i]) >> 16);
  return result;
}

/// cos and sin of random angles, [rows, 32, 2].
inline std::vector<float> rotations(size_t rows, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> result;
  for (size_t i = 0; i < rows * 32; ++i) {
    const double angle = static_cast<double>(random()) * 0x1p-29;
    result.push_back(static_cast<float>(std::cos(angle)));
    result.push_back(static_cast<float>(std::sin(angle)));
  }
  return result;
}

template <typename T>
int64_t differences(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return -1;
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if constexpr (std::is_same_v<T, float>) {
      count += std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i]);
    } else if constexpr (std::is_same_v<T, double>) {
      count += std::bit_cast<uint64_t>(a[i]) != std::bit_cast<uint64_t>(b[i]);
    } else {
      count += a[i] != b[i];
    }
  }
  return count;
}

}  // namespace hadal::testing
