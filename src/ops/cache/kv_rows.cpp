#include "ops/cache/kv_rows.h"

#include <utility>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/cache/rows_sm90.h"
#include "ops/op.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

/// [n, groups] UE8M0 bytes -> factors [n, groups, 1] FP32.
at::Tensor factors(const at::Tensor& bytes) {
  return bytes.to(at::kInt).bitwise_left_shift(23).view(at::kFloat).unsqueeze(-1);
}

at::Tensor unpack_latents(const at::Tensor& bytes, const RowFormat& format) {
  const int64_t n = bytes.size(0), rounded = format.width - format.rotary;
  const at::Tensor codes = bytes.narrow(1, 0, rounded).contiguous().view(at::kFloat8_e4m3fn);
  const at::Tensor scales = bytes.narrow(1, rounded + 2 * format.rotary, rounded / 64);
  const at::Tensor values =
      (codes.to(at::kFloat).reshape({n, -1, 64}) * factors(scales)).reshape({n, rounded});
  const at::Tensor rotary =
      bytes.narrow(1, rounded, 2 * format.rotary).contiguous().view(at::kBFloat16);
  return at::cat({values.to(at::kBFloat16), rotary}, 1);
}

at::Tensor unpack_keys(const at::Tensor& bytes, const RowFormat& format) {
  const int64_t n = bytes.size(0);
  const at::Tensor pairs = bytes.narrow(1, 0, format.width / 2);
  const at::Tensor codes =
      at::stack({pairs.bitwise_and(15), pairs.div(16, "floor")}, -1).reshape({n, format.width});
  // 0, 0.5, 1, 1.5, 2, 3, 4, 6: no table, which another device would have to be sent.
  const at::Tensor code = codes.bitwise_and(7), x = code.to(at::kFloat);
  const at::Tensor magnitude =
      at::where(code < 4, x * 0.5, at::where(code < 6, x - 2.0, x * 2.0 - 8.0));
  const at::Tensor values = at::where(codes < 8, magnitude, -magnitude);
  return (values.reshape({n, -1, 32}) *
          factors(bytes.narrow(1, format.width / 2, format.width / 32)))
      .reshape({n, format.width})
      .to(at::kBFloat16);
}

/// Groups of `size` channels as pack_row() scales them: [n, groups, size] FP32, and the bytes of
/// their scales [n, groups].
std::pair<at::Tensor, at::Tensor> scale_groups(const at::Tensor& rows,
                                               int64_t size,
                                               double significand,
                                               int64_t shift) {
  const at::Tensor values = rows.to(at::kFloat).reshape({rows.size(0), -1, size});
  const at::Tensor amax = values.abs().amax(-1);
  const auto [fraction, exponent_of] = at::frexp(amax);  // amax = fraction * 2^exponent_of
  const at::Tensor exponent =
      (exponent_of - 1 - shift + (fraction * 2.0 > significand).to(at::kInt))
          .masked_fill(amax == 0, 0);
  // Two steps, since 2^127 has no normal inverse.
  const at::Tensor half = exponent.neg().div(2, "trunc"), rest = exponent.neg() - half;
  // By their bits: a device's exp2 promises no exact powers.
  const auto power = [](const at::Tensor& k) { return factors((k + 127).to(at::kByte)); };
  return {values * power(half) * power(rest), (exponent + 127).to(at::kByte)};
}

at::Tensor pack_latents(const at::Tensor& rows, const RowFormat& format) {
  const int64_t n = rows.size(0), rounded = format.width - format.rotary;
  const auto [values, scales] = scale_groups(rows.narrow(1, 0, rounded), 64, 1.75, 8);
  const at::Tensor codes = values.to(at::kFloat8_e4m3fn).reshape({n, rounded}).view(at::kByte);
  const at::Tensor rotary = rows.narrow(1, rounded, format.rotary).contiguous().view(at::kByte);
  const int64_t used = rounded + 2 * format.rotary + rounded / 64;
  return at::cat({codes, rotary, scales, at::zeros({n, format.bytes() - used}, codes.options())},
                 1);
}

