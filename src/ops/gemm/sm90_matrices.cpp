#include "ops/gemm/sm90_matrices.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"
#include "base/parallel.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/gemm/sm90_pack.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

/// Data and scales of one matrix as bytes on the host.
struct HostCodes {
  at::Tensor data, scale;

  HostCodes(const at::Tensor& d, const at::Tensor& s, int64_t scale_rows, int64_t scale_columns)
      : data(d.view(at::kByte).contiguous()), scale(s.view(at::kByte).contiguous()) {
    HADAL_CHECK(d.is_cpu() && s.is_cpu(), "pack_sm90: codes on ", d.device());
    check_shape(scale, {scale_rows, scale_columns}, "pack_sm90: scale");
  }
  const uint8_t* bytes() const { return data.const_data_ptr<uint8_t>(); }
  const uint8_t* scales() const { return scale.const_data_ptr<uint8_t>(); }
};

/// The largest power of two that a widened weight is multiplied by.
constexpr int kMostWidened = 7;

/// False when a value or a scale has no exact form.
bool pack_fp8_matrix(const HostCodes& codes, const Sm90Matrices& w, int64_t matrix) {
  const int64_t columns = w.slabs(), out_blocks = ceil_div(w.out, int64_t{128});
  const at::Tensor magnitude = codes.data.bitwise_and(0x7f);
  if (magnitude.eq(0x7f).any().item<bool>()) return false;
  uint8_t* data = w.data.mutable_data_ptr<uint8_t>() + matrix * w.data.stride(0);
  if (w.widened) {
    sm90::pack_widened(codes.bytes(), w.out, w.in, data);
  } else {
    const at::Tensor rows = at::constant_pad_nd(codes.data, {0, columns * 128 - w.in});
    const std::vector<uint8_t> operand = sm90::pack_operand(
        rows.const_data_ptr<uint8_t>(), w.out, columns * sm90::kSlabBytes, w.row_groups());
    std::memcpy(data, operand.data(), operand.size());
  }
  // Blocks of zeros do with any scale.
  const at::Tensor used =
      at::constant_pad_nd(magnitude, {0, columns * 128 - w.in, 0, out_blocks * 128 - w.out})
          .reshape({out_blocks, 128, columns, 128})
          .amax({1, 3})
          .ne(0)
          .contiguous();
  float* scales = w.scales.mutable_data_ptr<float>() + matrix * w.scales.stride(0);
  for (int64_t block = 0; block < out_blocks; ++block) {
    for (int64_t slab = 0; slab < columns; ++slab) {
      const int64_t at = block * columns + slab;
      if (!used.const_data_ptr<bool>()[at]) continue;
      const uint8_t scale = codes.scales()[at];
      if (!in_range(scale) || (w.widened && scale > 127 + kMostWidened)) return false;
      scales[slab * out_blocks + block] = std::ldexp(1.0f, scale - 127);
    }
  }
  return true;
}

/// The scales of an FP4 matrix with those of zeros replaced by a neighbour's of the same row and
/// slab, so that zeros, which do with any scale, spread nothing. Empty when a scale has no exact
/// form.
std::vector<uint8_t> fp4_scales(const HostCodes& codes, int64_t out, int64_t in) {
  const int64_t groups = in / 32;
  std::vector<uint8_t> scales(codes.scales(), codes.scales() + out * groups);
  for (int64_t row = 0; row < out; ++row) {
    for (int64_t first = 0; first < groups; first += 4) {
      const int64_t last = std::min(groups, first + 4);
      uint8_t largest = 0;
      bool zero[4] = {};
      for (int64_t g = first; g < last; ++g) {
        const uint8_t* code = codes.bytes() + (row * groups + g) * 16;
        zero[g - first] =
            std::all_of(code, code + 16, [](uint8_t pair) { return (pair & 0x77) == 0; });
        if (zero[g - first]) continue;
        const uint8_t scale = scales[static_cast<size_t>(row * groups + g)];
        if (!in_range(scale)) return {};
        largest = std::max(largest, scale);
      }
      for (int64_t g = first; g < last; ++g) {
        if (zero[g - first])
          scales[static_cast<size_t>(row * groups + g)] = largest == 0 ? uint8_t{127} : largest;
      }
    }
  }
  return scales;
}

