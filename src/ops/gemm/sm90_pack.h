// Matrices in the layouts of sm90_layout.h, made on the host. Free of ATen and CUDA.
#pragma once

#include <cstdint>
#include <vector>

namespace hadal::ops::sm90 {

/// A K-major operand of rows of `row_bytes` bytes each: padded to a multiple of 128 bytes of K and
/// to `groups` row groups (groups * 8 >= rows) with zeros.
std::vector<uint8_t> pack_operand(const uint8_t* rows,
                                  int64_t num_rows,
                                  int64_t row_bytes,
                                  int64_t groups);

/// Bytes of the FP4 tiles of a matrix [outputs, in].
int64_t fp4_bytes(int64_t outputs, int64_t in);

/// FP4 tiles of a matrix as official checkpoints store it; outputs and K are padded with zeros.
///   packed  [outputs, in / 2] the even element low
///   scales  [outputs, in / 32] E8M0; in: a multiple of 32
/// Returns the number of rows' slabs whose scales spread beyond 2^14: those are not in the tiles as
/// they are (their smaller groups are zero) and need another path.
int64_t pack_fp4(
    const uint8_t* packed, const uint8_t* scales, int64_t outputs, int64_t in, uint8_t* tiles);

/// Tiles of an E4M3 matrix [outputs, in] that is widened in the kernel; outputs: a multiple of 64,
/// in: of 128. outputs * in bytes.
void pack_widened(const uint8_t* codes, int64_t outputs, int64_t in, uint8_t* tiles);

}  // namespace hadal::ops::sm90
