#include "ops/sampling/sample_cpu.h"

#include <algorithm>
#include <bit>
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
constexpr int kRounds = 10;
constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;  // Philox's

#if defined(HADAL_ISA_avx512) || defined(HADAL_ISA_avx2)

// One 32-bit word of Philox in the lower half of every 64-bit lane; upper halves do not count,
// because products read lower halves alone.
#if defined(HADAL_ISA_avx512)
using Words = __m512i;
constexpr int kWords = 8;
HADAL_INLINE Words splat_word(uint32_t x) { return _mm512_set1_epi64(x); }
HADAL_INLINE Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
HADAL_INLINE Words upper(Words a) { return _mm512_srli_epi64(a, 32); }
HADAL_INLINE Words xor2(Words a, Words b) { return _mm512_xor_si512(a, b); }
HADAL_INLINE Words xor3(Words a, Words b, Words c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
HADAL_INLINE Words ramp(uint32_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
HADAL_INLINE Words load_words(const int32_t* p) {
  return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
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
HADAL_INLINE Words xor2(Words a, Words b) { return _mm256_xor_si256(a, b); }
HADAL_INLINE Words xor3(Words a, Words b, Words c) { return xor2(xor2(a, b), c); }
HADAL_INLINE Words ramp(uint32_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(3, 2, 1, 0));
}
HADAL_INLINE Words load_words(const int32_t* p) {
  return _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HADAL_INLINE void store_words(uint32_t* out, Words a) {
  const __m256i even = _mm256_permutevar8x32_epi32(a, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(even));
}
#endif

/// Philox::block(choice, token)[0]. What all tokens of a row have in common, half of the first two
/// rounds, is worked out once; of the last two rounds only what the first word needs.
class LeadingWords {
 public:
  explicit LeadingWords(const ReachParams& p) {
    auto key0 = static_cast<uint32_t>(p.seed), key1 = static_cast<uint32_t>(p.seed >> 32);
    uint32_t keys0[kRounds], keys1[kRounds];
    for (int round = 0; round < kRounds; ++round) {
      keys0[round] = key0;
      keys1[round] = key1;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    const uint64_t b = uint64_t{kM1} * static_cast<uint32_t>(p.stream);
    const uint32_t x0 = static_cast<uint32_t>(b >> 32) ^ p.choice ^ keys0[0];
    const uint64_t a = uint64_t{kM0} * x0;
    first_ = splat_word(static_cast<uint32_t>(p.stream >> 32) ^ keys1[0]);
    second0_ = splat_word(static_cast<uint32_t>(b) ^ keys0[1]);
    second1_ = splat_word(static_cast<uint32_t>(a >> 32) ^ keys1[1]);
    for (int round = 2; round < kRounds; ++round) {
      keys0_[round] = splat_word(keys0[round]);
      keys1_[round] = splat_word(keys1[round]);
    }
    keys1_[2] = splat_word(static_cast<uint32_t>(a) ^ keys1[2]);
  }
  HADAL_INLINE Words of(Words token) const {
    const Words m0 = splat_word(kM0), m1 = splat_word(kM1);
    const Words a0 = product(m0, token);
    const Words b1 = product(m1, xor2(upper(a0), first_));
    Words x0 = xor2(upper(b1), second0_), x1 = b1, x2 = xor2(a0, second1_), x3{};
#pragma GCC unroll 8
    for (int round = 2; round < kRounds - 1; ++round) {
      const Words a = product(m0, x0), b = product(m1, x2);
      if (round < kRounds - 2) x0 = xor3(upper(b), x1, keys0_[round]);
      x1 = b;
      x2 = round == 2 ? xor2(upper(a), keys1_[2]) : xor3(upper(a), x3, keys1_[round]);
      x3 = a;
    }
    return xor3(upper(product(m1, x2)), x1, keys0_[kRounds - 1]);
  }

 private:
  Words first_, second0_, second1_, keys0_[kRounds], keys1_[kRounds];
};

HADAL_INLINE void leading_words(const LeadingWords& words, uint32_t first, uint32_t* out) {
#pragma GCC unroll 2
  for (int64_t i = 0; i < kBlock; i += kWords)
    store_words(out + i, words.of(ramp(first + static_cast<uint32_t>(i))));
}
HADAL_INLINE void leading_words(const LeadingWords& words, const int32_t* ids, uint32_t* out) {
#pragma GCC unroll 2
  for (int64_t i = 0; i < kBlock; i += kWords) store_words(out + i, words.of(load_words(ids + i)));
}

#else

class LeadingWords {
 public:
  explicit LeadingWords(const ReachParams& p)
      : random_(p.seed, p.stream), choice_(uint64_t{p.choice} << 32) {}
  uint32_t of(uint32_t token) const { return random_.block(choice_ | token)[0]; }

 private:
  Philox random_;
  uint64_t choice_;
};

void leading_words(const LeadingWords& words, uint32_t first, uint32_t* out) {
  for (uint32_t i = 0; i < kBlock; ++i) out[i] = words.of(first + i);
}
void leading_words(const LeadingWords& words, const int32_t* ids, uint32_t* out) {
  for (int64_t i = 0; i < kBlock; ++i) out[i] = words.of(static_cast<uint32_t>(ids[i]));
}

#endif

/// Bit i: not (scaled[i] + n ln 2 < bound), n by the leading word. The exponent of the word's first
/// 24 bits is exact in FP32: 23 less its leading zeros, and -127 of none, whose noise has no limit.
#if defined(HADAL_ISA_avx512)
HADAL_INLINE uint64_t reaching16(const uint32_t* leading, F16 scaled, F16 bound) {
  const __m512i high = _mm512_srli_epi32(_mm512_loadu_si512(leading), 8);
  const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(high)), 23);
  const F16 halvings{_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(24 + 127), exponent))};
  const F16 reach = cpu::fma(cpu::splat(0.6931472f), halvings, scaled);
  return _mm512_cmp_ps_mask(reach.v, bound.v, _CMP_NLT_UQ);
}
#elif defined(HADAL_ISA_avx2)
HADAL_INLINE uint64_t reaching8(const uint32_t* leading, __m256 scaled, __m256 bound) {
  const __m256i high =
      _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(leading)), 8);
  const __m256i exponent = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(high)), 23);
  const __m256 halvings =
      _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(24 + 127), exponent));
  const __m256 reach = _mm256_fmadd_ps(_mm256_set1_ps(0.6931472f), halvings, scaled);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(reach, bound, _CMP_NLT_UQ)));
}
HADAL_INLINE uint64_t reaching16(const uint32_t* leading, F16 scaled, F16 bound) {
  return reaching8(leading, scaled.lo, bound.lo) | reaching8(leading + 8, scaled.hi, bound.hi) << 8;
}
#else
uint64_t reaching16(const uint32_t* leading, const F16& scaled, const F16& bound) {
  uint64_t bits = 0;
  for (int i = 0; i < 16; ++i) {
    const uint32_t exponent =
        std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(leading[i] >> 8))) >> 23;
    const float halvings = static_cast<float>(24 + 127 - static_cast<int32_t>(exponent));
    const float reach = scaled.v[i] + 0.6931472f * halvings;
    bits |= uint64_t{!(reach < bound.v[i])} << i;
  }
  return bits;
}
#endif