bool pack_fp4_matrix(const HostCodes& codes, const Sm90Matrices& w, int64_t matrix) {
  const std::vector<uint8_t> scales = fp4_scales(codes, w.out, w.in);
  return !scales.empty() &&
         sm90::pack_fp4(codes.bytes(), scales.data(), w.out, w.in,
                        w.data.mutable_data_ptr<uint8_t>() + matrix * w.data.stride(0)) == 0;
}

Sm90Matrices empty_matrices(
    WeightFormat format, size_t matrices, int64_t out, int64_t in, bool widened = false) {
  HADAL_CHECK(out > 0 && in > 0, "pack_sm90: a matrix of ", out, " x ", in);
  Sm90Matrices w{.format = format,
                 .widened = widened,
                 .matrices = static_cast<int64_t>(matrices),
                 .out = out,
                 .in = in,
                 .data = {},
                 .scales = {}};
  const int64_t bytes = format == WeightFormat::kFp4
                            ? sm90::fp4_bytes(out, in)
                            : w.slabs() * w.row_groups() * sm90::kGroupRows * sm90::kSlabBytes;
  w.data = at::empty({w.matrices, bytes}, at::kByte);
  if (format == WeightFormat::kFp8)
    w.scales = at::ones({w.matrices, w.slabs(), ceil_div(out, int64_t{128})}, at::kFloat);
  return w;
}

using PackMatrix = bool (*)(const HostCodes&, const Sm90Matrices&, int64_t);

std::optional<Sm90Matrices> pack_all(Sm90Matrices w,
                                     const std::vector<at::Tensor>& data,
                                     const std::vector<at::Tensor>& scale,
                                     PackMatrix pack) {
  const bool fp4 = w.format == WeightFormat::kFp4;
  const int64_t scale_rows = fp4 ? w.out : ceil_div(w.out, int64_t{128});
  const int64_t scale_columns = fp4 ? w.in / 32 : w.slabs();
  std::atomic<bool> fits{true};
  parallel_for(w.matrices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && fits; ++i) {
      const auto at = static_cast<size_t>(i);
      check_shape(data[at], {data[0].size(0), data[0].size(1)}, "pack_sm90: data");
      if (!pack(HostCodes(data[at], scale[at], scale_rows, scale_columns), w, i)) fits = false;
    }
  });
  if (!fits) return std::nullopt;
  return w;
}

/// [slabs][row groups][8][128], swizzled -> [8 row groups, 128 slabs] bytes.
at::Tensor rows_of_operand(const at::Tensor& data, int64_t slabs, int64_t groups) {
  const at::Tensor row = at::arange(8, data.options().dtype(at::kLong)).reshape({8, 1});
  const at::Tensor piece = row.bitwise_xor(row.reshape({1, 8}));  // of row r, in order of K
  const at::Tensor index = piece.reshape({1, 1, 8, 8, 1}).expand({slabs, groups, 8, 8, 16});
  return data.reshape({slabs, groups, 8, 8, 16})
      .gather(3, index)
      .permute({1, 2, 0, 3, 4})
      .reshape({groups * 8, slabs * 128});
}

/// Tiles of weights that are widened -> [out, in] bytes (sm90_layout.h).
at::Tensor rows_of_tiles(const at::Tensor& data, const Sm90Matrices& w) {
  // slab, tile, pair of steps, warp, g, q, step of the pair, half of the rows, upper inputs, i
  return data.reshape({w.slabs(), w.out / sm90::kTileRows, 4, 4, 8, 4, 2, 2, 2, 2})
      .permute({1, 3, 7, 4, 0, 2, 6, 8, 5, 9})
      .reshape({w.out, w.in});
}

/// The values of BF16 matrices.
at::Tensor unpack_bf16(const Sm90Matrices& w, int64_t matrix) {
  return rows_of_operand(w.data[matrix], w.slabs(), w.row_groups())
      .narrow(0, 0, w.out)
      .narrow(1, 0, w.in * 2)
      .contiguous()
      .view(at::kBFloat16);
}

