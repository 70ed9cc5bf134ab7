#include "ops/gemm/panels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"
#include "base/parallel.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

constexpr uint8_t kScaleOfOne = 127;

/// Calls body(matrix, block) for all, on all threads.
template <typename Body>
void for_each_block(const Panels& panels, Body&& body) {
  const int64_t blocks = panels.blocks();
  parallel_for(panels.matrices * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / blocks, i % blocks);
  });
}

/// Where a panel of a group lies inside its matrix.
int64_t group_offset(const Panels& panels, int64_t block, int64_t panel, int64_t group) {
  const int64_t groups = panels.padded_in() / kGroupInputs;
  const int64_t width =
      std::min(kBlockPanels, ceil_div(panels.out, kPanelWidth) - block * kBlockPanels);
  return (block * kBlockPanels * groups + group * width + panel) * group_bytes(panels.format);
}

/// Calls body(row, group, dst) for every row of a block and group of 8 inputs; dst is the row's
/// lane in the group's panel, whose lanes are `lane_bytes` apart.
template <typename Body>
void for_each_lane(
    const Panels& panels, uint8_t* matrix, int64_t block, int64_t lane_bytes, Body&& body) {
  const int64_t groups = panels.padded_in() / kGroupInputs, first = block * kBlockWidth;
  const int64_t last = std::min(panels.out, first + kBlockWidth);
  for (int64_t row = first; row < last; ++row) {
    const int64_t panel = (row - first) / kPanelWidth, lane = row % kPanelWidth;
    for (int64_t group = 0; group < groups; ++group) {
      body(row, group, matrix + group_offset(panels, block, panel, group) + lane * lane_bytes);
    }
  }
}

Panels empty_panels(WeightFormat format, int64_t matrices, int64_t out, int64_t in) {
  Panels panels{
      .format = format, .matrices = matrices, .out = out, .in = in, .data = {}, .scales = {}};
  const int64_t num_panels = ceil_div(out, kPanelWidth);
  const int64_t bytes =
      num_panels * (panels.padded_in() / kGroupInputs) * group_bytes(panels.format);
  panels.data = at::zeros({matrices, bytes}, at::kByte);
  if (format == WeightFormat::kFp8)
    panels.scales =
        at::full({matrices, panels.blocks() * ceil_div(in, 128)}, kScaleOfOne, at::kByte);
  if (format == WeightFormat::kFp4)
    panels.scales =
        at::full({matrices, in / 32 * num_panels * kPanelWidth}, kScaleOfOne, at::kByte);
  return panels;
}

uint8_t* matrix_bytes(const at::Tensor& bytes, int64_t matrix) {
  return bytes.mutable_data_ptr<uint8_t>() + matrix * bytes.stride(0);
}

template <typename T>
void pack_dense_block(const Panels& panels, const T* w, uint8_t* matrix, int64_t block) {
  // BF16 keeps the two elements of a pair together, FP32 has one after the other.
  constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;
  const int64_t groups = panels.padded_in() / kGroupInputs, first = block * kBlockPanels;
  const int64_t count = std::min(kBlockPanels, ceil_div(panels.out, kPanelWidth) - first);
  T* out = reinterpret_cast<T*>(matrix) + first * groups * kGroupInputs * kPanelWidth;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t input = group * kGroupInputs;
    const int64_t inputs = std::min(kGroupInputs, panels.in - input);
    for (int64_t panel = first; panel < first + count; ++panel) {
      const int64_t row = panel * kPanelWidth, rows = std::min(kPanelWidth, panels.out - row);
      for (int64_t lane = 0; lane < rows; ++lane) {
        const T* source = w + (row + lane) * panels.in + input;
        for (int64_t i = 0; i < inputs; ++i)
          out[i / kPair * kPair * kPanelWidth + lane * kPair + i % kPair] = source[i];
      }
      out += kGroupInputs * kPanelWidth;
    }
  }
}

