#include "ops/sampling/sample_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/philox.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

constexpr int64_t kBlock = 64;

#if defined(HADAL_ISA_avx512) || defined(HADAL_ISA_avx2)

// One 32-bit word of Philox in the lower half of every 64-bit lane; upper halves do not count,
// because products read lower halves alone.
#if defined(HADAL_ISA_avx512)
using Words = __m512i;
constexpr int kWords = 8;
HADAL_INLINE Words splat_word(uint32_t x) { return _mm512_set1_epi64(x); }
HADAL_INLINE Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
HADAL_INLINE Words upper(Words a) { return _mm512_srli_epi64(a, 32); }
HADAL_INLINE Words xor3(Words a, Words b, Words c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
HADAL_INLINE Words ramp(uint32_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
HADAL_INLINE void store_words(uint32_t* out, Words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(a));
}
#else
using Words = __m256i;
constexpr int kWords = 4;
HADAL_INLINE Words splat_word(uint32_t x) { return _mm256_set1_epi64x(x); }
HADAL_INLINE Words product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
HADAL_INLINE Words upper(Words a) { return _mm256_srli_epi64(a, 32); }
HADAL_INLINE Words xor3(Words a, Words b, Words c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
HADAL_INLINE Words ramp(uint32_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(3, 2, 1, 0));
}
HADAL_INLINE void store_words(uint32_t* out, Words a) {
  const __m256i even = _mm256_permutevar8x32_epi32(a, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(even));
}
#endif

/// Philox::block(choice, token)[0] of kBlock tokens from `first`.
HADAL_INLINE void leading_words(const ReachParams& p, uint32_t first, uint32_t* out) {
  const Words m0 = splat_word(0xD2511F53u), m1 = splat_word(0xCD9E8D57u);
  for (int64_t i = 0; i < kBlock; i += kWords) {
    Words x0 = ramp(first + static_cast<uint32_t>(i)), x1 = splat_word(p.choice);
    Words x2 = splat_word(static_cast<uint32_t>(p.stream));
    Words x3 = splat_word(static_cast<uint32_t>(p.stream >> 32));
    auto key0 = static_cast<uint32_t>(p.seed), key1 = static_cast<uint32_t>(p.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Words a = product(m0, x0), b = product(m1, x2);
      x0 = xor3(upper(b), x1, splat_word(key0));
      x1 = b;
      x2 = xor3(upper(a), x3, splat_word(key1));
      x3 = a;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    store_words(out + i, x0);
  }
}

#else

HADAL_INLINE void leading_words(const ReachParams& p, uint32_t first, uint32_t* out) {
  const Philox random(p.seed, p.stream);
  for (uint32_t i = 0; i < kBlock; ++i) {
    out[i] = random.block((uint64_t{p.choice} << 32) | (first + i))[0];
  }
}

#endif

void reaching(const ReachParams& p, int64_t begin, int64_t end, uint64_t* words) {
  uint32_t leading[kBlock];
  float scaled[kBlock];
  uint8_t may[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    for (int64_t i = 0; i < kBlock; ++i) scaled[i] = -INFINITY;
    for (int64_t i = 0; i < count; ++i) {
      const float x = p.logits[first + i];
      scaled[i] = x < p.floor ? -INFINITY : (x - p.highest) * p.inverse;
    }
    leading_words(p, static_cast<uint32_t>(first), leading);
    for (int64_t i = 0; i < kBlock; ++i) {
      // The exponent of the first 24 bits, exact in FP32: 23 less its leading zeros.
      const auto high = static_cast<float>(static_cast<int32_t>(leading[i] >> 8));
      uint32_t bits;
      std::memcpy(&bits, &high, 4);
      const int32_t halvings = 24 + 127 - static_cast<int32_t>(bits >> 23);
      const float reach = scaled[i] + 0.6931472f * static_cast<float>(halvings);
      may[i] = static_cast<uint8_t>(!(reach < p.bound) | (leading[i] == 0));
    }
    uint64_t word = 0;
    for (int64_t i = 0; i < count; ++i) word |= uint64_t{may[i]} << i;
    words[(first - begin) / kBlock] = word;
  }
}

void masses(const MassParams& p, double* out) {
  const float value = p.logits[p.token];
  out[0] = out[1] = 0;
  float scaled[kBlock], likelier[kBlock];
  for (int64_t first = 0; first < p.vocab; first += kBlock) {
    const int64_t count = std::min(kBlock, p.vocab - first);
    for (int64_t i = 0; i < kBlock; ++i) {
      scaled[i] = -INFINITY;
      likelier[i] = 0;
    }
    for (int64_t i = 0; i < count; ++i) {
      const float x = p.logits[first + i];
      scaled[i] = x <= p.highest ? (x - p.highest) * p.inverse : -INFINITY;
      likelier[i] = x > value || (x == value && first + i < p.token) ? 1.0f : 0.0f;
    }
    F16 all = cpu::splat(0.0f), above = cpu::splat(0.0f);
    for (int64_t i = 0; i < kBlock; i += cpu::kLanes) {
      const F16 weight = cpu::exp(cpu::load(scaled + i));
      all = all + weight;
      above = cpu::fma(weight, cpu::load(likelier + i), above);
    }
    out[0] += static_cast<double>(cpu::sum(all));
    out[1] += static_cast<double>(cpu::sum(above));
  }
}

void largest(const float* x, int64_t n, int64_t* place) {
  float lanes[cpu::kLanes];
  for (float& lane : lanes) lane = -INFINITY;
  int64_t i = 0;
  for (; i + cpu::kLanes <= n; i += cpu::kLanes) {
    for (int64_t l = 0; l < cpu::kLanes; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
  }
  float highest = -INFINITY;
  for (const float lane : lanes) highest = lane > highest ? lane : highest;
  for (; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
  *place = -1;
  if (highest == -INFINITY) return;
  for (i = 0; x[i] != highest; ++i) {
  }
  *place = i;
}

const bool filled = reaching_cpu.fill(cpu::kIsa, reaching) && masses_cpu.fill(cpu::kIsa, masses) &&
                    largest_cpu.fill(cpu::kIsa, largest);

}  // namespace
}  // namespace hadal::ops
