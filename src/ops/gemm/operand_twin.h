// Operands of the Hopper products on a CPU: the twins of what makes and reads them. Free of ATen.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/gemm/linear_sm90.h"

namespace hadal::ops {

/// Rows [first, first + count) of a K-major operand of `groups` row groups, one behind the other:
/// [count, slabs * 128] bytes.
std::vector<uint8_t> rows_of_operand(
    const uint8_t* operand, int64_t groups, int64_t first, int64_t count, int64_t slabs);

/// One row x [in] BF16 by Q8_128 to row `row` of an operand and of scales [in / 128, 8 * groups];
/// null: zeros. in: a multiple of 128.
void quantise_row_twin(
    const uint16_t* x, int64_t in, int64_t row, uint8_t* codes, float* scales, int64_t groups);

/// FP4 weights of one tile (sm90_layout.h), folded: codes [64, 128] E4M3, row r at codes + r *
/// stride, and a power of two for each row, at scales + r * scale_stride.
void fp4_tile_codes(
    const uint8_t* tile, uint8_t* codes, int64_t stride, float* scales, int64_t scale_stride);

/// E4M3 codes [64, 128] of a tile of weights that are widened, row r at codes + r * stride.
void wide_tile_codes(const uint8_t* tile, uint8_t* codes, int64_t stride);

/// The value of an E4M3 code.
float e4m3_value(uint8_t code);

}  // namespace hadal::ops