/// Up to 64 logits, the rest -infinity.
struct Block {
  explicit Block(const float* x, int64_t count) : logits(x) {
    if (count >= kBlock) return;
    std::fill(padded, padded + kBlock, -INFINITY);
    std::copy(x, x + count, padded);
    logits = padded;
  }
  float padded[kBlock];
  const float* logits;
};

void reaching(const ReachParams& p, int64_t begin, int64_t end, uint64_t* words) {
  const LeadingWords random(p);
  const F16 highest = cpu::splat(p.highest), inverse = cpu::splat(p.inverse);
  const F16 bound = cpu::splat(p.bound), floor = cpu::splat(p.floor);
  const F16 never = cpu::splat(-INFINITY);
  uint32_t leading[kBlock];
  int32_t ids[kBlock] = {};
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    const Block block(p.logits + first, count);
    if (p.ids == nullptr) {
      leading_words(random, static_cast<uint32_t>(first), leading);
    } else {
      std::copy(p.ids + first, p.ids + first + count, ids);
      leading_words(random, ids, leading);
    }
    uint64_t word = 0;
    for (int64_t i = 0; i < kBlock; i += cpu::kLanes) {
      const F16 logit = cpu::load(block.logits + i);
      const F16 scaled = cpu::if_less(logit, floor, never, (logit - highest) * inverse);
      word |= reaching16(leading + i, scaled, bound) << i;
    }
    words[(first - begin) / kBlock] = word;
  }
}

