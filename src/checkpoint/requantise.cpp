#include "checkpoint/requantise.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"
#include "checkpoint/dequantise.h"

namespace hadal::checkpoint {
namespace {

bool same_values(const at::Tensor& dense, const at::Tensor& w) {
  return at::equal(dense.to(w.scalar_type()), w);
}

bool same_bits(const at::Tensor& dense, const at::Tensor& w) {
  const at::Tensor a = dense.to(at::kBFloat16).contiguous(), b = w.to(at::kBFloat16).contiguous();
  return at::equal(a.view(at::kShort), b.view(at::kShort));
}

/// One entry a 128 x 128 block to one an element.
at::Tensor spread_blocks(const at::Tensor& blocks, int64_t out, int64_t in) {
  return blocks.repeat_interleave(128, 0).repeat_interleave(128, 1).narrow(0, 0, out).narrow(1, 0,
                                                                                             in);
}

at::Tensor fp8_codes(const at::Tensor& values, const at::Tensor& exponent) {
  return at::ldexp(values, -spread_blocks(exponent, values.size(0), values.size(1)))
      .to(at::kFloat8_e4m3fn);
}

/// Packed codes; of values that lie on no code, some neighbour.
at::Tensor fp4_codes(const at::Tensor& values, const at::Tensor& exponent) {
  const int64_t out = values.size(0), in = values.size(1);
  const at::Tensor units =
      at::ldexp(values.reshape({out, in / 32, 32}), -exponent.unsqueeze(-1)).reshape({out, in});
  // Twice the magnitude, 0 to 12, names the code; 5, 7 and 9 to 11 are no codes.
  static const at::Tensor kCode = at::tensor({0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7}, at::kByte);
  const at::Tensor twice = (units.abs() * 2.0).clamp(0.0, 12.0).to(at::kInt);
  const at::Tensor code = kCode.index_select(0, twice.flatten())
                              .reshape({out, in})
                              .bitwise_or(at::signbit(units).to(at::kByte) * 8)
                              .reshape({out, in / 2, 2});
  return code.select(2, 0)
      .bitwise_or(code.select(2, 1).bitwise_left_shift(4))
      .contiguous()
      .view(at::kChar);
}

at::Tensor exponents_of(const at::Tensor& e8m0) { return e8m0.to(at::kInt) - 127; }

/// The smallest s >= -127 with amax <= limit 2^s, limit = mantissa 2^exponent. I32.
at::Tensor smallest_exponent(const at::Tensor& amax, double mantissa, int exponent) {
  const auto [m, e] = at::frexp(amax);
  return (e.to(at::kInt) - exponent + (m > mantissa).to(at::kInt)).clamp(-127, 127);
}

}  // namespace

at::Tensor dense_values(const at::Tensor& data, const at::Tensor& scale) {
  const at::ScalarType type = data.scalar_type();
  if (type == at::kFloat8_e4m3fn) return dequantise_fp8(data, scale);
  if (type == at::kByte || type == at::kChar) return dequantise_fp4(data, scale);
  return data;
}

std::optional<ops::StoredCodes> requantise(const at::Tensor& w, const at::Tensor& scale) {
  const int64_t out = w.size(0), in = w.size(1);
  const at::Tensor values = w.to(at::kFloat).contiguous();
  const bool blocks = scale.sizes() == at::IntArrayRef({ceil_div(out, 128), ceil_div(in, 128)});
  const bool groups = in % 32 == 0 && scale.sizes() == at::IntArrayRef({out, in / 32});
  ops::StoredCodes result{.data = {}, .scale = scale};
  if (blocks && scale.scalar_type() == at::kFloat) {
    result.data = (values / spread_blocks(scale, out, in)).to(at::kFloat8_e4m3fn);
  } else if (blocks && scale.scalar_type() == at::kByte) {
    result.data = fp8_codes(values, exponents_of(scale));
  } else if (groups && scale.scalar_type() == at::kByte) {
    result.data = fp4_codes(values, exponents_of(scale));
  } else {
    return std::nullopt;
  }
  if (!same_bits(dense_values(result.data, scale), w)) return std::nullopt;
  return result;
}

std::optional<ops::StoredCodes> requantise(const at::Tensor& w,
                                           Storage storage,
                                           const std::string& name) {
  const bool fp4 = storage == Storage::kFp4;
  HADAL_CHECK(fp4 || storage == Storage::kFp8, "requantise: no such storage for ", name);
  ops::StoredCodes result = fp4 ? quantise_fp4(w, name) : quantise_fp8(w, name);
  if (same_values(dense_values(result.data, result.scale), w)) return result;
  const at::Tensor values = w.to(at::kFloat).contiguous();
  const int64_t out = values.size(0), in = values.size(1);
  at::Tensor exponent;
  if (fp4) {
    exponent = smallest_exponent(values.reshape({out, in / 32, 32}).abs().amax(2), 0.75, 3);
    result.data = fp4_codes(values, exponent);
  } else {
    const int64_t rows = ceil_div(out, 128), columns = ceil_div(in, 128);
    exponent =
        smallest_exponent(at::constant_pad_nd(values, {0, columns * 128 - in, 0, rows * 128 - out})
                              .reshape({rows, 128, columns, 128})
                              .abs()
                              .amax({1, 3}),
                          0.875, 9);
    result.data = fp8_codes(values, exponent);
  }
  result.scale = (exponent + 127).to(at::kByte);
  if (!same_values(dense_values(result.data, result.scale), w)) return std::nullopt;
  return result;
}

}  // namespace hadal::checkpoint
