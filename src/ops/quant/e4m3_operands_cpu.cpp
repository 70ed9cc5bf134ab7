#include "ops/quant/e4m3_operands_cpu.h"

#include "ops/cpu/codes.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

constexpr float kLargest = 448.0f;
/// Of amax: results are then multiples of 2^-9 2^-117.
constexpr float kFloor = 448.0f * 0x1p-117f;
constexpr float kNan = __builtin_nanf("");

/// 2^ceil(log2(amax / 448)), amax floored. 448 is 1.75 * 2^8.
float scale_of(float amax) {
  const uint32_t bits = cpu::float_bits(amax > kFloor ? amax : kFloor);
  return cpu::bits_float(((bits >> 23) - 8u + ((bits & 0x7fffffu) > 0x600000u ? 1u : 0u)) << 23);
}

/// Scale and its reciprocal of each lane's group; NaN where the group is not finite.
struct Scales {
  F16 scale, inverse;
};
/// poison is NaN where any entry of the lane's group was not finite, else zero.
Scales lane_scales(F16 amax, F16 poison) {
  float a[16], p[16], scale[16], inverse[16];
  cpu::to_array(a, amax);
  cpu::to_array(p, poison);
  for (int i = 0; i < 16; ++i) {
    const bool finite = p[i] == 0.0f;
    scale[i] = finite ? scale_of(a[i]) : kNan;
    inverse[i] = finite ? 1.0f / scale[i] : kNan;
  }
  return {cpu::load(scale), cpu::load(inverse)};
}

F16 round_trip(F16 x, const Scales& s) {
  const F16 limit = cpu::splat(kLargest), least = cpu::splat(-kLargest);
  const F16 rounded = cpu::round_e4m3(cpu::max(least, cpu::min(limit, x * s.inverse))) * s.scale;
  // One NaN on every machine: which of two a product keeps is not said.
  return cpu::if_less(cpu::splat(0.0f), s.scale, rounded, cpu::splat(kNan));
}

template <typename T>
void typed_rows(const E4m3OperandParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.width;
    T* out = static_cast<T*>(p.out) + row * p.width;
    for (int64_t first = 0; first < p.width; first += p.group) {
      const int64_t count = p.width - first < p.group ? p.width - first : p.group;
      F16 amax = cpu::splat(0.0f), poison = cpu::splat(0.0f);
      cpu::for_lanes(count, [&](int64_t i, int64_t n) {
        const F16 value = cpu::load_n(x + first + i, n);
        amax = cpu::max(cpu::abs(value), amax);
        poison = cpu::fma(value, cpu::splat(0.0f), poison);
      });
      const Scales s = lane_scales(cpu::splat(cpu::max_lane(amax)), cpu::splat(cpu::sum(poison)));
      cpu::for_lanes(count, [&](int64_t i, int64_t n) {
        cpu::store_n(out + first + i, round_trip(cpu::load_n(x + first + i, n), s), n);
      });
    }
  }
}

template <typename T>
void column_group(const E4m3OperandParams& p, int64_t first_row, int64_t end_row, int64_t column) {
  constexpr int64_t kVectors = kE4m3Columns / cpu::kLanes;
  const int64_t columns = p.width - column < kE4m3Columns ? p.width - column : kE4m3Columns;
  const int64_t vectors = (columns + cpu::kLanes - 1) / cpu::kLanes;
  const T* x = static_cast<const T*>(p.x) + column;
  T* out = static_cast<T*>(p.out) + column;
  const auto lanes = [&](int64_t v) {
    return columns - v * cpu::kLanes < cpu::kLanes ? columns - v * cpu::kLanes
                                                   : int64_t{cpu::kLanes};
  };
  F16 amax[kVectors], poison[kVectors];
  for (F16& each : amax) each = cpu::splat(0.0f);
  for (F16& each : poison) each = cpu::splat(0.0f);
  for (int64_t row = first_row; row < end_row; ++row) {
    for (int64_t v = 0; v < vectors; ++v) {
      const F16 value = cpu::load_n(x + row * p.width + v * cpu::kLanes, lanes(v));
      amax[v] = cpu::max(cpu::abs(value), amax[v]);
      poison[v] = cpu::fma(value, cpu::splat(0.0f), poison[v]);
    }
  }
  Scales s[kVectors];
  for (int64_t v = 0; v < vectors; ++v) s[v] = lane_scales(amax[v], poison[v]);
  for (int64_t row = first_row; row < end_row; ++row) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = row * p.width + v * cpu::kLanes;
      cpu::store_n(out + at, round_trip(cpu::load_n(x + at, lanes(v)), s[v]), lanes(v));
    }
  }
}

template <typename T>
void typed_columns(const E4m3OperandParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.width + kE4m3Columns - 1) / kE4m3Columns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t* bounds = p.bounds + task / blocks;
    column_group<T>(p, bounds[0], bounds[1], task % blocks * kE4m3Columns);
  }
}

void rows(const E4m3OperandParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) return typed_rows<float>(p, begin, end);
  typed_rows<uint16_t>(p, begin, end);
}

void columns(const E4m3OperandParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) return typed_columns<float>(p, begin, end);
  typed_columns<uint16_t>(p, begin, end);
}

const bool filled_rows = e4m3_rows_cpu.fill(cpu::kIsa, rows);
const bool filled_columns = e4m3_columns_cpu.fill(cpu::kIsa, columns);

}  // namespace
}  // namespace hadal::ops
