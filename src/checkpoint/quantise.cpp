#include "checkpoint/quantise.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "model/parameter.h"

namespace hadal::checkpoint {
namespace {

at::Tensor checked(const at::Tensor& w, const std::string& name) {
  HADAL_CHECK(w.dim() == 2, "quantise: ", name, " has shape ", w.sizes());
  const at::Tensor values = w.detach().cpu().to(at::kFloat).contiguous();
  HADAL_INPUT_CHECK(at::isfinite(values).all().item<bool>(), name,
                    ": holds values that are not finite, which no FP8 or FP4 code stands for");
  return values;
}

/// The smallest s with amax <= limit 2^s, for limit = mantissa 2^exponent with mantissa in [0.5,
/// 1): ceil(log2(amax / limit)) without the rounding of a division. I32.
at::Tensor scale_exponent(const at::Tensor& amax, double floor, double mantissa, int exponent) {
  const auto [m, e] = at::frexp(amax.clamp_min(floor));
  return e.to(at::kInt) - exponent + (m > mantissa).to(at::kInt);
}

at::Tensor e8m0_bytes(const at::Tensor& exponent) {
  HADAL_CHECK((exponent >= -127).all().item<bool>() && (exponent <= 127).all().item<bool>(),
              "quantise: a scale outside 2^-127 to 2^127");
  return (exponent + 127).to(at::kByte);
}

}  // namespace

QuantisedTensor quantise_fp8(const at::Tensor& w, const std::string& name) {
  const at::Tensor values = checked(w, name);
  const int64_t out = values.size(0), in = values.size(1);
  const int64_t out_blocks = (out + 127) / 128, in_blocks = (in + 127) / 128;
  const at::Tensor amax =
      at::constant_pad_nd(values, {0, in_blocks * 128 - in, 0, out_blocks * 128 - out})
          .reshape({out_blocks, 128, in_blocks, 128})
          .abs()
          .amax({1, 3});
  const at::Tensor exponent = scale_exponent(amax, 1e-4, 0.875, 9);  // 448
  const at::Tensor spread =
      exponent.repeat_interleave(128, 0).repeat_interleave(128, 1).narrow(0, 0, out).narrow(1, 0,
                                                                                            in);
  const at::Tensor rounded = model::official_rounding(values, model::Storage::kFp8).to(at::kFloat);
  return {.data = at::ldexp(rounded, -spread).to(at::kFloat8_e4m3fn),
          .scale = e8m0_bytes(exponent)};
}

QuantisedTensor quantise_fp4(const at::Tensor& w, const std::string& name) {
  const at::Tensor values = checked(w, name);
  const int64_t out = values.size(0), in = values.size(1);
  HADAL_CHECK(in % 32 == 0, "quantise: ", name, " has ", in, " inputs, expected a multiple of 32");
  const at::Tensor amax = values.reshape({out, in / 32, 32}).abs().amax(2);
  const at::Tensor exponent = scale_exponent(amax, 6.0 * 0x1p-126, 0.75, 3);  // 6
  const at::Tensor rounded = model::official_rounding(values, model::Storage::kFp4)
                                 .to(at::kFloat)
                                 .reshape({out, in / 32, 32});
  const at::Tensor units = at::ldexp(rounded, -exponent.unsqueeze(-1));
  // Twice the magnitude, 0 to 12, names the code; the values in between do not occur.
  static const at::Tensor kCode = at::tensor({0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7}, at::kByte);
  const at::Tensor magnitude =
      kCode.index_select(0, (units.abs() * 2.0).to(at::kInt).flatten()).reshape({out, in});
  const at::Tensor code =
      magnitude.bitwise_or(at::signbit(units).reshape({out, in}).to(at::kByte) * 8);
  const at::Tensor pairs = code.reshape({out, in / 2, 2});
  return {.data = pairs.select(2, 0)
                      .bitwise_or(pairs.select(2, 1).bitwise_left_shift(4))
                      .contiguous()
                      .view(at::kChar),
          .scale = e8m0_bytes(exponent)};
}

}  // namespace hadal::checkpoint
