// The CUDA kernel behind the FP8 and FP4 round trips; free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

struct RoundTripParams {
  const void* x;  ///< [rows, stride] type
  void* out;      ///< [rows, stride] type
  int64_t rows;
  int64_t stride;  ///< a multiple of 4
  int64_t dim;     ///< channels that are rounded, a multiple of group; the others are copied
  int64_t group;   ///< 32, 64 or a multiple of 128
  bool fp4;        ///< E2M1 instead of E4M3
  ElementType type;
};

extern KernelSlot<void(const RoundTripParams&, Stream)> round_trip_cuda;

}  // namespace hadal::ops
