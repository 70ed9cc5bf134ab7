// Rows on their way to a cache and heads of attention: the CPU's kernels one after the other, whose
// bits the Hopper kernels have.
#include <algorithm>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/attention/heads_sm90.h"
#include "ops/attention/rope_cpu.h"
#include "ops/cache/kv_rows.h"
#include "ops/cache/rows_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/norm/rms_norm_cpu.h"
#include "ops/quant/round_trip_cpu.h"

namespace hadal::ops {
namespace {

void norm(
    uint16_t* rows, const float* weight, int64_t count, int64_t width, float eps, bool chain) {
  rms_norm_cpu({.x = rows,
                .weight = weight,
                .out = rows,
                .dim = width,
                .eps = eps,
                .dtype = ElementType::kBf16,
                .bf16_chain = chain},
               0, count);
}

/// The last 64 channels of heads [tokens, heads, width].
void rotate(uint16_t* rows,
            const float* cos_sin,
            int64_t tokens,
            int64_t heads,
            int64_t width,
            bool inverse) {
  rope_cpu({.x = rows,
            .out = rows,
            .cos_sin = cos_sin,
            .heads = heads,
            .dim = width,
            .rope_dim = kRotaryDim,
            .dtype = ElementType::kBf16,
            .inverse = inverse},
           0, tokens);
}

/// Row `from` of a step to its place, packed.
void store(const uint16_t* row,
           int64_t from,
           const RowFormat& format,
           const int64_t* place,
           uint8_t* out) {
  const int64_t to = place != nullptr ? place[from] : from;
  if (to < 0) return;
  HADAL_CHECK(pack_row(row, format, out + to * format.bytes()), "pack_rows: row ", from,
              " did not go through its round trip");
}

void rotated_head_rows(const HeadRowsSm90Params& p, int64_t begin, int64_t end) {
  const int64_t token = p.heads * p.width;
  uint16_t* rows = p.out + begin * token;
  if (p.out != p.x) std::copy(p.x + begin * token, p.x + end * token, rows);
  if (p.norm) norm(rows, nullptr, (end - begin) * p.heads, p.width, p.eps, true);
  rotate(rows, p.cos_sin + begin * kRotaryDim, end - begin, p.heads, p.width, p.inverse);
}

}  // namespace

void latent_rows_twin(const LatentRowsSm90Params& p) {
  const RowFormat format{.kind = RowKind::kLatent, .width = p.width, .rotary = kRotaryDim};
  const bool only_packs = p.weight == nullptr && p.cos_sin == nullptr;
  parallel_for(p.rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> row(static_cast<size_t>(p.width));
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(p.x + i * p.stride, p.width, row.data());
      if (p.weight != nullptr) norm(row.data(), p.weight, 1, p.width, p.eps, false);
      if (p.cos_sin != nullptr)
        rotate(row.data(), p.cos_sin + i * kRotaryDim, 1, 1, p.width, false);
      if (!only_packs && p.width > kRotaryDim) {
        fp8_round_trip_cpu({.x = row.data(),
                            .out = row.data(),
                            .stride = p.width,
                            .dim = p.width - kRotaryDim,
                            .group = 64,
                            .dtype = ElementType::kBf16},
                           0, 1);
      }
      store(row.data(), i, format, p.place, p.out);
    }
  });
}

void index_rows_twin(const IndexRowsSm90Params& p) {
  constexpr int64_t kWidth = 128;
  const RowFormat format{.kind = RowKind::kIndexKey, .width = kWidth};
  parallel_for(p.rows, 16, [&](int64_t begin, int64_t end) {
    uint16_t row[kWidth];
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(p.x + i * kWidth, kWidth, row);
      if (p.weight != nullptr) norm(row, p.weight, 1, kWidth, p.eps, false);
      if (p.cos_sin != nullptr) {
        rotate(row, p.cos_sin + i / p.heads * kRotaryDim, 1, 1, kWidth, false);
        hadamard_cpu({.x = row, .out = row, .dim = kWidth, .dtype = ElementType::kBf16}, 0, 1);
        fp4_round_trip_cpu({.x = row,
                            .out = row,
                            .stride = kWidth,
                            .dim = kWidth,
                            .group = 32,
                            .dtype = ElementType::kBf16},
                           0, 1);
      }
      store(row, i, format, p.place, p.out);
    }
  });
}

void head_rows_twin(const HeadRowsSm90Params& p) {
  parallel_for(p.tokens, 4, [&](int64_t begin, int64_t end) { rotated_head_rows(p, begin, end); });
}

void head_operand_twin(const HeadOperandSm90Params& p) {
  const int64_t values = p.heads / p.groups * p.width,
                bytes = values * 2 * p.x_groups * sm90::kGroupRows;
  std::vector<uint16_t> rows(static_cast<size_t>(p.tokens * p.heads * p.width));
  head_rows_twin({.x = p.x,
                  .cos_sin = p.cos_sin,
                  .out = rows.data(),
                  .tokens = p.tokens,
                  .heads = p.heads,
                  .width = p.width,
                  .eps = 0.0f,
                  .norm = false,
                  .inverse = true});
  std::memset(p.operand, 0, static_cast<size_t>(p.groups * bytes));
  for (int64_t token = 0; token < p.tokens; ++token) {
    for (int64_t group = 0; group < p.groups; ++group) {
      const auto* row =
          reinterpret_cast<const uint8_t*>(rows.data() + (token * p.groups + group) * values);
      for (int64_t k = 0; k < values * 2; k += 16) {
        std::memcpy(p.operand + group * bytes + sm90::operand_offset(token, k, p.x_groups), row + k,
                    16);
      }
    }
  }
}

}  // namespace hadal::ops
