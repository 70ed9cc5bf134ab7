#include "ops/quant/round_trip_cpu.h"

#include "ops/cpu/codes.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

/// 2^ceil(log2 r) for positive normal r.
float power_of_two_above(float r) {
  const uint32_t bits = cpu::float_bits(r);
  return cpu::bits_float(((bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u)) << 23);
}

/// Nearest E2M1 magnitude of 0 <= x <= 6: steps of 1/2 below 2, 1 below 4, 2 above.
F16 round_e2m1(F16 x) {
  const F16 coarse =
      cpu::if_less(x, cpu::splat(4.0f), cpu::splat(12582912.0f), cpu::splat(25165824.0f));
  return cpu::round_to_step(x, cpu::if_less(x, cpu::splat(2.0f), cpu::splat(6291456.0f), coarse));
}

template <typename T, bool kFp4>
void round_trip_rows(const RoundTripCpuParams& p, int64_t begin, int64_t end) {
  const float largest = kFp4 ? 6.0f : 448.0f;
  const float floor = kFp4 ? 6.0f * cpu::bits_float(1u << 23) : 1e-4f;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.stride;
    T* out = static_cast<T*>(p.out) + row * p.stride;
    for (int64_t first = 0; first < p.dim; first += p.group) {
      F16 highest = cpu::splat(0.0f);
      cpu::for_lanes(p.group, [&](int64_t i, int64_t n) {
        highest = cpu::max(cpu::abs(cpu::load_n(x + first + i, n)), highest);
      });
      float amax = cpu::max_lane(highest);
      amax = amax > floor ? amax : floor;
      const float scale = power_of_two_above(amax * (1.0f / largest));
      const F16 divisor = cpu::splat(scale), limit = cpu::splat(largest);
      cpu::for_lanes(p.group, [&](int64_t i, int64_t n) {
        const F16 value = cpu::load_n(x + first + i, n);
        // The second operand of min is what NaN leaves: it stays NaN.
        const F16 magnitude = cpu::min(limit, cpu::abs(value) / divisor);
        const F16 rounded = (kFp4 ? round_e2m1(magnitude) : cpu::round_e4m3(magnitude)) * divisor;
        cpu::store_n(out + first + i,
                     cpu::if_less(value, cpu::splat(0.0f), cpu::splat(0.0f) - rounded, rounded), n);
      });
    }
    if (out != x) {
      std::memcpy(out + p.dim, x + p.dim, static_cast<size_t>(p.stride - p.dim) * sizeof(T));
    }
  }
}

void fp8_rows(const RoundTripCpuParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) {
    round_trip_rows<float, false>(p, begin, end);
  } else {
    round_trip_rows<uint16_t, false>(p, begin, end);
  }
}

void fp4_rows(const RoundTripCpuParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) {
    round_trip_rows<float, true>(p, begin, end);
  } else {
    round_trip_rows<uint16_t, true>(p, begin, end);
  }
}

template <typename T>
void hadamard_row(const HadamardCpuParams& p, const T* x, T* out) {
  constexpr int64_t kMaxDim = 1024;
  float y[kMaxDim];
  cpu::for_lanes(p.dim,
                 [&](int64_t i, int64_t n) { cpu::store_n(y + i, cpu::load_n(x + i, n), n); });
  for (int64_t stride = 1; stride < p.dim; stride *= 2) {
    for (int64_t block = 0; block < p.dim; block += 2 * stride) {
      if (stride >= cpu::kLanes) {
        for (int64_t i = block; i < block + stride; i += cpu::kLanes) {
          const F16 a = cpu::load(y + i), b = cpu::load(y + i + stride);
          cpu::store(y + i, a + b);
          cpu::store(y + i + stride, a - b);
        }
      } else {
        for (int64_t i = block; i < block + stride; ++i) {
          const float a = y[i], b = y[i + stride];
          y[i] = a + b;
          y[i + stride] = a - b;
        }
      }
    }
  }
  const F16 factor =
      cpu::splat(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(p.dim))));
  cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
    cpu::store_n(out + i, cpu::load_n(y + i, n) * factor, n);
  });
}

void hadamard_rows(const HadamardCpuParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.dtype == ElementType::kF32) {
      hadamard_row(p, static_cast<const float*>(p.x) + row * p.dim,
                   static_cast<float*>(p.out) + row * p.dim);
    } else {
      hadamard_row(p, static_cast<const uint16_t*>(p.x) + row * p.dim,
                   static_cast<uint16_t*>(p.out) + row * p.dim);
    }
  }
}

const bool filled_fp8 = fp8_round_trip_cpu.fill(cpu::kIsa, fp8_rows);
const bool filled_fp4 = fp4_round_trip_cpu.fill(cpu::kIsa, fp4_rows);
const bool filled_hadamard = hadamard_cpu.fill(cpu::kIsa, hadamard_rows);

}  // namespace
}  // namespace hadal::ops