at::Tensor unpack_fp8(const Sm90Matrices& w, int64_t matrix) {
  const at::Tensor bytes = w.widened ? rows_of_tiles(w.data[matrix], w)
                                     : rows_of_operand(w.data[matrix], w.slabs(), w.row_groups());
  const at::Tensor codes =
      bytes.narrow(0, 0, w.out).narrow(1, 0, w.in).contiguous().view(at::kFloat8_e4m3fn);
  const at::Tensor spread = w.scales[matrix]
                                .t()
                                .repeat_interleave(128, 0)
                                .repeat_interleave(128, 1)
                                .narrow(0, 0, w.out)
                                .narrow(1, 0, w.in);
  return (codes.to(at::kFloat) * spread).to(at::kBFloat16);
}

/// Bits [shift, shift + width) of each word, shift along a new last dimension.
at::Tensor bits(const at::Tensor& words, const std::vector<int64_t>& shifts, int64_t mask) {
  const at::Tensor shift = at::tensor(shifts, words.options());
  return words.unsqueeze(-1).bitwise_right_shift(shift).bitwise_and(mask);
}

at::Tensor unpack_fp4(const Sm90Matrices& w, int64_t matrix) {
  const int64_t slabs = w.slabs(), tiles = ceil_div(w.out, sm90::kTileRows);
  const at::Tensor tile = w.data[matrix].reshape({slabs, tiles, sm90::kFp4TileBytes});
  // [slab, tile, pair of steps, warp, g, q, step of the pair, half of the rows]
  const at::Tensor words =
      tile.narrow(2, 0, 4096).contiguous().view(at::kInt).reshape({slabs, tiles, 2, 4, 8, 4, 2, 2});
  const at::Tensor code =
      bits(words, {0, 4, 8, 12, 16, 20, 24, 28}, 7) +
      bits(words, {7, 15, 23, 31, 3, 11, 19, 27}, 1) * 8;  // a last dimension of 8 nibbles
  const at::Tensor values = at::tensor({0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f,
                                        -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f},
                                       w.data.options().dtype(at::kFloat));
  const at::Tensor magnitude =
      values.index_select(0, code.flatten())
          .reshape({slabs, tiles, 2, 4, 8, 4, 2, 2, 2, 4})  // nibbles: upper 16 inputs, i
          .permute({1, 3, 7, 4, 0, 2, 6, 8, 5, 9})  // tile warp half g; slab pair step upper q i
          .reshape({tiles * sm90::kTileRows, slabs * 4, 32});
  const at::Tensor scale =
      tile.narrow(2, 4096, 256).contiguous().view(at::kInt);  // [slab, tile, 64]
  const at::Tensor exponent =
      scale.bitwise_and(255).unsqueeze(-1) + bits(scale, {16, 20, 24, 28}, 15) -
      (sm90::kFp4Unity + 6);  // the E8M0 byte of each group: [slab, tile, row, group]
  const at::Tensor factor = exponent.clamp_min(0)
                                .bitwise_left_shift(23)
                                .view(at::kFloat)
                                .permute({1, 2, 0, 3})
                                .reshape({tiles * sm90::kTileRows, slabs * 4, 1});
  return (magnitude * factor)
      .reshape({tiles * sm90::kTileRows, slabs * 128})
      .narrow(0, 0, w.out)
      .narrow(1, 0, w.in)
      .to(at::kBFloat16)
      .contiguous();
}

}  // namespace

int64_t Sm90Matrices::slabs() const {
  return ceil_div(in * (format == WeightFormat::kBf16 ? 2 : 1), sm90::kSlabBytes);
}
int64_t Sm90Matrices::row_groups() const {
  return sm90::round_up(out, sm90::kTileRows) / sm90::kGroupRows;
}
int64_t Sm90Matrices::num_bytes() const {
  return data.numel() + (scales.defined() ? static_cast<int64_t>(scales.nbytes()) : 0);
}
Sm90Matrices Sm90Matrices::to(at::Device device) const {
  Sm90Matrices result = *this;
  result.data = data.to(device);
  if (scales.defined()) result.scales = scales.to(device);
  return result;
}

