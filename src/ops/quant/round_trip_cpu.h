// CPU kernel contracts of the activation round trips and the Hadamard rotation (round_trip.h,
// hadamard.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

struct RoundTripCpuParams {
  const void* x;   ///< [rows, stride]
  void* out;       ///< [rows, stride], x's dtype; may be x
  int64_t stride;  ///< channels from row to row
  int64_t dim;     ///< the first dim channels are rounded, the rest copied
  int64_t group;   ///< channels with one scale; divides dim
  ElementType dtype;
};

struct HadamardCpuParams {
  const void* x;  ///< [rows, dim]
  void* out;      ///< [rows, dim], x's dtype
  int64_t dim;    ///< power of two, at most 1024
  ElementType dtype;
};

/// Rows [begin, end).
extern CpuSlot<void(const RoundTripCpuParams&, int64_t, int64_t)> fp8_round_trip_cpu;
extern CpuSlot<void(const RoundTripCpuParams&, int64_t, int64_t)> fp4_round_trip_cpu;
extern CpuSlot<void(const HadamardCpuParams&, int64_t, int64_t)> hadamard_cpu;

}  // namespace hadal::ops
