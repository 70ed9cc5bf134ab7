#include "ops/gemm/sm90_random.h"

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops {
namespace {

constexpr int64_t kGroupBytes = sm90::kGroupRows * sm90::kSlabBytes;

at::Tensor random_bytes(const std::vector<int64_t>& shape, at::Device device, uint64_t seed) {
  at::Generator generator = at::globalContext().defaultGenerator(device).clone();
  generator.set_current_seed(seed);
  // Whole words: a draw for each byte would take eight times as long.
  const int64_t bytes = c10::multiply_integers(shape);
  const at::Tensor words =
      at::empty({ceil_div(bytes, int64_t{8})}, at::TensorOptions(device).dtype(at::kLong));
  words.random_(std::numeric_limits<int64_t>::min(), std::nullopt, generator);
  return words.view(at::kByte).narrow(0, 0, bytes).view(shape);
}

/// E4M3 codes of magnitudes 0.5 to 1.9.
at::Tensor moderate_codes(at::Tensor bytes) { return bytes.bitwise_and_(0x8f).bitwise_or_(0x30); }

/// The power of two next to 1 / sqrt(in).
int scale_exponent(int64_t in) {
  return -static_cast<int>(std::lround(std::log2(static_cast<double>(in)) / 2));
}

/// Tiles end with their scales (sm90_layout.h): base, nothing, two bytes of four exponents, which
/// are those of groups that have the base itself.
void set_fp4_scales(const at::Tensor& data, int exponent) {
  const at::Tensor tiles = data.view({-1, sm90::kFp4TileBytes});
  const at::Tensor scales = tiles.narrow(1, sm90::kFp4TileBytes - 256, 256).view({-1, 64, 4});
  // Magnitudes of E2M1 have a deviation of about 3.
  scales.select(2, 0).fill_(127 + exponent - 2);
  scales.select(2, 1).zero_();
  scales.narrow(2, 2, 2).fill_(sm90::kMaxSpread | sm90::kMaxSpread << 4);
}

}  // namespace

Sm90Matrices random_sm90(const RandomSm90Params& p, at::Device device) {
  const int64_t in_unit = p.format == WeightFormat::kBf16 ? 64 : 128;
  HADAL_CHECK(p.matrices >= 1 && p.out > 0 && p.out % 64 == 0 && p.in > 0 && p.in % in_unit == 0,
              "random_sm90: ", p.matrices, " matrices of ", p.out, " x ", p.in,
              ", expected multiples of 64 x ", in_unit);
  Sm90Matrices w{.format = p.format,
                 .widened = p.widened,
                 .matrices = p.matrices,
                 .out = p.out,
                 .in = p.in,
                 .data = {},
                 .scales = {}};
  const int exponent = scale_exponent(p.in);
  switch (p.format) {
    case WeightFormat::kBf16:
      w.data = random_bytes({p.matrices, w.slabs() * w.row_groups() * kGroupBytes}, device, p.seed);
      // The upper bytes: signs and exponents of one half and one, times the scale.
      w.data.view({-1, 2}).select(1, 1).bitwise_and_(0x80).bitwise_or_(0x3f + (exponent - 1) / 2);
      break;
    case WeightFormat::kFp4:
      w.data =
          random_bytes({p.matrices, w.slabs() * (p.out / sm90::kTileRows) * sm90::kFp4TileBytes},
                       device, p.seed);
      set_fp4_scales(w.data, exponent);
      break;
    default:
      HADAL_CHECK(p.format == WeightFormat::kFp8, "random_sm90: a format without a layout");
      w.data = moderate_codes(random_bytes(
          {p.matrices, p.widened ? w.slabs() * (p.out / sm90::kTileRows) * sm90::kWideTileBytes
                                 : w.slabs() * w.row_groups() * kGroupBytes},
          device, p.seed));
      w.scales = at::full({p.matrices, w.slabs(), ceil_div(p.out, int64_t{128})},
                          std::ldexp(1.0, exponent), at::TensorOptions(device).dtype(at::kFloat));
  }
  return w;
}

}  // namespace hadal::ops