void masses(const MassParams& p, double* out) {
  const float value = p.logits[p.token];
  const F16 highest = cpu::splat(p.highest), inverse = cpu::splat(p.inverse);
  const F16 zero = cpu::splat(0.0f), one = cpu::splat(1.0f);
  out[0] = out[1] = 0;
  for (int64_t first = 0; first < p.vocab; first += kBlock) {
    const Block block(p.logits + first, p.vocab - first);
    // Of equal logits those before the token are likelier: up to there, and from there on.
    const int64_t before = std::clamp(p.token - first, int64_t{0}, kBlock);
    F16 all = zero, above = zero;
    for (int64_t i = 0; i < kBlock; i += cpu::kLanes) {
      const F16 x = cpu::load(block.logits + i);
      // max() takes its second argument where the first is NaN.
      const F16 weight = cpu::exp(cpu::max((x - highest) * inverse, cpu::splat(-INFINITY)));
      F16 likelier = before > i ? cpu::if_less(x, cpu::splat(value), zero, one)
                                : cpu::if_less(cpu::splat(value), x, one, zero);
      if (before > i && before < i + cpu::kLanes) {
        float each[cpu::kLanes];
        cpu::to_array(each, likelier);
        for (int64_t l = before - i; l < cpu::kLanes; ++l)
          each[l] = block.logits[i + l] > value ? 1.0f : 0.0f;
        likelier = cpu::load(each);
      }
      all = all + weight;
      above = cpu::fma(weight, likelier, above);
    }
    out[0] += static_cast<double>(cpu::sum(all));
    out[1] += static_cast<double>(cpu::sum(above));
  }
}

void step_masses(const MassParams& p, double* out) {
  constexpr int64_t kPiece = 8 * kBlock;  // 32 additions of a lane in FP32, then to double
  std::fill(out, out + 1 + kMassSteps, 0.0);
  const F16 highest = cpu::splat(p.highest), inverse = cpu::splat(p.inverse);
  const F16 zero = cpu::splat(0.0f);
  for (int64_t first = 0; first < p.vocab; first += kPiece) {
    const int64_t end = std::min(first + kPiece, p.vocab);
    F16 all = zero, above[kMassSteps];
    for (F16& sum : above) sum = zero;
    for (int64_t begin = first; begin < end; begin += kBlock) {
      const Block block(p.logits + begin, end - begin);
      for (int64_t i = 0; i < kBlock; i += cpu::kLanes) {
        const F16 scaled =
            cpu::max((cpu::load(block.logits + i) - highest) * inverse, cpu::splat(-INFINITY));
        const F16 weight = cpu::exp(scaled);
        all = all + weight;
#pragma GCC unroll 8
        for (int step = 0; step < kMassSteps; ++step) {
          const F16 bound = cpu::splat(-kMassStep * static_cast<float>(step + 1));
          above[step] = above[step] + cpu::if_less(scaled, bound, zero, weight);
        }
      }
    }
    out[0] += static_cast<double>(cpu::sum(all));
    for (int step = 0; step < kMassSteps; ++step)
      out[1 + step] += static_cast<double>(cpu::sum(above[step]));
  }
}

void gather(const GatherParams& p, int32_t* ids, float* values, int64_t* found) {
  int64_t count = *found, i = 0;
#if defined(HADAL_ISA_avx512)
  const __m512 floor = _mm512_set1_ps(p.floor);
  __m512i id =
      _mm512_add_epi32(_mm512_set1_epi32(p.first),
                       _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (; i + 16 <= p.count; i += 16) {
    const __m512 x = _mm512_loadu_ps(p.logits + i);
    const __mmask16 wanted = _mm512_cmp_ps_mask(x, floor, _CMP_GE_OQ);
    if (wanted != 0) {
      _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(wanted, id));
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(wanted, x));
      count += std::popcount(static_cast<uint32_t>(wanted));
    }
    id = _mm512_add_epi32(id, _mm512_set1_epi32(16));
  }
