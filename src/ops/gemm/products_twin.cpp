// The Hopper products on a CPU, by tiles of outputs and rows that threads share. Which tile
// computes a result changes no bit of it.
#include <algorithm>
#include <cstring>
#include <vector>

#include "base/math.h"
#include "base/parallel.h"
#include "ops/bf16.h"
#include "ops/gemm/hopper_twin.h"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/operand_twin.h"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops {
namespace {

using sm90::kFp8Chain;
using sm90::kTileRows;

/// Rows of x that meet a tile's weights once these are split for the integer model.
constexpr int64_t kRows = 128;

struct Tile {
  int64_t output, outputs, row, rows;
};

/// body(tile) for tiles of 64 outputs and kRows rows, in parallel.
template <typename Body>
void each_tile(int64_t outputs, int64_t rows, Body&& body) {
  const int64_t across = ceil_div(outputs, kTileRows), down = ceil_div(rows, kRows);
  parallel_for(across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t output = i / down * kTileRows, row = i % down * kRows;
      body(Tile{.output = output,
                .outputs = std::min(kTileRows, outputs - output),
                .row = row,
                .rows = std::min(kRows, rows - row)});
    }
  });
}

/// y [tile.rows, tile.outputs] to its place, rounded once.
void store(const Sm90Output& out, const Tile& tile, const std::vector<float>& y) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* row = y.data() + r * tile.outputs;
    const int64_t at = (tile.row + r) * out.stride + tile.output;
    if (out.type == ElementType::kF32) {
      std::copy_n(row, tile.outputs, static_cast<float*>(out.y) + at);
    } else {
      std::transform(row, row + tile.outputs, static_cast<uint16_t*>(out.y) + at, round_bf16);
    }
  }
}

/// E4M3 rows of an operand and their scales [rows, slabs].
struct Fp8Rows {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  int64_t slabs;

  Fp8Rows(const uint8_t* x,
          const float* x_scale,
          int64_t groups,
          int64_t first,
          int64_t rows,
          int64_t num_slabs)
      : codes(rows_of_operand(x, groups, first, rows, num_slabs)),
        scales(static_cast<size_t>(rows * num_slabs)),
        slabs(num_slabs) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t s = 0; s < slabs; ++s)
        scales[static_cast<size_t>(r * slabs + s)] =
            x_scale[s * groups * sm90::kGroupRows + first + r];
    }
  }
};

/// Tile of the product of rows with weights [tile.outputs, slabs * 128] and their scales
/// [tile.outputs, slabs]; rows count from the rows' first.
std::vector<float> fp8_tile(const Tile& tile,
                            const Fp8Rows& x,
                            const std::vector<uint8_t>& w,
                            const std::vector<float>& w_scale) {
  std::vector<float> y(static_cast<size_t>(tile.rows * tile.outputs));
  const int64_t in = x.slabs * kFp8Chain;
  twin_fp8_cpu({.w = w.data(),
                .w_scale = w_scale.data(),
                .x = x.codes.data() + tile.row * in,
                .x_scale = x.scales.data() + tile.row * x.slabs,
                .y = y.data(),
                .outputs = tile.outputs,
                .rows = tile.rows,
                .in = in});
  return y;
}

/// Scales of blocks [slabs, ceil(outputs / 128)] for each of a tile's rows, [tile.outputs, slabs].
std::vector<float> row_scales(const float* w_scale,
                              int64_t outputs,
                              int64_t slabs,
                              const Tile& tile) {
  const int64_t blocks = ceil_div(outputs, int64_t{128});
  std::vector<float> scales(static_cast<size_t>(tile.outputs * slabs));
  for (int64_t o = 0; o < tile.outputs; ++o) {
    for (int64_t s = 0; s < slabs; ++s)
      scales[static_cast<size_t>(o * slabs + s)] = w_scale[s * blocks + (tile.output + o) / 128];
  }
  return scales;
}

const uint16_t* as_bf16(const std::vector<uint8_t>& bytes) {
  return reinterpret_cast<const uint16_t*>(bytes.data());
}

/// The same of BF16 rows x [.., in] and weights [tile.outputs, in].
std::vector<float> bf16_tile(const Tile& tile, const uint16_t* x, const uint16_t* w, int64_t in) {
  std::vector<float> y(static_cast<size_t>(tile.rows * tile.outputs));
  twin_bf16_cpu({.w = w,
                 .x = x + tile.row * in,
                 .y = y.data(),
                 .outputs = tile.outputs,
                 .rows = tile.rows,
                 .in = in});
  return y;
}

}  // namespace

void linear_fp8_twin(const LinearSm90Params& p) {
  const Fp8Rows x(p.x, p.x_scale, p.x_groups, 0, p.rows, p.slabs);
  each_tile(p.outputs, p.rows, [&](const Tile& tile) {
    const auto w = rows_of_operand(p.w, p.w_groups, tile.output, tile.outputs, p.slabs);
    store(p.out, tile, fp8_tile(tile, x, w, row_scales(p.w_scale, p.outputs, p.slabs, tile)));
  });
}

void linear_bf16_twin(const LinearSm90Params& p) {
  const auto x = rows_of_operand(p.x, p.x_groups, 0, p.rows, p.slabs);
  each_tile(p.outputs, p.rows, [&](const Tile& tile) {
    const auto w = rows_of_operand(p.w, p.w_groups, tile.output, tile.outputs, p.slabs);
    store(p.out, tile, bf16_tile(tile, as_bf16(x), as_bf16(w), p.slabs * sm90::kSlabBytes / 2));
  });
}