/// Checks what the two packed forms share and returns the raw bytes of data and scales.
struct StoredBytes {
  std::vector<const uint8_t*> data, scale;
  std::vector<at::Tensor> kept;  ///< contiguous copies where there had to be any
};
StoredBytes stored_bytes(const std::vector<at::Tensor>& data,
                         const std::vector<at::Tensor>& scale,
                         int64_t scale_rows,
                         int64_t scale_columns,
                         at::ScalarType scale_type) {
  HADAL_CHECK(!data.empty() && data.size() == scale.size(), "pack: ", data.size(),
              " matrices with ", scale.size(), " scales");
  StoredBytes result;
  for (size_t i = 0; i < data.size(); ++i) {
    check_shape(data[i], {data[0].size(0), data[0].size(1)}, "pack: data");
    check_shape(scale[i], {scale_rows, scale_columns}, "pack: scale");
    HADAL_CHECK(scale[i].scalar_type() == scale_type && data[i].element_size() == 1,
                "pack: expected bytes with scales of ", scale_type, ", found ",
                data[i].scalar_type(), " with scales of ", scale[i].scalar_type());
    result.kept.push_back(data[i].contiguous());
    result.data.push_back(static_cast<const uint8_t*>(result.kept.back().const_data_ptr()));
    result.kept.push_back(scale[i].contiguous());
    result.scale.push_back(static_cast<const uint8_t*>(result.kept.back().const_data_ptr()));
  }
  return result;
}

/// A scale of one 128 x 128 block where it belongs in a block of 64 outputs; false where the kernel
/// does not take it.
bool pack_scale(uint8_t* to, const uint8_t* from) {
  *to = *from;
  return in_range(*from);
}
bool pack_scale(float* to, const float* from) {
  *to = *from;
  const float magnitude = std::fabs(*from);
  return magnitude == 0.0f || (magnitude >= 0x1p-60f && magnitude <= 0x1p60f);
}

/// FP8, 64 outputs: false when a scale or a value has no packed form.
template <typename Scale>
bool pack_fp8_block(const Panels& panels,
                    const uint8_t* data,
                    const uint8_t* scale,
                    int64_t matrix,
                    int64_t block) {
  const int64_t in = panels.in, columns = ceil_div(in, 128);
  const int64_t first = block * kBlockWidth, last = std::min(panels.out, first + kBlockWidth);
  bool nan = false;
  std::vector<uint8_t> used(static_cast<size_t>(columns), 0);  // a code that is not zero
  for_each_lane(panels, matrix_bytes(panels.data, matrix), block, 4,
                [&](int64_t row, int64_t group, uint8_t* dst) {
                  uint8_t code[kGroupInputs] = {};
                  const int64_t k = group * kGroupInputs;
                  std::memcpy(code, data + row * in + k,
                              static_cast<size_t>(std::min(kGroupInputs, in - k)));
                  uint8_t any = 0;
                  for (const uint8_t c : code) {
                    any = static_cast<uint8_t>(any | (c & 0x7f));
                    nan |= (c & 0x7f) == 0x7f;
                  }
                  used[static_cast<size_t>(k / 128)] |= any;
                  const uint8_t half[2][4] = {{code[0], code[2], code[1], code[3]},
                                              {code[4], code[6], code[5], code[7]}};
                  std::memcpy(dst, half[0], 4);
                  std::memcpy(dst + 64, half[1], 4);
                });
  bool fits = !nan && last > first;
  Scale* scales =
      panels.scales.mutable_data_ptr<Scale>() + matrix * panels.scales.stride(0) + block * columns;
  const auto* stored = reinterpret_cast<const Scale*>(scale) + first / 128 * columns;
  for (int64_t column = 0; column < columns; ++column) {
    if (used[static_cast<size_t>(column)] == 0) continue;  // zeros: any scale will do
    fits &= pack_scale(scales + column, stored + column);
  }
  return fits;
}

