#include "ops/cache/sm90_rows.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/cache/rows_sm90.h"
#include "ops/op.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

constexpr RowFormat kIndexRow{.kind = RowKind::kIndexKey, .width = 128};

}  // namespace

bool serves_cache_rows_sm90(const at::Tensor& x,
                            const at::Tensor& cos_sin,
                            const RowFormat& format) {
  if (cos_sin.size(1) * 2 != kRotaryDim || !use_sm90(x)) return false;
  if (format.kind == RowKind::kIndexKey) return format.width == kIndexRow.width;
  return format.kind == RowKind::kLatent && format.rotary == kRotaryDim &&
         (format.width == 128 || format.width == 256 || format.width == 512);
}

void cache_rows_sm90(const CacheRows& rows,
                     const RowFormat& format,
                     const at::Tensor& numbers,
                     const at::Tensor& out) {
  const int64_t count = rows.x.size(0);
  check_shape(rows.x, {-1, format.width}, "cache_rows: x");
  check_shape(rows.cos_sin, {count, -1, 2}, "cache_rows: cos_sin");
  check_shape(out, {-1, format.bytes()}, "cache_rows: out");
  if (numbers.defined()) check_shape(numbers, {count}, "cache_rows: numbers");
  const at::Tensor x = kernel_input(rows.x), weight = fp32_input(rows.weight),
                   cos_sin = kernel_input(rows.cos_sin);
  const int64_t* place = numbers.defined() ? numbers.const_data_ptr<int64_t>() : nullptr;
  if (format.kind == RowKind::kIndexKey) {
    run_sm90(x, index_rows_sm90, index_rows_twin,
             {.x = bf16_data(x),
              .weight = weight.const_data_ptr<float>(),
              .cos_sin = cos_sin.const_data_ptr<float>(),
              .place = place,
              .out = out.mutable_data_ptr<uint8_t>(),
              .rows = count,
              .heads = 1,
              .eps = static_cast<float>(rows.eps)});
    return;
  }
  run_sm90(x, latent_rows_sm90, latent_rows_twin,
           {.x = bf16_data(x),
            .weight = weight.const_data_ptr<float>(),
            .cos_sin = cos_sin.const_data_ptr<float>(),
            .place = place,
            .out = out.mutable_data_ptr<uint8_t>(),
            .rows = count,
            .width = format.width,
            .stride = format.width,
            .eps = static_cast<float>(rows.eps)});
}

at::Tensor rows_in_step_with(const at::Tensor& cache, int64_t count) {
  const int64_t bytes = cache.size(1) * cache.element_size();
  const at::Tensor memory = at::empty({(count + 1) * bytes}, cache.options().dtype(at::kByte));
  const auto theirs = reinterpret_cast<uintptr_t>(cache.const_data_ptr());
  const auto own = reinterpret_cast<uintptr_t>(memory.const_data_ptr());
  const auto unit = static_cast<uintptr_t>(bytes);
  const uintptr_t skip =
      own > theirs ? (unit - (own - theirs) % unit) % unit : (theirs - own) % unit;
  return memory.narrow(0, static_cast<int64_t>(skip), count * bytes)
      .view(cache.scalar_type())
      .view({count, cache.size(1)});
}

at::Tensor index_queries_sm90(const at::Tensor& q_any, const at::Tensor& cos_sin_any) {
  check_shape(q_any, {-1, -1, kIndexRow.width}, "index_queries: q");
  const at::Tensor q = kernel_input(q_any), cos_sin = kernel_input(cos_sin_any);
  at::Tensor packed =
      at::empty({q.size(0), q.size(1), kIndexRow.bytes()}, q.options().dtype(at::kByte));
  run_sm90(q, index_rows_sm90, index_rows_twin,
           {.x = bf16_data(q),
            .weight = nullptr,
            .cos_sin = cos_sin.const_data_ptr<float>(),
            .place = nullptr,
            .out = packed.mutable_data_ptr<uint8_t>(),
            .rows = q.size(0) * q.size(1),
            .heads = q.size(1),
            .eps = 0.0f});
  return packed;
}

}  // namespace hadal::ops
