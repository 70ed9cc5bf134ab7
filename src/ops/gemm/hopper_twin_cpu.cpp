#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/cpu/isa.h"
#include "ops/gemm/hopper_twin.h"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops {
namespace {

// Lanes run along outputs. Plain loops of kLanes trips, which the compiler turns into vectors: only
// integers are added, so no order matters.
constexpr int kLanes = 16;

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

/// A value split for the integer model: exponent in units of its format; kNothing where it is zero,
/// far below every sum of two exponents.
constexpr int32_t kNothing = -4096;

/// Where the largest exponent of a BF16 sum stops.
constexpr int32_t kLeastExponent = -133;

struct Split {
  int32_t magnitude;
  int32_t sign;  ///< 0 or -1
  int32_t exponent;
};

Split split(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int field = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int32_t fraction = static_cast<int32_t>(bits & ((1u << fraction_bits) - 1));
  const int32_t magnitude = field != 0 ? fraction | 1 << fraction_bits : fraction;
  return {magnitude, (bits >> (exponent_bits + fraction_bits) & 1) != 0 ? -1 : 0,
          magnitude == 0 ? kNothing : std::max(field, 1) - bias};
}

/// kLanes rows of weights, split, by input.
struct Lanes {
  std::vector<int32_t> magnitude, sign, exponent;  // [in][kLanes]

  template <typename Code>
  void fill(const Code* w,
            int64_t rows,
            int64_t in,
            int64_t padded,
            int exponent_bits,
            int fraction_bits) {
    const auto size = static_cast<size_t>(padded * kLanes);
    magnitude.assign(size, 0);
    sign.assign(size, 0);
    exponent.assign(size, kNothing);
    for (int64_t lane = 0; lane < rows; ++lane) {
      for (int64_t k = 0; k < in; ++k) {
        const Split v = split(w[lane * in + k], exponent_bits, fraction_bits);
        const auto at = static_cast<size_t>(k * kLanes + lane);
        magnitude[at] = v.magnitude, sign[at] = v.sign, exponent[at] = v.exponent;
      }
    }
  }
};

/// Accumulators of kLanes chains, as floats and their parts.
struct Chains {
  float value[kLanes] = {};

