#include "checkpoint/dequantise.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/op.h"

namespace hadal::checkpoint {

at::Tensor e8m0_to_float(const at::Tensor& bytes) {
  const at::Tensor b = bytes.to(at::kInt);
  const at::Tensor normal = b.bitwise_left_shift(23).view(at::kFloat);  // 255 gives infinity
  const at::Tensor subnormal = at::full_like(b, 0x00400000).view(at::kFloat);
  return at::where(b == 0, subnormal,
                   at::where(b == 255, std::numeric_limits<double>::quiet_NaN(), normal));
}

at::Tensor dequantise_fp8(const at::Tensor& data, const at::Tensor& scale) {
  const int64_t out = data.size(0), in = data.size(1);
  ops::check_shape(scale, {(out + 127) / 128, (in + 127) / 128}, "dequantise_fp8: scale");
  const at::Tensor factor = scale.scalar_type() == at::kFloat ? scale : e8m0_to_float(scale);
  const at::Tensor spread =
      factor.repeat_interleave(128, 0).repeat_interleave(128, 1).narrow(0, 0, out).narrow(1, 0, in);
  return data.to(at::kFloat) * spread;
}

at::Tensor dequantise_fp4(const at::Tensor& data, const at::Tensor& scale) {
  const int64_t out = data.size(0), in = data.size(1) * 2;
  ops::check_shape(scale, {out, in / 32}, "dequantise_fp4: scale");
  static const at::Tensor values =
      at::tensor({0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f,
                  -3.0f, -4.0f, -6.0f});
  const at::Tensor bytes = data.view(at::kByte);
  const at::Tensor codes = at::stack({bytes.bitwise_and(15), bytes.bitwise_right_shift(4)}, -1)
                               .reshape({-1})
                               .to(at::kInt);
  const at::Tensor dense = values.index_select(0, codes).reshape({out, in / 32, 32});
  return (dense * e8m0_to_float(scale).unsqueeze(-1)).reshape({out, in});
}

}  // namespace hadal::checkpoint
