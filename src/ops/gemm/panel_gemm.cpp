#include "ops/gemm/panel_gemm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "base/check.h"
#include "base/math.h"
#include "base/parallel.h"

namespace hadal::gemm {
namespace detail {

constinit CpuSlot<void(const Tile&)> tile_slot;
constinit CpuSlot<void(bool*)> native_bf16_slot;

BlockLayout block_layout(const WeightDesc& desc, int64_t block) {
  BlockLayout layout{};
  const int64_t panels = ceil_div(desc.n, 16);
  layout.panels = std::min(kBlockPanels, panels - block * kBlockPanels);
  layout.slabs = ceil_div(desc.k, desc.slab);
  switch (desc.format) {
    case WeightFormat::kF32:
      layout.value_bytes = 64 * desc.slab;
      break;
    case WeightFormat::kBf16:
      layout.value_bytes = 32 * desc.slab;
      break;
    case WeightFormat::kFp8:
      layout.value_bytes = 16 * desc.slab;
      break;
    case WeightFormat::kFp4:
      layout.value_bytes = 8 * desc.slab;
      break;
  }
  if (desc.format == WeightFormat::kFp8) layout.scale_bytes = 4;
  if (desc.format == WeightFormat::kFp4) layout.scale_bytes = 16;
  layout.offset = block * kBlockPanels * layout.slabs * (layout.value_bytes + layout.scale_bytes);
  return layout;
}

}  // namespace detail

namespace {

void check_desc(const WeightDesc& d) {
  HADAL_CHECK(d.n > 0 && d.k > 0, "gemm: weight shape [", d.n, ", ", d.k, "]");
  HADAL_CHECK(d.slab == 32 || d.slab == 128, "gemm: slab of ", d.slab, ", expected 32 or 128");
  const bool fp4 = d.format == WeightFormat::kFp4, fp8 = d.format == WeightFormat::kFp8;
  HADAL_CHECK(!fp4 || (d.slab == 32 && d.scale == ScaleType::kE8m0 && d.k % 2 == 0),
              "gemm: FP4 weights need slabs of 32, E8M0 scales and an even k, found slab ", d.slab,
              " and k ", d.k);
  HADAL_CHECK(fp4 || fp8 == (d.scale != ScaleType::kNone),
              "gemm: FP8 weights need scales, BF16 and F32 weights have none");
}

float e8m0_to_float(uint8_t code) {
  const uint32_t bits = code == 0 ? 0x00400000u : static_cast<uint32_t>(code) << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

class Packer {
 public:
  Packer(const WeightDesc& desc, const void* weight, const void* scale)
      : d_(desc), weight_(static_cast<const uint8_t*>(weight)), scale_(scale) {}

  void panel(int64_t panel, int64_t slab, uint8_t* values, uint8_t* scales) const {
    const int64_t k0 = slab * d_.slab;
    for (int64_t lane = 0; lane < 16; ++lane) {
      const int64_t row = panel * 16 + lane;
      if (d_.format == WeightFormat::kFp4)
        scales[lane] = row < d_.n
                           ? static_cast<const uint8_t*>(scale_)[row * ceil_div(d_.k, 32) + slab]
                           : uint8_t{127};
      if (row < d_.n) lane_values(row, lane, k0, std::min<int64_t>(d_.slab, d_.k - k0), values);
    }
    if (d_.format == WeightFormat::kFp8) {
      const int64_t index = panel * 16 / 128 * ceil_div(d_.k, 128) + k0 / 128;
      const float s = d_.scale == ScaleType::kF32
                          ? static_cast<const float*>(scale_)[index]
                          : e8m0_to_float(static_cast<const uint8_t*>(scale_)[index]);
      std::memcpy(scales, &s, 4);
    }
  }

 private:
  void lane_values(int64_t row, int64_t lane, int64_t k0, int64_t count, uint8_t* values) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = row * d_.k + k0 + i;
      const int64_t odd = i & 1, pair = i / 2;
      switch (d_.format) {
        case WeightFormat::kF32:
          std::memcpy(values + (i * 16 + lane) * 4, weight_ + at * 4, 4);
          break;
        case WeightFormat::kBf16:
          std::memcpy(values + pair * 64 + lane * 4 + odd * 2, weight_ + at * 2, 2);
          break;
        case WeightFormat::kFp8:  // a dword: even of two pairs, then odd of two pairs
          values[pair / 2 * 64 + lane * 4 + odd * 2 + pair % 2] = weight_[at];
          break;
        case WeightFormat::kFp4: {  // a dword: even elements of four pairs, then odd ones
          const int code = weight_[at / 2] >> (at % 2 * 4) & 15;
          const int64_t nibble = pair % 4;
          uint8_t& byte = values[pair / 4 * 64 + lane * 4 + odd * 2 + nibble / 2];
          byte = static_cast<uint8_t>(byte | code << (nibble % 2 * 4));
          break;
        }
      }
    }
  }

