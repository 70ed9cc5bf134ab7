#include "testing/stored_weights.h"

#include <cmath>
#include <random>

#include <ATen/ATen.h>

#include "ops/gemm/linear.h"

namespace hadal::testing {
namespace {

float power(int byte) { return std::ldexp(1.0f, byte - 127); }

}  // namespace

Stored make_fp4(int64_t out, int64_t in, unsigned seed) {
  const float magnitudes[8] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
  std::mt19937 random(seed);
  Stored s{at::empty({out, in / 2}, at::kByte), at::empty({out, in / 32}, at::kByte),
           at::empty({out, in}, at::kFloat)};
  auto* data = s.data.data_ptr<uint8_t>();
  auto* scale = s.scale.data_ptr<uint8_t>();
  auto* value = s.values.data_ptr<float>();
  for (int64_t i = 0; i < s.data.numel(); ++i) data[i] = static_cast<uint8_t>(random());
  for (int64_t i = 0; i < s.scale.numel(); ++i)
    scale[i] = static_cast<uint8_t>(110 + random() % 20);
  for (int64_t i = 0; i < out * in; ++i) {
    const int code = data[i / 2] >> (i % 2 * 4) & 15;
    value[i] = ((code & 8) != 0 ? -1.0f : 1.0f) * magnitudes[code & 7] * power(scale[i / 32]);
  }
  s.values = s.values.to(at::kBFloat16);
  return s;
}

Stored make_fp8(int64_t out, int64_t in, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t columns = (in + 127) / 128;
  Stored s{at::empty({out, in}, at::kByte), at::empty({(out + 127) / 128, columns}, at::kByte),
           at::empty({out, in}, at::kFloat)};
  auto* data = s.data.data_ptr<uint8_t>();
  auto* scale = s.scale.data_ptr<uint8_t>();
  auto* value = s.values.data_ptr<float>();
  for (int64_t i = 0; i < s.scale.numel(); ++i)
    scale[i] = static_cast<uint8_t>(110 + random() % 20);
  for (int64_t i = 0; i < out * in; ++i) {
    int code = static_cast<int>(random() % 256);
    if ((code & 127) == 127) code &= ~8;
    data[i] = static_cast<uint8_t>(code);
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float v = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    value[i] = ((code & 128) != 0 ? -v : v) * power(scale[i / in / 128 * columns + i % in / 128]);
  }
  s.data = s.data.view(at::kFloat8_e4m3fn);
  s.values = s.values.to(at::kBFloat16);
  return s;
}

ops::Panels fp4(const Stored& stored) {
  return ops::pack_fp4({stored.data}, {stored.scale}).value();
}
ops::Panels fp8(const Stored& stored) {
  return ops::pack_fp8({stored.data}, {stored.scale}).value();
}

Stored near_fp4(int64_t out, int64_t in, unsigned seed) {
  Stored s = make_fp4(out, in, seed);
  s.scale = s.scale.remainder(14).add(113).to(at::kByte);
  s.data[1].narrow(0, 0, 16).fill_(0x08);
  s.scale[1][0] = 3;
  s.values = ops::unpack_panels(fp4(s))[0];
  return s;
}

at::Tensor fp8_rows(int64_t rows, int64_t in) {
  return ops::quantise_input(at::randn({rows, (in + 127) / 128 * 128}), ops::GemmRole::kFp8,
                             ops::Numerics::kReleased)
      .narrow(1, 0, in)
      .to(at::kBFloat16)
      .contiguous();
}

}  // namespace hadal::testing