at::Tensor pack_keys(const at::Tensor& rows, const RowFormat& format) {
  const auto [values, scales] = scale_groups(rows, 32, 1.5, 2);
  const at::Tensor flat = values.reshape({rows.size(0), format.width}), x = flat.abs();
  const at::Tensor code = at::where(x < 2, x * 2.0, at::where(x < 4, x + 2.0, x * 0.5 + 4.0));
  const at::Tensor nibbles =
      (code + at::signbit(flat).to(at::kFloat) * 8.0).to(at::kByte).reshape({rows.size(0), -1, 2});
  return at::cat({nibbles.select(2, 0) + nibbles.select(2, 1) * 16, scales}, 1);
}

/// Whether the Hopper kernels pack rows of this format.
bool packs_on_sm90(const RowFormat& format) {
  if (format.kind == RowKind::kIndexKey) return format.width == 128;
  return format.rotary == kRotaryDim && format.width > 64 && format.width <= 512 &&
         format.width % 64 == 0;
}

at::Tensor pack_on_sm90(const at::Tensor& rows_any, const RowFormat& format) {
  const at::Tensor rows = kernel_input(rows_any);
  at::Tensor bytes = at::empty({rows.size(0), format.bytes()}, rows.options().dtype(at::kByte));
  if (format.kind == RowKind::kLatent) {
    run_sm90(rows, latent_rows_sm90, latent_rows_twin,
             {.x = bf16_data(rows),
              .weight = nullptr,
              .cos_sin = nullptr,
              .place = nullptr,
              .out = bytes.mutable_data_ptr<uint8_t>(),
              .rows = rows.size(0),
              .width = format.width,
              .stride = format.width,
              .eps = 0.0f});
  } else {
    run_sm90(rows, index_rows_sm90, index_rows_twin,
             {.x = bf16_data(rows),
              .weight = nullptr,
              .cos_sin = nullptr,
              .place = nullptr,
              .out = bytes.mutable_data_ptr<uint8_t>(),
              .rows = rows.size(0),
              .heads = 1,
              .eps = 0.0f});
  }
  return bytes;
}

}  // namespace

namespace reference {

at::Tensor pack_rows(const at::Tensor& rows, const RowFormat& format) {
  return format.kind == RowKind::kLatent ? pack_latents(rows, format) : pack_keys(rows, format);
}

}  // namespace reference

at::Tensor pack_rows(const at::Tensor& rows, const RowFormat& format) {
  check_shape(rows, {-1, format.width}, "pack_rows: rows");
  HADAL_CHECK(format.packed() && rows.scalar_type() == at::kBFloat16, "pack_rows: rows are ",
              rows.scalar_type(), ", expected BF16");
  if (packs_on_sm90(format) && use_sm90(rows)) return pack_on_sm90(rows, format);
  if (!rows.is_cpu() || reference_forced()) return reference::pack_rows(rows, format);
  const at::Tensor source = rows.contiguous();
  at::Tensor bytes = at::empty({rows.size(0), format.bytes()}, at::kByte);
  const auto* in = static_cast<const uint16_t*>(source.const_data_ptr());
  auto* out = bytes.mutable_data_ptr<uint8_t>();
  for (int64_t row = 0; row < rows.size(0); ++row) {
    HADAL_CHECK(pack_row(in + row * format.width, format, out + row * format.bytes()),
                "pack_rows: row ", row, " did not go through its round trip");
  }
  return bytes;
}

at::Tensor unpack_rows(const at::Tensor& bytes, const RowFormat& format) {
  check_shape(bytes, {-1, format.bytes()}, "unpack_rows: bytes");
  HADAL_CHECK(format.packed() && bytes.scalar_type() == at::kByte, "unpack_rows: rows are ",
              bytes.scalar_type(), ", expected packed bytes");
  return format.kind == RowKind::kLatent ? unpack_latents(bytes, format)
                                         : unpack_keys(bytes, format);
}

at::Tensor dense_rows(const at::Tensor& rows, const RowFormat& format) {
  return format.packed() ? unpack_rows(rows, format) : rows;
}

}  // namespace hadal::ops
