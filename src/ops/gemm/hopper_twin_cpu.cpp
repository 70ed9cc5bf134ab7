#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "ops/cpu/isa.h"
#include "ops/gemm/hopper_twin.h"
#include "ops/gemm/sm90_layout.h"

// Vectors are handed between functions of this file alone, whatever the instruction set's ABI is.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace hadal::ops {
namespace {

// Lanes run along outputs, as vectors of the compiler. A product is exact in FP32; multiplied by a
// power of two and converted to an integer it is cut toward zero to the sum's unit. Integers are
// added, so no order matters.
#if defined(HADAL_ISA_avx512)
constexpr int kLanes = 16;
#elif defined(HADAL_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Floats [[gnu::vector_size(4 * kLanes)]] = float;
using Ints [[gnu::vector_size(4 * kLanes)]] = int32_t;
using Shorts [[gnu::vector_size(2 * kLanes)]] = int16_t;
using Words [[gnu::vector_size(4 * kLanes)]] = uint32_t;

template <typename Vector, typename T>
inline Vector load(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

/// 2^e for the exponent of a normal number.
inline float power(int32_t e) {
  const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline Floats powers(const Ints& e) { return reinterpret_cast<Floats>((e + 127) << 23); }

/// The exponent of zero, far below every sum of two exponents; a sum of two that is above
/// kSomething is of two numbers that are not zero.
constexpr int16_t kNothing = -4096, kSomething = -2048;

/// Where the largest exponent of a BF16 sum stops.
constexpr int32_t kLeastExponent = -133;

template <typename Vector>
inline Vector larger(const Vector& a, const Vector& b) {
  return a > b ? a : b;
}
template <typename Vector, typename T>
inline Vector at_least(const Vector& a, T least) {
  return larger(a, Vector{} + least);
}
inline Ints at_most(const Ints& a, int32_t most) { return a < most ? a : Ints{} + most; }

/// Accumulators of kLanes chains split to exponents and significands; kNothing where zero.
struct Parts {
  Ints exponent, magnitude, sign;

  explicit Parts(const Floats& chains) {
    const Ints bits = reinterpret_cast<Ints>(chains), field = bits >> 23 & 255,
               fraction = bits & 0x7fffff;
    magnitude = field != 0 ? fraction | 0x800000 : fraction;
    exponent = magnitude == 0 ? Ints{} + kNothing : at_least(field, 1) - 127;
    sign = bits >> 31;
  }
  /// Value times 2^(shift up - exponent above), cut toward zero.
  Ints cut(const Ints& largest, int up, int down) const {
    const Ints cut = (magnitude << up) >> at_most(largest - exponent + down, 31);
    return (cut ^ sign) - sign;
  }
};

/// The largest exponent of the products of `count` inputs of one row with kLanes rows of weights.
inline Shorts largest_exponents(const int16_t* x, const int16_t* w, int count) {
  Shorts largest = load<Shorts>(w) + x[0];
  for (int k = 1; k < count; ++k)
    largest = larger<Shorts>(largest, load<Shorts>(w + k * kLanes) + x[k]);
  return largest;
}

/// The sum of products of `count` inputs, in units of 1 / factor, cut toward zero.
inline Ints products(const float* x, const float* w, int count, const Floats& factor) {
  Ints sum{};
  for (int k = 0; k < count; ++k)
    sum += __builtin_convertvector(load<Floats>(w + k * kLanes) * x[k] * factor, Ints);
  return sum;
}

/// E4M3 codes as numbers and their exponents.
struct E4m3 {
  std::array<float, 256> value{};
  std::array<int16_t, 256> exponent{};

  E4m3() {
    for (int code = 0; code < 256; ++code) {
      const int field = code >> 3 & 15, fraction = code & 7;
      const int magnitude = field != 0 ? fraction | 8 : fraction, e = std::max(field, 1) - 7;
      const float v = static_cast<float>(magnitude) * power(e - 3);
      value[static_cast<size_t>(code)] = (code & 0x80) != 0 ? -v : v;
      exponent[static_cast<size_t>(code)] = magnitude == 0 ? kNothing : static_cast<int16_t>(e);
    }
  }
};

/// Rows of numbers by input, `width` side by side: [padded][width].
struct Numbers {
  std::vector<float> value;
  std::vector<int16_t> exponent;

  void clear(int64_t padded, int64_t width) {
    value.assign(static_cast<size_t>(padded * width), 0.0f);
    exponent.assign(value.size(), kNothing);
  }
};

/// Row `lane` of `width`.
void fill_e4m3(Numbers& to, const uint8_t* codes, int64_t in, int64_t lane, int64_t width) {
  static const E4m3 table;
  for (int64_t k = 0; k < in; ++k) {
    const auto at = static_cast<size_t>(k * width + lane);
    to.value[at] = table.value[codes[k]], to.exponent[at] = table.exponent[codes[k]];
  }
}

/// One k step of 32 E4M3 inputs: a sum of 13 fraction bits. Products are multiples of 2^-18 and
/// below 2^18.
inline void step_e4m3(const float* x,
                      const int16_t* x_exponent,
                      const float* w,
                      const int16_t* w_exponent,
                      Floats& chains) {
  const Parts before(chains);
  const Shorts of_products = largest_exponents(x_exponent, w_exponent, 32);
  const Ints largest =
      at_least(larger<Ints>(__builtin_convertvector(of_products, Ints), before.exponent), -64);
  // The accumulator has 23 fraction bits.
  const Ints sum = before.cut(largest, 0, 10) + products(x, w, 32, powers(13 - largest));
  // |sum| < 2^24 is exact as a float; cutting its mantissa to 13 bits cuts toward zero.
  const Ints bits = reinterpret_cast<Ints>(__builtin_convertvector(sum, Floats)) & ~0x3ff;
  chains = sum == 0 ? Floats{} : reinterpret_cast<Floats>(bits) * powers(largest - 13);
}

/// (a + b + c) * 2^unit, whose absolute value is below 2^(32 + unit), cut toward zero to an FP32
/// number.
inline Floats cut_sum(const Ints& a, const Ints& b, const Ints& c, const Ints& unit) {
  const auto words =
      reinterpret_cast<Words>(a) + reinterpret_cast<Words>(b) + reinterpret_cast<Words>(c);
  // The sum may not fit 31 bits; then FP32 knows its sign.
  const Floats rough = __builtin_convertvector(a, Floats) + __builtin_convertvector(b, Floats) +
                       __builtin_convertvector(c, Floats);
  const Ints small = (rough < 0x1p30f) & (rough > -0x1p30f);
  const Ints negative = small != 0 ? reinterpret_cast<Ints>(words) >> 31 : Ints(rough < 0.0f);
  const auto sign = reinterpret_cast<Words>(negative);
  const Words magnitude = (words ^ sign) - sign;
  // The place of the leading one, where it is above 2^8.
  const Floats high = __builtin_convertvector(reinterpret_cast<Ints>(magnitude >> 8), Floats);
  const Ints top = (reinterpret_cast<Ints>(high) >> 23) - 127 + 8;
  const Ints lost = at_least(larger<Ints>(top - 23, -149 - unit), 0);
  const Words kept = lost > 31 ? Words{} : magnitude >> reinterpret_cast<Words>(at_most(lost, 31));
  // In two steps, since the least powers of two have no normal form.
  const Ints exponent = unit + lost;
  const Floats value = __builtin_convertvector(reinterpret_cast<Ints>(kept), Floats) *
                       powers(at_least(exponent, -126)) * powers(at_most(exponent + 126, 0));
  const Words bits = reinterpret_cast<Words>(value) | (sign & 0x80000000u);
  return kept == 0 ? Floats{} : reinterpret_cast<Floats>(bits);
}

constexpr int64_t kStep = 16;
/// How far the exponents of a row's numbers in a step may lie apart, so that products of numbers
/// whose largest exponent is made zero are normal FP32 numbers.
constexpr int32_t kSpread = 50;
/// The largest exponent of a step, so that no sum is above FP32's range.
constexpr int32_t kLargest = 40;

/// BF16 rows in steps of 16 inputs, each scaled so that its largest exponent is zero.
struct Bf16Numbers : Numbers {
  std::vector<uint16_t> codes;  // [width][padded]
  std::vector<int32_t> shift;   // [steps][width] what was taken off the exponents
  std::vector<char> narrow;     // [steps] whether no row goes beyond kSpread and kLargest
  int64_t padded = 0, width = 0;

  void start(int64_t in, int64_t lanes) {
    padded = sm90::round_up(in, kStep);
    width = lanes;
    clear(padded, width);
    codes.assign(static_cast<size_t>(padded * width), 0);
    shift.assign(static_cast<size_t>(padded / kStep * width), 0);
    narrow.assign(static_cast<size_t>(padded / kStep), 1);
  }

  void fill(const uint16_t* row, int64_t in, int64_t lane) {
    uint16_t* own = codes.data() + lane * padded;
    std::copy_n(row, in, own);
    for (int64_t first = 0; first < padded; first += kStep) fill_step(own + first, first, lane);
  }

 private:
  void fill_step(const uint16_t* code, int64_t first, int64_t lane) {
    int32_t e[kStep], most = kNothing, least = -kNothing;
    for (int64_t k = 0; k < kStep; ++k) {
      const int32_t field = code[k] >> 7 & 255;
      e[k] = (code[k] & 0x7fff) == 0 ? kNothing : std::max(field, 1) - 127;
      most = std::max(most, e[k]);
      least = std::min(least, e[k] == kNothing ? -kNothing : e[k]);
    }
    if (most == kNothing) return;
    const auto step = static_cast<size_t>(first / kStep);
    if (most - least > kSpread || most > kLargest) narrow[step] = 0;
    shift[step * static_cast<size_t>(width) + static_cast<size_t>(lane)] = most;
    const float scale = power(-most);
    float* values = value.data() + first * width + lane;
    int16_t* exponents = exponent.data() + first * width + lane;
    for (int64_t k = 0; k < kStep; ++k) {
      const uint32_t bits = static_cast<uint32_t>(code[k]) << 16;
      float v;
      std::memcpy(&v, &bits, 4);
      values[k * width] = v * scale;
      exponents[k * width] = static_cast<int16_t>(e[k] == kNothing ? e[k] : e[k] - most);
    }
  }
};

/// One k step of 16 BF16 inputs from `first` on: x one row, w kLanes of them; a sum of 25 fraction
/// bits.
inline void step_bf16(const Bf16Numbers& x, const Bf16Numbers& w, int64_t first, Floats& chains) {
  const auto step = static_cast<size_t>(first / kStep);
  if (x.narrow[step] == 0 || w.narrow[step] == 0) {
    for (int64_t l = 0; l < kLanes; ++l) {
      chains[l] =
          wgmma_bf16(x.codes.data() + first, w.codes.data() + l * w.padded + first, chains[l]);
    }
    return;
  }
  const Parts before(chains);
  const Shorts scaled =
      largest_exponents(x.exponent.data() + first, w.exponent.data() + first * kLanes, kStep);
  const Ints of_products = __builtin_convertvector(scaled, Ints);
  const Ints shift = load<Ints>(w.shift.data() + step * kLanes) + x.shift[step];
  const Ints largest =
      at_least(larger<Ints>(of_products > kSomething ? of_products + shift : Ints{} + kNothing,
                            before.exponent),
               kLeastExponent);
  const Floats factor = powers(at_most(at_least<Ints>(25 - largest + shift, -126), 127));
  // A product is below 2^27 units: eight of them stay below 2^31.
  const float *x_value = x.value.data() + first, *w_value = w.value.data() + first * kLanes;
  const Ints low = products(x_value, w_value, kStep / 2, factor),
             high = products(x_value + kStep / 2, w_value + kStep / 2 * kLanes, kStep / 2, factor);
  chains = cut_sum(low, high, before.cut(largest, 2, 0), largest - 25);
}

void twin_fp8(const TwinFp8Task& t) {
  const int64_t padded = sm90::round_up(t.in, sm90::kFp8Chain), slabs = padded / sm90::kFp8Chain;
  std::vector<Numbers> x(static_cast<size_t>(t.rows));
  for (int64_t r = 0; r < t.rows; ++r) {
    x[static_cast<size_t>(r)].clear(padded, 1);
    fill_e4m3(x[static_cast<size_t>(r)], t.x + r * t.in, t.in, 0, 1);
  }
  Numbers w;
  for (int64_t o = 0; o < t.outputs; o += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, t.outputs - o);
    w.clear(padded, kLanes);
    for (int64_t lane = 0; lane < count; ++lane)
      fill_e4m3(w, t.w + (o + lane) * t.in, t.in, lane, kLanes);
    for (int64_t r = 0; r < t.rows; ++r) {
      const Numbers& row = x[static_cast<size_t>(r)];
      float y[kLanes] = {};
      for (int64_t slab = 0; slab < slabs; ++slab) {
        Floats chains{};
        for (int64_t k = slab * sm90::kFp8Chain; k < (slab + 1) * sm90::kFp8Chain; k += 32) {
          step_e4m3(row.value.data() + k, row.exponent.data() + k, w.value.data() + k * kLanes,
                    w.exponent.data() + k * kLanes, chains);
        }
        const float scale = t.x_scale[r * slabs + slab];
        for (int64_t l = 0; l < count; ++l)
          y[l] = __builtin_fmaf(chains[l], scale * t.w_scale[(o + l) * slabs + slab], y[l]);
      }
      std::copy(y, y + count, t.y + r * t.outputs + o);
    }
  }
}

void twin_bf16(const TwinBf16Task& t) {
  Bf16Numbers w;
  std::vector<Bf16Numbers> x(static_cast<size_t>(t.rows));
  for (int64_t r = 0; r < t.rows; ++r) {
    x[static_cast<size_t>(r)].start(t.in, 1);
    x[static_cast<size_t>(r)].fill(t.x + r * t.in, t.in, 0);
  }
  for (int64_t o = 0; o < t.outputs; o += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, t.outputs - o);
    w.start(t.in, kLanes);
    for (int64_t lane = 0; lane < count; ++lane) w.fill(t.w + (o + lane) * t.in, t.in, lane);
    for (int64_t r = 0; r < t.rows; ++r) {
      float y[kLanes] = {};
      for (int64_t first = 0; first < w.padded; first += sm90::kBf16Chain) {
        Floats chains{};
        if (t.from != nullptr)
          std::memcpy(&chains, t.from + r * t.outputs + o, static_cast<size_t>(4 * count));
        const int64_t end = std::min(first + sm90::kBf16Chain, w.padded);
        for (int64_t k = first; k < end; k += kStep)
          step_bf16(x[static_cast<size_t>(r)], w, k, chains);
        for (int l = 0; l < kLanes; ++l) y[l] += chains[l];
      }
      std::copy(y, y + count, t.y + r * t.outputs + o);
    }
  }
}

const bool filled_fp8 = twin_fp8_cpu.fill(cpu::HADAL_ISA::kIsa, twin_fp8);
const bool filled_bf16 = twin_bf16_cpu.fill(cpu::HADAL_ISA::kIsa, twin_bf16);

}  // namespace
}  // namespace hadal::ops