std::optional<Sm90Matrices> pack_sm90_fp8(const std::vector<at::Tensor>& data,
                                          const std::vector<at::Tensor>& scale) {
  HADAL_CHECK(!data.empty() && data[0].dim() == 2 && data.size() == scale.size(),
              "pack_sm90_fp8: ", data.size(), " matrices with ", scale.size(), " scales");
  return pack_all(empty_matrices(WeightFormat::kFp8, data.size(), data[0].size(0), data[0].size(1)),
                  data, scale, pack_fp8_matrix);
}

std::optional<Sm90Matrices> pack_sm90_fp4(const std::vector<at::Tensor>& data,
                                          const std::vector<at::Tensor>& scale) {
  HADAL_CHECK(!data.empty() && data[0].dim() == 2 && data.size() == scale.size(),
              "pack_sm90_fp4: ", data.size(), " matrices with ", scale.size(), " scales");
  const int64_t in = data[0].size(1) * 2;
  HADAL_CHECK(in % 32 == 0, "pack_sm90_fp4: ", in, " inputs, expected a multiple of 32");
  return pack_all(empty_matrices(WeightFormat::kFp4, data.size(), data[0].size(0), in), data, scale,
                  pack_fp4_matrix);
}

std::optional<Sm90Matrices> pack_sm90_widened(const std::vector<at::Tensor>& data,
                                              const std::vector<at::Tensor>& scale) {
  HADAL_CHECK(!data.empty() && data[0].dim() == 2 && data.size() == scale.size(),
              "pack_sm90_widened: ", data.size(), " matrices with ", scale.size(), " scales");
  const int64_t out = data[0].size(0), in = data[0].size(1);
  if (out % sm90::kTileRows != 0 || in % sm90::kFp8Chain != 0) return std::nullopt;
  return pack_all(empty_matrices(WeightFormat::kFp8, data.size(), out, in, /*widened=*/true), data,
                  scale, pack_fp8_matrix);
}

std::optional<Sm90Matrices> pack_sm90_bf16(const at::Tensor& values) {
  HADAL_CHECK(values.is_cpu() && values.scalar_type() == at::kBFloat16 &&
                  (values.dim() == 2 || values.dim() == 3),
              "pack_sm90_bf16: BF16 matrices on the CPU, found ", values.scalar_type(), " ",
              values.sizes(), " on ", values.device().str());
  const at::Tensor all = (values.dim() == 3 ? values : values.unsqueeze(0)).contiguous();
  if (all.size(2) % 8 != 0) return std::nullopt;
  Sm90Matrices w = empty_matrices(WeightFormat::kBf16, static_cast<size_t>(all.size(0)),
                                  all.size(1), all.size(2));
  const auto* bytes = static_cast<const uint8_t*>(all.const_data_ptr());
  for (int64_t matrix = 0; matrix < w.matrices; ++matrix) {
    const std::vector<uint8_t> operand =
        sm90::pack_operand(bytes + matrix * w.out * w.in * 2, w.out, w.in * 2, w.row_groups());
    std::memcpy(w.data.mutable_data_ptr<uint8_t>() + matrix * w.data.stride(0), operand.data(),
                operand.size());
  }
  return w;
}

std::optional<Sm90Matrices> pack_sm90(const Panels& panels, bool widened) {
  const bool fp4 = panels.format == WeightFormat::kFp4;
  HADAL_CHECK(fp4 || panels.format == WeightFormat::kFp8, "pack_sm90: panels without codes");
  std::vector<at::Tensor> data, scale;
  for (int64_t matrix = 0; matrix < panels.matrices; ++matrix) {
    StoredCodes codes = panel_codes(panels, matrix);
    data.push_back(std::move(codes.data));
    scale.push_back(std::move(codes.scale));
  }
  if (fp4) return pack_sm90_fp4(data, scale);
  return widened ? pack_sm90_widened(data, scale) : pack_sm90_fp8(data, scale);
}

at::Tensor unpack_sm90(const Sm90Matrices& w, int64_t matrix) {
  HADAL_CHECK(matrix >= 0 && matrix < w.matrices, "unpack_sm90: matrix ", matrix, " of ",
              w.matrices);
  switch (w.format) {
    case WeightFormat::kFp4:
      return unpack_fp4(w, matrix);
    case WeightFormat::kBf16:
      return unpack_bf16(w, matrix);
    default:
      return unpack_fp8(w, matrix);
  }
}

}  // namespace hadal::ops
