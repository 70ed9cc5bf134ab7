// Which part of which row a block has.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace hadal::ops::cuda {

/// The row of a block where `pieces` blocks share a row, and which piece of it this one has. In one
/// dimension of the grid, since the others hold 65,535 rows at most.
struct RowPiece {
  int64_t row;
  unsigned piece;
};
__device__ __forceinline__ RowPiece row_piece(int64_t pieces) {
  return {blockIdx.x / pieces, static_cast<unsigned>(blockIdx.x % pieces)};
}

}  // namespace hadal::ops::cuda
