// The kernel has the bits of the CPU's, rounded to BF16.
#include <vector>

#include "base/parallel.h"
#include "ops/bf16.h"
#include "ops/compressor/compress_cpu.h"
#include "ops/compressor/compress_sm90.h"

namespace hadal::ops {
namespace {

/// The candidates of one block in fold order, as the CPU's kernel takes them.
struct Candidates {
  std::vector<float> sums;  ///< scores of the step's own positions
  std::vector<const float*> kv, score;

  Candidates(const CompressSm90Params& p, int64_t block) {
    const CompressorRowsSm90& rows = p.rows;
    const int64_t overlap = rows.ratio == 4 ? 2 : 1, width = overlap * rows.d;
    const int64_t seq = p.block_seq[block], first_row = rows.first_row[seq],
                  start = rows.pos[first_row];
    sums.reserve(static_cast<size_t>(overlap * rows.ratio * rows.d));  // addresses stay
    for (int64_t j = 0; j < overlap * rows.ratio; ++j) {
      const int64_t pos = p.block_pos[block] - (overlap - 1) * rows.ratio + j;
      const int64_t column = overlap == 2 && j >= rows.ratio ? rows.d : 0;
      if (pos < 0) {
        kv.push_back(nullptr);
        score.push_back(nullptr);
      } else if (pos < start) {
        const int64_t at = rows.ring.row(seq, pos) * width + column;
        kv.push_back(rows.kv_ring + at);
        score.push_back(rows.score_ring + at);
      } else {
        const int64_t at = (first_row + pos - start) * rows.stride + column;
        kv.push_back(rows.kv + at);
        score.push_back(sums.data() + sums.size());
        const float* ape = rows.ape + pos % rows.ratio * width + column;
        for (int64_t i = 0; i < rows.d; ++i) sums.push_back(rows.gate[at + i] + ape[i]);
      }
    }
  }
};

}  // namespace

void compress_twin(const CompressSm90Params& p) {
  const int64_t d = p.rows.d;
  parallel_for(p.blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> pooled(static_cast<size_t>(d));
    for (int64_t block = begin; block < end; ++block) {
      if (p.block_seq[block] < 0) continue;
      const Candidates candidates(p, block);
      compress_cpu({.kv = candidates.kv.data(),
                    .score = candidates.score.data(),
                    .pooled = pooled.data(),
                    .candidates = static_cast<int64_t>(candidates.kv.size()),
                    .d = d},
                   0, 1);
      for (int64_t i = 0; i < d; ++i)
        p.pooled[block * d + i] = round_bf16(pooled[static_cast<size_t>(i)]);
    }
  });
}

void keep_rows_twin(const KeepRowsSm90Params& p) {
  const CompressorRowsSm90& rows = p.rows;
  const int64_t width = (rows.ratio == 4 ? 2 : 1) * rows.d;
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.from[i] < 0) continue;
    const float *kv = rows.kv + p.from[i] * rows.stride,
                *gate = rows.gate + p.from[i] * rows.stride,
                *ape = rows.ape + rows.pos[p.from[i]] % rows.ratio * width;
    for (int64_t c = 0; c < width; ++c) {
      rows.kv_ring[p.to[i] * width + c] = kv[c];
      rows.score_ring[p.to[i] * width + c] = gate[c] + ape[c];
    }
  }
}

}  // namespace hadal::ops