bool pack_fp4_block(const Panels& panels,
                    const uint8_t* data,
                    const uint8_t* scale,
                    int64_t matrix,
                    int64_t block) {
  const int64_t in = panels.in, slabs = in / 32;
  const int64_t num_panels = ceil_div(panels.out, kPanelWidth);
  const int64_t width = std::min(kBlockPanels, num_panels - block * kBlockPanels);
  uint8_t* scales =
      matrix_bytes(panels.scales, matrix) + block * kBlockPanels * slabs * kPanelWidth;
  bool fits = true;
  uint32_t any = 0;  // a code of the slab that is not zero
  for_each_lane(panels, matrix_bytes(panels.data, matrix), block, 4,
                [&](int64_t row, int64_t group, uint8_t* dst) {
                  uint32_t word = 0;  // e0 o0 e1 o1 ... from the lowest nibble up
                  std::memcpy(&word, data + row * (in / 2) + group * 4, 4);
                  any = (group % 4 == 0 ? 0 : any) | (word & 0x77777777u);
                  const auto gather = [](uint32_t nibbles) {
                    nibbles = (nibbles | nibbles >> 4) & 0x00ff00ffu;
                    return (nibbles | nibbles >> 8) & 0xffffu;
                  };
                  const uint32_t packed =
                      gather(word & 0x0f0f0f0fu) | gather(word >> 4 & 0x0f0f0f0fu) << 16;
                  std::memcpy(dst, &packed, 4);
                  if (group % 4 != 3 || any == 0) return;
                  const uint8_t s = scale[row * slabs + group / 4];
                  fits &= in_range(s);
                  scales[group / 4 * width * kPanelWidth + row - block * kBlockWidth] = s;
                });
  return fits;
}

using PackBlock = bool (*)(const Panels&, const uint8_t*, const uint8_t*, int64_t, int64_t);

std::optional<Panels> pack_stored(Panels panels, const StoredBytes& stored, PackBlock pack_block) {
  std::atomic<bool> fits{true};
  for_each_block(panels, [&](int64_t matrix, int64_t block) {
    const auto i = static_cast<size_t>(matrix);
    if (!pack_block(panels, stored.data[i], stored.scale[i], matrix, block)) fits = false;
  });
  if (!fits) return std::nullopt;
  return panels;
}

float fp4_value(uint32_t code) {
  constexpr float kMagnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return (code & 8u) != 0 ? -kMagnitudes[code & 7u] : kMagnitudes[code & 7u];
}

float fp8_value(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3 & 15u), mantissa = static_cast<int>(code & 7u);
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (code & 0x80u) != 0 ? -magnitude : magnitude;
}

/// Element i of 8 of a packed lane.
uint32_t packed_code(WeightFormat format, const uint8_t* lane, int64_t i) {
  const int64_t pair = i / 2, odd = i % 2;
  if (format == WeightFormat::kFp8) return lane[pair / 2 * 64 + odd * 2 + pair % 2];
  uint32_t word = 0;
  std::memcpy(&word, lane, 4);
  return word >> (odd * 16 + pair * 4) & 15u;
}

float packed_value(WeightFormat format, const uint8_t* lane, int64_t i) {
  const uint32_t code = packed_code(format, lane, i);
  return format == WeightFormat::kFp8 ? fp8_value(code) : fp4_value(code);
}

template <typename T>
void unpack_dense_block(const Panels& panels, uint8_t* matrix, int64_t block, T* out) {
  constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;
  for_each_lane(panels, matrix, block, kPair * static_cast<int64_t>(sizeof(T)),
                [&](int64_t row, int64_t group, const uint8_t* source) {
                  const int64_t first = group * kGroupInputs,
                                count = std::min(kGroupInputs, panels.in - first);
                  const T* lane = reinterpret_cast<const T*>(source);
                  for (int64_t i = 0; i < count; ++i)
                    out[row * panels.in + first + i] =
                        lane[i / kPair * kPair * kPanelWidth + i % kPair];
                });
}

/// The scale of input k of a row of FP8 or FP4 panels, as it is held.
template <typename Scale>
Scale scale_of(const Panels& panels, const Scale* scales, int64_t row, int64_t k) {
  const int64_t block = row / kBlockWidth;
  if (panels.format == WeightFormat::kFp8)
    return scales[block * ceil_div(panels.in, 128) + k / 128];
  const int64_t width =
      std::min(kBlockPanels, ceil_div(panels.out, kPanelWidth) - block * kBlockPanels);
  return scales[block * kBlockPanels * (panels.in / 32) * kPanelWidth +
                k / 32 * width * kPanelWidth + row - block * kBlockWidth];
}