void widened_twin(const WidenedSm90Params& p) {
  const int64_t in = p.slabs * kFp8Chain, blocks = ceil_div(p.outputs, int64_t{128}),
                tiles = p.outputs / kTileRows;
  for (int64_t group = 0; group < p.groups; ++group) {
    const uint8_t* operand = p.x + group * in * 2 * p.x_groups * sm90::kGroupRows;
    const uint8_t* weights = p.w + group * p.outputs * in;
    const float* scales = p.scales + group * p.slabs * blocks;
    const auto x = rows_of_operand(operand, p.x_groups, 0, p.rows, 2 * p.slabs);
    const Sm90Output out{
        .y = p.out + group * p.outputs, .stride = p.stride, .type = ElementType::kBf16};
    each_tile(p.outputs, p.rows, [&](const Tile& tile) {
      std::vector<uint16_t> w(static_cast<size_t>(kTileRows * in));
      std::vector<uint8_t> codes(static_cast<size_t>(kTileRows * kFp8Chain));
      for (int64_t slab = 0; slab < p.slabs; ++slab) {
        wide_tile_codes(weights + (slab * tiles + tile.output / kTileRows) * sm90::kWideTileBytes,
                        codes.data(), kFp8Chain);
        const float scale = scales[slab * blocks + tile.output / 128];
        for (int64_t i = 0; i < kTileRows * kFp8Chain; ++i) {
          w[static_cast<size_t>(i / kFp8Chain * in + slab * kFp8Chain + i % kFp8Chain)] =
              round_bf16(e4m3_value(codes[static_cast<size_t>(i)]) * scale);  // exact
        }
      }
      store(out, tile, bf16_tile(tile, as_bf16(x), w.data(), in));
    });
  }
}

namespace {

/// product(run, tile) [tile.rows, tile.outputs], rows counted from the run's first, for the tiles
/// of 64 outputs of every run, in parallel.
template <typename Product>
void each_run(const ExpertsSm90Params& p, Product&& product) {
  const int64_t tiles = ceil_div(p.outputs, kTileRows);
  parallel_for(*p.num_runs * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const ExpertRun& run = p.runs[i / tiles];
      const int64_t output = i % tiles * kTileRows;
      Tile tile{.output = output,
                .outputs = std::min(kTileRows, p.outputs - output),
                .row = 0,
                .rows = run.rows};
      const std::vector<float> y = product(run, tile);
      tile.row = run.first_row;
      store(p.out, tile, y);
    }
  });
}

/// Bytes of the K-major operand of one expert's weights.
int64_t operand_bytes(const ExpertsSm90Params& p) {
  return p.slabs * sm90::round_up(p.outputs, kTileRows) * sm90::kSlabBytes;
}
int64_t row_groups(const ExpertsSm90Params& p) {
  return sm90::round_up(p.outputs, kTileRows) / sm90::kGroupRows;
}

}  // namespace

void experts_fp4_twin(const ExpertsSm90Params& p) {
  const int64_t in = p.slabs * kFp8Chain, tiles = p.outputs / kTileRows,
                matrix = p.slabs * tiles * sm90::kFp4TileBytes;
  each_run(p, [&](const ExpertRun& run, const Tile& tile) {
    std::vector<uint8_t> w(static_cast<size_t>(kTileRows * in));
    std::vector<float> scales(static_cast<size_t>(kTileRows * p.slabs));
    const uint8_t* own = p.w + run.expert * matrix + tile.output / kTileRows * sm90::kFp4TileBytes;
    for (int64_t slab = 0; slab < p.slabs; ++slab) {
      fp4_tile_codes(own + slab * tiles * sm90::kFp4TileBytes, w.data() + slab * kFp8Chain, in,
                     scales.data() + slab, p.slabs);
    }
    return fp8_tile(tile, Fp8Rows(p.x, p.x_scale, p.x_groups, run.first_row, run.rows, p.slabs), w,
                    scales);
  });
}

void experts_fp8_twin(const ExpertsSm90Params& p) {
  const int64_t scales = p.slabs * ceil_div(p.outputs, int64_t{128});
  each_run(p, [&](const ExpertRun& run, const Tile& tile) {
    const auto w = rows_of_operand(p.w + run.expert * operand_bytes(p), row_groups(p), tile.output,
                                   tile.outputs, p.slabs);
    return fp8_tile(tile, Fp8Rows(p.x, p.x_scale, p.x_groups, run.first_row, run.rows, p.slabs), w,
                    row_scales(p.w_scale + run.expert * scales, p.outputs, p.slabs, tile));
  });
}

void experts_bf16_twin(const ExpertsSm90Params& p) {
  each_run(p, [&](const ExpertRun& run, const Tile& tile) {
    const auto x = rows_of_operand(p.x, p.x_groups, run.first_row, run.rows, p.slabs);
    const auto w = rows_of_operand(p.w + run.expert * operand_bytes(p), row_groups(p), tile.output,
                                   tile.outputs, p.slabs);
    return bf16_tile(tile, as_bf16(x), as_bf16(w), p.slabs * sm90::kSlabBytes / 2);
  });
}

}  // namespace hadal::ops