  const WeightDesc& d_;
  const uint8_t* weight_;
  const void* scale_;
};

float bf16_value(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

/// Rows with K padded to the slab, in the type the kernels of this processor multiply.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0, element = 0;
  std::vector<uint8_t> storage;
};

void prepare(const GemmParams& p, bool native_bf16, Rows* rows) {
  const int64_t padded = align_up(p.desc.k, p.desc.slab);
  const bool as_bf16 =
      native_bf16 && p.x_type == RowType::kBf16 && p.desc.format != WeightFormat::kF32;
  const bool same = as_bf16 == (p.x_type == RowType::kBf16);
  rows->element = as_bf16 ? 2 : 4;
  if (same && padded == p.desc.k) {
    rows->data = p.x;
    rows->stride = p.x_stride;
    return;
  }
  rows->stride = padded;
  rows->storage.assign(static_cast<size_t>(p.rows * padded * rows->element), 0);
  parallel_for(p.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* out = rows->storage.data() + r * padded * rows->element;
      const auto* in =
          static_cast<const uint8_t*>(p.x) + r * p.x_stride * (p.x_type == RowType::kBf16 ? 2 : 4);
      if (same) {
        std::memcpy(out, in, static_cast<size_t>(p.desc.k * rows->element));
        continue;
      }
      for (int64_t i = 0; i < p.desc.k; ++i) {
        uint16_t h;
        std::memcpy(&h, in + i * 2, 2);
        const float value = bf16_value(h);
        std::memcpy(out + i * 4, &value, 4);
      }
    }
  });
  rows->data = rows->storage.data();
}

struct Task {
  int64_t product, block, row0, rows;
};

}  // namespace

size_t packed_bytes(const WeightDesc& desc) {
  check_desc(desc);
  const auto layout = detail::block_layout(desc, 0);
  return static_cast<size_t>(ceil_div(desc.n, 16) * layout.slabs *
                             (layout.value_bytes + layout.scale_bytes));
}

void pack(const WeightDesc& desc, const void* weight, const void* scale, void* dst) {
  std::memset(dst, 0, packed_bytes(desc));
  const Packer packer(desc, weight, scale);
  const int64_t blocks = ceil_div(ceil_div(desc.n, 16), detail::kBlockPanels);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto layout = detail::block_layout(desc, b);
      for (int64_t s = 0; s < layout.slabs; ++s) {
        uint8_t* base = static_cast<uint8_t*>(dst) + layout.offset + s * layout.slab_bytes();
        for (int64_t q = 0; q < layout.panels; ++q)
          packer.panel(b * detail::kBlockPanels + q, s, base + q * layout.value_bytes,
                       base + layout.panels * layout.value_bytes + q * layout.scale_bytes);
      }
    }
  });
}

void gemm(const GemmParams& params) { grouped_gemm(&params, 1); }

void grouped_gemm(const GemmParams* params, int64_t count) {
  bool native_bf16 = false;
  detail::native_bf16_slot(&native_bf16);
  std::vector<Rows> rows(static_cast<size_t>(count));
  std::vector<Task> tasks;
  for (int64_t i = 0; i < count; ++i) {
    const GemmParams& p = params[i];
    HADAL_CHECK(p.rows >= 0, "gemm: ", p.rows, " rows");
    if (p.rows == 0) continue;
    check_desc(p.desc);
    prepare(p, native_bf16, &rows[static_cast<size_t>(i)]);
    const int64_t blocks = ceil_div(ceil_div(p.desc.n, 16), detail::kBlockPanels);
    for (int64_t r = 0; r < p.rows; r += detail::kMaxTileRows)
      for (int64_t b = 0; b < blocks; ++b)
        tasks.push_back({i, b, r, std::min(detail::kMaxTileRows, p.rows - r)});
  }
  std::atomic<int64_t> next{0};
  const auto total = static_cast<int64_t>(tasks.size());
  parallel_for(std::min<int64_t>(num_threads(), total), 1, [&](int64_t begin, int64_t end) {
    static thread_local std::unique_ptr<float[]> scratch;
    if (!scratch) scratch.reset(new float[detail::kScratchFloats + 16]);
    auto* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.get()) + 63) &
                                             ~uintptr_t{63});
    static_cast<void>(begin);
    static_cast<void>(end);
    for (int64_t t = next.fetch_add(1); t < total; t = next.fetch_add(1)) {
      const Task& task = tasks[static_cast<size_t>(t)];
      const Rows& r = rows[static_cast<size_t>(task.product)];
      detail::tile_slot({&params[task.product],
                         static_cast<const uint8_t*>(r.data) + task.row0 * r.stride * r.element,
                         r.stride, task.block, task.row0, task.rows, aligned});
    }
  });
}

void quantize_rows_fp8(
    const void* x, RowType x_type, uint16_t* y, int64_t rows, int64_t k, int64_t group) {
  HADAL_CHECK(group > 0 && k % group == 0, "quantize_rows_fp8: k ", k, " and groups of ", group);
  const auto value = [&](int64_t i) {
    return x_type == RowType::kBf16 ? bf16_value(static_cast<const uint16_t*>(x)[i])
                                    : static_cast<const float*>(x)[i];
  };
  parallel_for(rows * (k / group), 64, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      float largest = 1e-4f;
      for (int64_t i = g * group; i < (g + 1) * group; ++i)
        largest = std::max(largest, std::fabs(value(i)));
      const float ratio = largest * (1.0f / 448.0f);
      uint32_t bits;
      std::memcpy(&bits, &ratio, 4);
      const int exponent = static_cast<int>(bits >> 23) - 127 + ((bits & 0x7fffffu) != 0 ? 1 : 0);
      for (int64_t i = g * group; i < (g + 1) * group; ++i) {
        const float scaled = std::clamp(std::ldexp(value(i), -exponent), -448.0f, 448.0f);
        // Adding and taking away 1.5 * 2^23 ulps of the E4M3 step rounds to nearest even.
        const int step = std::max(std::fabs(scaled) > 0.0f ? std::ilogb(scaled) : -6, -6) - 3;
        const float magic = std::ldexp(12582912.0f, step);
        const float rounded = std::copysign((scaled + magic) - magic, scaled);
        const float result = std::ldexp(rounded, exponent);
        std::memcpy(&bits, &result, 4);
        y[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
  });
}

}  // namespace hadal::gemm