  /// Exponents and significands of the values; kNothing where zero.
  void parts(int32_t (&exponent)[kLanes],
             int32_t (&magnitude)[kLanes],
             int32_t (&sign)[kLanes]) const {
    for (int l = 0; l < kLanes; ++l) {
      uint32_t bits;
      std::memcpy(&bits, &value[l], 4);
      const int32_t field = static_cast<int32_t>(bits >> 23 & 255);
      const int32_t fraction = static_cast<int32_t>(bits & 0x7fffff);
      magnitude[l] = field != 0 ? fraction | 0x800000 : fraction;
      exponent[l] = magnitude[l] == 0 ? kNothing : (field != 0 ? field : 1) - 127;
      sign[l] = static_cast<int32_t>(bits) >> 31;
    }
  }
};

/// Shift that leaves nothing for exponents far below.
inline int32_t capped(int32_t shift) { return shift < 31 ? shift : 31; }

/// One k step of 32 E4M3 inputs.
void step_e4m3(const Split* x, const Lanes& w, int64_t first, Chains& chains) {
  int32_t largest[kLanes], sum[kLanes], exponent[kLanes], magnitude[kLanes], sign[kLanes];
  chains.parts(exponent, magnitude, sign);
  for (int l = 0; l < kLanes; ++l) largest[l] = exponent[l];
  for (int k = 0; k < 32; ++k) {
    const int32_t* e = w.exponent.data() + (first + k) * kLanes;
    const int32_t ex = x[k].exponent;
    for (int l = 0; l < kLanes; ++l) largest[l] = std::max(largest[l], e[l] + ex);
  }
  // The accumulator has 23 fraction bits, a product 6, the sum 13.
  for (int l = 0; l < kLanes; ++l) {
    const int32_t cut = magnitude[l] >> capped(largest[l] - exponent[l] + 10);
    sum[l] = (cut ^ sign[l]) - sign[l];
  }
  for (int k = 0; k < 32; ++k) {
    const auto at = (first + k) * kLanes;
    const int32_t *e = w.exponent.data() + at, *m = w.magnitude.data() + at,
                  *s = w.sign.data() + at;
    const int32_t ex = x[k].exponent, mx = x[k].magnitude << 7, sx = x[k].sign;
    for (int l = 0; l < kLanes; ++l) {
      const int32_t cut = (m[l] * mx) >> capped(largest[l] - (e[l] + ex));
      const int32_t minus = s[l] ^ sx;
      sum[l] += (cut ^ minus) - minus;
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    // |sum| < 2^24 is exact as a float; cutting its mantissa to 13 bits cuts toward zero.
    float exact = static_cast<float>(sum[l]);
    uint32_t bits;
    std::memcpy(&bits, &exact, 4);
    bits &= ~0x3ffu;
    std::memcpy(&exact, &bits, 4);
    // Products are multiples of 2^-18 and below 2^18: the power of two is normal, and so is the
    // value.
    const int32_t power = std::max(largest[l], -64) - 13;
    chains.value[l] =
        sum[l] == 0 ? 0.0f : exact * from_bits(static_cast<uint32_t>(power + 127) << 23);
  }
}

/// 2^e for any exponent of a double.
inline double power(int32_t e) {
  const uint64_t bits = static_cast<uint64_t>(e + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

/// value cut toward zero to a multiple of 2^max(exponent, -126) - 23: an FP32 number.
inline float cut_to_float(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  const int32_t exponent = static_cast<int32_t>(bits >> 52 & 2047) - 1023;
  const int32_t lost = 29 + std::max(-126 - exponent, 0);
  bits = lost > 52 ? (bits & (uint64_t{1} << 63)) : bits & ~((uint64_t{1} << lost) - 1);
  std::memcpy(&value, &bits, 8);
  return value == 0.0 ? 0.0f : static_cast<float>(value);
}

/// One k step of 16 BF16 inputs.
void step_bf16(const Split* x, const Lanes& w, int64_t first, Chains& chains) {
  int32_t largest[kLanes], low[kLanes] = {}, high[kLanes] = {};
  int32_t exponent[kLanes], magnitude[kLanes], sign[kLanes];
  chains.parts(exponent, magnitude, sign);
  for (int l = 0; l < kLanes; ++l) largest[l] = exponent[l];
  for (int k = 0; k < 16; ++k) {
    const int32_t* e = w.exponent.data() + (first + k) * kLanes;
    const int32_t ex = x[k].exponent;
    for (int l = 0; l < kLanes; ++l) largest[l] = std::max(largest[l], e[l] + ex);
  }
  for (int l = 0; l < kLanes; ++l) largest[l] = std::max(largest[l], kLeastExponent);
  // A product has 14 fraction bits, the sum 25: eight products stay below 2^31.
  for (int k = 0; k < 16; ++k) {
    const auto at = (first + k) * kLanes;
    const int32_t *e = w.exponent.data() + at, *m = w.magnitude.data() + at,
                  *s = w.sign.data() + at;
    const int32_t ex = x[k].exponent, mx = x[k].magnitude, sx = x[k].sign;
    int32_t* sum = k < 8 ? low : high;
    for (int l = 0; l < kLanes; ++l) {
      const int32_t cut = ((m[l] * mx) << 11) >> capped(largest[l] - (e[l] + ex));
      const int32_t minus = s[l] ^ sx;
      sum[l] += (cut ^ minus) - minus;
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    const int32_t cut = (magnitude[l] << 2) >> capped(largest[l] - exponent[l]);
    const int64_t sum = static_cast<int64_t>(low[l]) + high[l] + ((cut ^ sign[l]) - sign[l]);
    chains.value[l] =
        sum == 0 ? 0.0f : cut_to_float(static_cast<double>(sum) * power(largest[l] - 25));
  }
}

template <typename Code>
std::vector<Split> split_rows(
    const Code* x, int64_t rows, int64_t in, int64_t padded, int exponent_bits, int fraction_bits) {
  std::vector<Split> result(static_cast<size_t>(rows * padded), Split{0, 0, kNothing});
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < in; ++k)
      result[static_cast<size_t>(r * padded + k)] =
          split(x[r * in + k], exponent_bits, fraction_bits);
  }
  return result;
}

void twin_fp8(const TwinFp8Task& t) {
  const int64_t padded = sm90::round_up(t.in, sm90::kFp8Chain), slabs = padded / sm90::kFp8Chain;
  const std::vector<Split> x = split_rows(t.x, t.rows, t.in, padded, 4, 3);
  Lanes w;
  for (int64_t o = 0; o < t.outputs; o += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, t.outputs - o);
    w.fill(t.w + o * t.in, count, t.in, padded, 4, 3);
    for (int64_t r = 0; r < t.rows; ++r) {
      float y[kLanes] = {};
      for (int64_t slab = 0; slab < slabs; ++slab) {
        Chains chains;
        for (int64_t k = slab * sm90::kFp8Chain; k < (slab + 1) * sm90::kFp8Chain; k += 32)
          step_e4m3(x.data() + r * padded + k, w, k, chains);
        const float scale = t.x_scale[r * slabs + slab];
        for (int64_t l = 0; l < count; ++l)
          y[l] = __builtin_fmaf(chains.value[l], scale * t.w_scale[(o + l) * slabs + slab], y[l]);
      }
      std::copy(y, y + count, t.y + r * t.outputs + o);
    }
  }
}

void twin_bf16(const TwinBf16Task& t) {
  const int64_t padded = sm90::round_up(t.in, 16);
  const std::vector<Split> x = split_rows(t.x, t.rows, t.in, padded, 8, 7);
  Lanes w;
  for (int64_t o = 0; o < t.outputs; o += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, t.outputs - o);
    w.fill(t.w + o * t.in, count, t.in, padded, 8, 7);
    for (int64_t r = 0; r < t.rows; ++r) {
      float y[kLanes] = {};
      for (int64_t first = 0; first < padded; first += sm90::kBf16Chain) {
        Chains chains;
        if (t.from != nullptr)
          std::copy_n(t.from + r * t.outputs + o, count, chains.value);
        const int64_t end = std::min(first + sm90::kBf16Chain, padded);
        for (int64_t k = first; k < end; k += 16)
          step_bf16(x.data() + r * padded + k, w, k, chains);
        for (int l = 0; l < kLanes; ++l) y[l] += chains.value[l];
      }
      std::copy(y, y + count, t.y + r * t.outputs + o);
    }
  }
}

const bool filled_fp8 = twin_fp8_cpu.fill(cpu::HADAL_ISA::kIsa, twin_fp8);
const bool filled_bf16 = twin_bf16_cpu.fill(cpu::HADAL_ISA::kIsa, twin_bf16);

}  // namespace
}  // namespace hadal::ops
