// The packing of pack_sm90.cu on a CPU: the same items in a loop that threads share.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/check.h"
#include "base/math.h"
#include "base/parallel.h"
#include "ops/gemm/pack_sm90.h"
#include "ops/gemm/sm90_pack.h"
#include "ops/gemm/sm90_pack_items.h"

namespace hadal::ops {
namespace {

using sm90::kFp4TileBytes;
using sm90::kTileRows;

/// Returns whether all scales of the tile have an exact form.
bool pack_fp4_tile(const PackFp4Sm90Params& p, int64_t matrix, int64_t slab, int64_t tile) {
  const int64_t slabs = ceil_div(p.in, sm90::kFp8Chain), tiles = ceil_div(p.outputs, kTileRows);
  const int steps = static_cast<int>(std::min<int64_t>(4, p.in / 32 - slab * 4));
  const int rows = static_cast<int>(std::min(kTileRows, p.outputs - tile * kTileRows));
  const int64_t first = matrix * p.outputs + tile * kTileRows;  // row
  const uint8_t* codes = p.codes + first * (p.in / 2) + slab * 64;
  const uint8_t* scales = p.scales + first * (p.in / 32) + slab * 4;
  uint8_t* to = p.tiles + ((matrix * slabs + slab) * tiles + tile) * kFp4TileBytes;
  for (int entry = 0; entry < 256; ++entry) {
    uint32_t words[4];
    sm90::fp4_entry(codes, p.in / 2, rows, steps, entry, words);
    std::memcpy(to + entry * 16, words, 16);
  }
  bool exact = true;
  for (int row = 0; row < kTileRows; ++row) {
    uint32_t word = 0;
    if (row < rows)
      exact = sm90::fp4_scale_word(codes + row * (p.in / 2), scales + row * (p.in / 32), steps,
                                   &word) &&
              exact;
    std::memcpy(to + 4096 + row * 4, &word, 4);
  }
  return exact;
}

}  // namespace

void pack_fp4_twin(const PackFp4Sm90Params& p) {
  const int64_t slabs = ceil_div(p.in, sm90::kFp8Chain), tiles = ceil_div(p.outputs, kTileRows);
  std::atomic<bool> exact{true};
  parallel_for(p.matrices * slabs * tiles, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!pack_fp4_tile(p, i / tiles / slabs, i / tiles % slabs, i % tiles)) exact = false;
  });
  if (!exact) *p.inexact = 1;
}

void pack_operand_twin(const PackOperandSm90Params& p) {
  const int64_t groups = sm90::round_up(p.outputs, kTileRows) / sm90::kGroupRows;
  const int64_t pieces = ceil_div(p.row_bytes, sm90::kSlabBytes) * groups * 64;
  parallel_for(p.matrices * pieces, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = sm90::operand_source(i % pieces, groups, p.outputs, p.row_bytes);
      if (from < 0)
        std::memset(p.operand + i * 16, 0, 16);
      else
        std::memcpy(p.operand + i * 16, p.rows + i / pieces * p.outputs * p.row_bytes + from, 16);
    }
  });
}

void pack_widened_twin(const PackWidenedSm90Params& p) {
  const int64_t entries = p.outputs * p.in / 16;
  parallel_for(p.matrices * entries, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sm90::widened_entry(p.codes + i / entries * p.outputs * p.in, p.outputs, p.in, i % entries,
                          p.tiles + i * 16);
  });
}

void pack_scales_twin(const PackScalesSm90Params& p) {
  const int64_t blocks = ceil_div(p.outputs, int64_t{128}), slabs = ceil_div(p.in, int64_t{128});
  std::atomic<bool> exact{true};
  parallel_for(p.matrices * blocks * slabs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slab = i % slabs, block = i / slabs % blocks, matrix = i / slabs / blocks;
      const int64_t columns = std::min<int64_t>(128, p.in - slab * 128);
      uint8_t magnitude = 0;
      for (int64_t row = block * 128; row < std::min(p.outputs, block * 128 + 128); ++row) {
        const uint8_t* codes = p.codes + (matrix * p.outputs + row) * p.in + slab * 128;
        for (int64_t k = 0; k < columns; ++k) magnitude |= codes[k] & 0x7f;
      }
      const uint8_t scale = p.scales[i];
      const bool fits = scale >= kMinScaleByte && scale <= p.most;
      if (magnitude != 0 && !fits) exact = false;
      p.out[(matrix * slabs + slab) * blocks + block] =
          magnitude != 0 && fits ? sm90::scale_value(scale) : 1.0f;
    }
  });
  if (!exact) *p.inexact = 1;
}

}  // namespace hadal::ops