#endif
  for (; i < p.count; ++i) {
    ids[count] = p.first + static_cast<int32_t>(i);
    values[count] = p.logits[i];
    count += p.logits[i] >= p.floor ? 1 : 0;
  }
  *found = count;
}

#if defined(HADAL_ISA_avx512)
constexpr int kDoubles = 8;
#elif defined(HADAL_ISA_avx2)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif
using Doubles = double __attribute__((vector_size(8 * kDoubles)));
using Floats = float __attribute__((vector_size(4 * kDoubles)));
using Bits = uint64_t __attribute__((vector_size(8 * kDoubles)));

/// exp(x) within 1e-14 of it for x <= 0; below -708 and for NaN what exp(-708) is, 3e-308.
HADAL_INLINE Doubles exp_doubles(Doubles x) {
  constexpr double kShift = 0x1.8p52;  // brings the integer part to the last bits
  const Doubles least = Doubles{} - 708.0;
  x = x > least ? x : least;
  const Doubles shifted = x * 1.4426950408889634 + kShift;
  const Doubles n = shifted - kShift;
  Doubles r = x - n * 6.93147180369123816490e-01;  // ln 2 in two parts
  r = r - n * 1.90821492927058770002e-10;
  Doubles p = r * (1.0 / 39916800.0) + 1.0 / 3628800.0;
  for (const double c : {1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0,
                         1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
    p = p * r + c;
  const Bits power = (std::bit_cast<Bits>(shifted) + 1023) << 52;
  return p * std::bit_cast<Doubles>(power);
}

void exp_total(const float* x, int64_t n, double highest, double inverse, double* total) {
  constexpr int kSums = 16;
  Doubles sums[kSums / kDoubles] = {};
  for (int64_t first = 0; first < n; first += kBlock) {
    const Block block(x + first, n - first);
    for (int64_t i = 0; i < kBlock; i += kSums) {
#pragma GCC unroll 8
      for (int part = 0; part < kSums / kDoubles; ++part) {
        Floats logits;
        std::memcpy(&logits, block.logits + i + part * kDoubles, sizeof(logits));
        sums[part] += exp_doubles((__builtin_convertvector(logits, Doubles) - highest) * inverse);
      }
    }
  }
  double each[kSums];
  std::memcpy(each, sums, sizeof(each));
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) each[lane] += each[lane + half];
  *total = each[0];
}

void largest(const float* x, int64_t n, int64_t* place) {
  constexpr int kSums = 4;
  constexpr int64_t kPiece = kSums * cpu::kLanes, kStretch = 64 * kPiece;
  float highest = -INFINITY;
  int64_t stretch = 0;  // where the first of the largest is
  int64_t i = 0;
  for (; i + kPiece <= n;) {
    F16 most[kSums];
    for (F16& lanes : most) lanes = cpu::splat(-INFINITY);
    const int64_t begin = i, end = std::min(n, begin + kStretch);
    for (; i + kPiece <= end; i += kPiece) {
#pragma GCC unroll 4
      // max() takes its second argument where the first is NaN.
      for (int sum = 0; sum < kSums; ++sum)
        most[sum] = cpu::max(cpu::load(x + i + sum * cpu::kLanes), most[sum]);
    }
    const float found =
        cpu::max_lane(cpu::max(cpu::max(most[0], most[1]), cpu::max(most[2], most[3])));
    if (found > highest) {
      highest = found;
      stretch = begin;
    }
  }
  for (; i < n; ++i) {
    if (x[i] > highest) {
      highest = x[i];
      stretch = i;
    }
  }
  *place = -1;
  if (highest == -INFINITY) return;
  while (x[stretch] != highest) ++stretch;
  *place = stretch;
}

const bool filled =
    reaching_cpu.fill(cpu::kIsa, reaching) && masses_cpu.fill(cpu::kIsa, masses) &&
    step_masses_cpu.fill(cpu::kIsa, step_masses) && gather_cpu.fill(cpu::kIsa, gather) &&
    exp_total_cpu.fill(cpu::kIsa, exp_total) && largest_cpu.fill(cpu::kIsa, largest);

}  // namespace
}  // namespace hadal::ops
