// CPU kernel contracts of the operands of E4M3 products in training (e4m3_operands.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

/// Columns of one task of e4m3_columns_cpu.
inline constexpr int64_t kE4m3Columns = 64;

struct E4m3OperandParams {
  const void* x;  ///< [rows, width]
  void* out;      ///< [rows, width], x's dtype; not x
  int64_t width;
  int64_t group;          ///< along a row: channels with one scale, the last group may be short
  const int64_t* bounds;  ///< along columns: group i is rows [bounds[i], bounds[i + 1])
  ElementType dtype;
};

/// Rows [begin, end), groups along each.
extern CpuSlot<void(const E4m3OperandParams&, int64_t, int64_t)> e4m3_rows_cpu;
/// Tasks [begin, end): task i is group i / n of rows and the (i % n)-th kE4m3Columns columns of n.
extern CpuSlot<void(const E4m3OperandParams&, int64_t, int64_t)> e4m3_columns_cpu;

}  // namespace hadal::ops
