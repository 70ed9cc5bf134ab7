#include "ops/quant/official_storage.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/quant/round_trip.h"

namespace hadal::ops {
namespace {

/// Rounds each 128x128 block of [rows, in] to E4M3 with one power-of-two scale: the blocks' rows
/// are laid out as one group of 16384 for the round trip that activations use.
at::Tensor fp8_blocks(const at::Tensor& w) {
  const int64_t out = w.size(0), in = w.size(1);
  const int64_t out_blocks = (out + 127) / 128, in_blocks = (in + 127) / 128;
  const at::Tensor padded =
      at::constant_pad_nd(w, {0, in_blocks * 128 - in, 0, out_blocks * 128 - out});
  const at::Tensor blocks = padded.reshape({out_blocks, 128, in_blocks, 128})
                                .permute({0, 2, 1, 3})
                                .reshape({-1, 128 * 128});
  return fp8_round_trip(blocks, 128 * 128)
      .reshape({out_blocks, in_blocks, 128, 128})
      .permute({0, 2, 1, 3})
      .reshape({out_blocks * 128, in_blocks * 128})
      .narrow(0, 0, out)
      .narrow(1, 0, in)
      .contiguous();
}

/// The smallest s with amax <= limit 2^s, for limit = mantissa 2^exponent with mantissa in [0.5,
/// 1): ceil(log2(amax / limit)) without the rounding of a division. I32.
at::Tensor scale_exponent(const at::Tensor& amax, double floor, double mantissa, int exponent) {
  const auto [m, e] = at::frexp(amax.clamp_min(floor));
  return e.to(at::kInt) - exponent + (m > mantissa).to(at::kInt);
}

at::Tensor e8m0_bytes(const at::Tensor& exponent) {
  HADAL_CHECK((exponent >= -127).all().item<bool>() && (exponent <= 127).all().item<bool>(),
              "official_codes: a scale outside 2^-127 to 2^127");
  return (exponent + 127).to(at::kByte);
}

StoredCodes fp8_codes(const at::Tensor& values) {
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
  const at::Tensor rounded = official_rounding(values, OfficialStorage::kFp8).to(at::kFloat);
  return {.data = at::ldexp(rounded, -spread).to(at::kFloat8_e4m3fn),
          .scale = e8m0_bytes(exponent)};
}

StoredCodes fp4_codes(const at::Tensor& values) {
  const int64_t out = values.size(0), in = values.size(1);
  HADAL_CHECK(in % 32 == 0, "official_codes: ", in, " inputs, expected a multiple of 32");
  const at::Tensor amax = values.reshape({out, in / 32, 32}).abs().amax(2);
  const at::Tensor exponent = scale_exponent(amax, 6.0 * 0x1p-126, 0.75, 3);  // 6
  const at::Tensor rounded =
      official_rounding(values, OfficialStorage::kFp4).to(at::kFloat).reshape({out, in / 32, 32});
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

}  // namespace

at::Tensor official_rounding(const at::Tensor& w, OfficialStorage storage) {
  switch (storage) {
    case OfficialStorage::kFp4:
      return fp4_round_trip(w, 32).to(at::kBFloat16);
    case OfficialStorage::kFp8: {
      const at::Tensor flat = w.reshape({-1, w.size(-1)});
      return fp8_blocks(flat).reshape(w.sizes()).to(at::kBFloat16);
    }
    default:
      return w.to(at::kBFloat16);
  }
}

StoredCodes official_codes(const at::Tensor& w, OfficialStorage storage) {
  HADAL_CHECK(w.dim() == 2, "official_codes: w has shape ", w.sizes());
  HADAL_CHECK(storage == OfficialStorage::kFp8 || storage == OfficialStorage::kFp4,
              "official_codes: only FP8 and FP4 have codes");
  const at::Tensor values = w.detach().cpu().to(at::kFloat).contiguous();
  return storage == OfficialStorage::kFp8 ? fp8_codes(values) : fp4_codes(values);
}

}  // namespace hadal::ops
