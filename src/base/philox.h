// Counter-based random numbers (Philox4x32-10): a draw depends on its key and counter alone, so
// that a run can be resumed, reordered or split without changing a number.
#pragma once

#include <array>
#include <cstdint>

namespace hadal {

class Philox {
 public:
  /// `seed` is the 64-bit key, `stream` the upper half of the counter (purpose, request, step ...).
  constexpr Philox(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}

  /// Four independent uniform 32-bit words for each counter.
  constexpr std::array<uint32_t, 4> block(uint64_t counter) const {
    std::array<uint32_t, 4> x = {
        static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
        static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)};
    auto key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
      x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0, static_cast<uint32_t>(b),
           static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1, static_cast<uint32_t>(a)};
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    return x;
  }

  /// Uniform in [0, 1) with 53 bits.
  constexpr double uniform(uint64_t counter) const {
    const std::array<uint32_t, 4> x = block(counter);
    return static_cast<double>((uint64_t{x[0]} << 21) | (x[1] >> 11)) * 0x1p-53;
  }

 private:
  uint64_t seed_, stream_;
};

}  // namespace hadal