void unpack_packed_block(const Panels& panels, int64_t matrix, int64_t block, c10::BFloat16* out) {
  const uint8_t* scales = matrix_bytes(panels.scales, matrix);
  for_each_lane(panels, matrix_bytes(panels.data, matrix), block, 4,
                [&](int64_t row, int64_t group, const uint8_t* lane) {
                  const int64_t first = group * kGroupInputs,
                                count = std::min(kGroupInputs, panels.in - first);
                  const int exponent = scale_of(panels, scales, row, first) - 127;
                  for (int64_t i = 0; i < count; ++i)
                    out[row * panels.in + first + i] =
                        std::ldexp(packed_value(panels.format, lane, i), exponent);
                });
}

void unpack_factor_block(const Panels& panels, int64_t matrix, int64_t block, float* out) {
  const float* scales = panels.scales.const_data_ptr<float>() + matrix * panels.scales.stride(0);
  for_each_lane(panels, matrix_bytes(panels.data, matrix), block, 4,
                [&](int64_t row, int64_t group, const uint8_t* lane) {
                  const int64_t first = group * kGroupInputs,
                                count = std::min(kGroupInputs, panels.in - first);
                  const float factor = scale_of(panels, scales, row, first);
                  for (int64_t i = 0; i < count; ++i)
                    out[row * panels.in + first + i] =
                        packed_value(panels.format, lane, i) * factor;
                });
}

/// Scales of the codes of one matrix, a row for each 128 or, of FP4, each one: `of_one` is the
/// scale of blocks that hold nothing but zeros.
template <typename Scale>
void unpack_scales(const Panels& panels, const Scale* scales, Scale of_one, Scale* out) {
  const bool fp4 = panels.format == WeightFormat::kFp4;
  const int64_t rows = fp4 ? panels.out : ceil_div(panels.out, 128);
  const int64_t slabs = fp4 ? panels.in / 32 : ceil_div(panels.in, 128);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t slab = 0; slab < slabs; ++slab) {
      Scale& scale = out[row * slabs + slab];
      scale = scale_of(panels, scales, fp4 ? row : row * 128, slab * (fp4 ? 32 : 128));
      // A block of 64 zeros has the scale of one; the other half of the 128 rows may have another.
      if (!fp4 && scale == of_one && row * 128 + kBlockWidth < panels.out)
        scale = scale_of(panels, scales, row * 128 + kBlockWidth, slab * 128);
    }
  }
}

}  // namespace

int64_t Panels::padded_in() const { return align_up(in, kGroupInputs); }
int64_t Panels::blocks() const { return ceil_div(out, kBlockWidth); }
int64_t Panels::num_bytes() const {
  return data.numel() + (scales.defined() ? static_cast<int64_t>(scales.nbytes()) : 0);
}

Panels pack_panels(const at::Tensor& w) {
  const at::Tensor all = (w.dim() == 2 ? w.unsqueeze(0) : w).detach().contiguous();
  check_shape(all, {-1, -1, -1}, "pack_panels: w");
  const bool wide = element_type(all) == ElementType::kF32;
  const Panels panels = empty_panels(wide ? WeightFormat::kF32 : WeightFormat::kBf16, all.size(0),
                                     all.size(1), all.size(2));
  for_each_block(panels, [&](int64_t matrix, int64_t block) {
    const int64_t offset = matrix * panels.out * panels.in;
    uint8_t* bytes = matrix_bytes(panels.data, matrix);
    if (wide) {
      pack_dense_block(panels, all.const_data_ptr<float>() + offset, bytes, block);
    } else {
      pack_dense_block(panels, static_cast<const uint16_t*>(all.const_data_ptr()) + offset, bytes,
                       block);
    }
  });
  return panels;
}

std::optional<Panels> pack_fp8(const std::vector<at::Tensor>& data,
                               const std::vector<at::Tensor>& scale) {
  HADAL_CHECK(!data.empty() && data[0].dim() == 2, "pack_fp8: no matrices");
  const int64_t out = data[0].size(0), in = data[0].size(1);
  const bool factors = scale.at(0).scalar_type() == at::kFloat;
  const StoredBytes stored = stored_bytes(data, scale, ceil_div(out, 128), ceil_div(in, 128),
                                          factors ? at::kFloat : at::kByte);
  Panels panels = empty_panels(WeightFormat::kFp8, static_cast<int64_t>(data.size()), out, in);
  if (!factors) return pack_stored(std::move(panels), stored, pack_fp8_block<uint8_t>);
  panels.scales = at::ones(panels.scales.sizes(), at::kFloat);
  return pack_stored(std::move(panels), stored, pack_fp8_block<float>);
}

