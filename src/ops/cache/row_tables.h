// Which row of a cache holds a position or a block, as every kernel works it out: pointers into
// the tables of a step (batch.h), on whatever device they are. Free of ATen.
#pragma once

#include <cstdint>

namespace hadal::ops {

#ifdef __CUDACC__
#define HADAL_ANY_DEVICE __host__ __device__
#else
#define HADAL_ANY_DEVICE
#endif

/// Rings addressed by position: that of a slot begins at row slot * size.
struct RingRows {
  const int32_t* slots = nullptr;  ///< [num_seqs]
  int64_t size = 1;
  HADAL_ANY_DEVICE int64_t row(int64_t seq, int64_t pos) const {
    return slots[seq] * size + pos % size;
  }
};

/// Compressed rows addressed by block number, in pages of page_blocks rows. A page number stands
/// for page_rows rows: page_blocks of them where all pages lie side by side, 1 where it is the
/// number of a first row.
struct BlockRows {
  const int32_t* slots = nullptr;  ///< [num_seqs] line of `pages`
  const int32_t* pages = nullptr;  ///< [*, stride]
  int64_t stride = 1;
  int64_t page_blocks = INT64_MAX;
  int64_t page_rows = 1;
  HADAL_ANY_DEVICE int64_t row(int64_t seq, int64_t block) const {
    return pages[slots[seq] * stride + block / page_blocks] * page_rows + block % page_blocks;
  }
};

#undef HADAL_ANY_DEVICE

}  // namespace hadal::ops