std::optional<Panels> pack_fp4(const std::vector<at::Tensor>& data,
                               const std::vector<at::Tensor>& scale) {
  HADAL_CHECK(!data.empty() && data[0].dim() == 2, "pack_fp4: no matrices");
  const int64_t out = data[0].size(0), in = data[0].size(1) * 2;
  HADAL_CHECK(in % 32 == 0, "pack_fp4: ", in, " inputs, expected a multiple of 32");
  const StoredBytes stored = stored_bytes(data, scale, out, in / 32, at::kByte);
  return pack_stored(empty_panels(WeightFormat::kFp4, static_cast<int64_t>(data.size()), out, in),
                     stored, pack_fp4_block);
}

at::Tensor unpack_panels(const Panels& panels) {
  const at::Tensor out = at::empty(
      {panels.matrices, panels.out, panels.in},
      panels.format == WeightFormat::kF32 || panels.has_factors() ? at::kFloat : at::kBFloat16);
  for_each_block(panels, [&](int64_t matrix, int64_t block) {
    const int64_t offset = matrix * panels.out * panels.in;
    uint8_t* bytes = matrix_bytes(panels.data, matrix);
    if (panels.format == WeightFormat::kF32) {
      unpack_dense_block(panels, bytes, block, out.mutable_data_ptr<float>() + offset);
    } else if (panels.format == WeightFormat::kBf16) {
      unpack_dense_block(panels, bytes, block, out.mutable_data_ptr<c10::BFloat16>() + offset);
    } else if (panels.has_factors()) {
      unpack_factor_block(panels, matrix, block, out.mutable_data_ptr<float>() + offset);
    } else {
      unpack_packed_block(panels, matrix, block, out.mutable_data_ptr<c10::BFloat16>() + offset);
    }
  });
  return out;
}

StoredCodes panel_codes(const Panels& panels, int64_t matrix) {
  const bool fp4 = panels.format == WeightFormat::kFp4;
  HADAL_CHECK(fp4 || panels.format == WeightFormat::kFp8, "panel_codes: panels without codes");
  const int64_t out = panels.out, in = panels.in;
  const int64_t row_bytes = fp4 ? in / 2 : in, slabs = fp4 ? in / 32 : ceil_div(in, 128);
  const at::Tensor data = at::zeros({out, row_bytes}, at::kByte);
  const at::Tensor scale = at::empty({fp4 ? out : ceil_div(out, 128), slabs},
                                     panels.has_factors() ? at::kFloat : at::kByte);
  auto* codes = data.mutable_data_ptr<uint8_t>();
  for (int64_t block = 0; block < panels.blocks(); ++block) {
    for_each_lane(panels, matrix_bytes(panels.data, matrix), block, 4,
                  [&](int64_t row, int64_t group, const uint8_t* lane) {
                    const int64_t first = group * kGroupInputs;
                    for (int64_t i = 0; i < std::min(kGroupInputs, in - first); ++i) {
                      const uint32_t code = packed_code(panels.format, lane, i);
                      if (fp4) {
                        uint8_t& pair = codes[row * row_bytes + (first + i) / 2];
                        pair = static_cast<uint8_t>(pair | code << (i % 2 * 4));
                      } else {
                        codes[row * row_bytes + first + i] = static_cast<uint8_t>(code);
                      }
                    }
                  });
  }
  if (panels.has_factors()) {
    const float* factors = panels.scales.const_data_ptr<float>() + matrix * panels.scales.stride(0);
    unpack_scales(panels, factors, 1.0f, scale.mutable_data_ptr<float>());
  } else {
    unpack_scales(panels, matrix_bytes(panels.scales, matrix), kScaleOfOne,
                  scale.mutable_data_ptr<uint8_t>());
  }
  return {.data = fp4 ? data : data.view(at::kFloat8_e4m3fn), .scale = scale};
}

}  // namespace hadal::ops
