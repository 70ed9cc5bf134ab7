// exp, log and softplus by the same operations on a CPU and on a card, so that both have the same
// bits: additions, products, divisions and fused multiply-adds, each rounded once. In FP64 they are
// within one unit in the last place, so rounded to FP32 they are the C library's but where that is
// a tie within 2^-52. Host and device; kernels are compiled with --fmad=false.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HADAL_EXACT __host__ __device__ __forceinline__
#else
#define HADAL_EXACT inline
#endif

namespace hadal::ops {

HADAL_EXACT uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
HADAL_EXACT float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
HADAL_EXACT uint64_t double_bits(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}
HADAL_EXACT double bits_double(uint64_t bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

/// exp(x) within two units in the last place; 0 below -87, exp(88) above 88: the bits of the CPU's
/// vectors (ops/cpu/vec.h).
HADAL_EXACT float exp_exact(float x) {
  const float clamped = fminf(fmaxf(x, -87.0f), 88.0f);
  const float n = rintf(clamped * 1.44269504088896341f);
  float r = fmaf(n, -0.693359375f, clamped);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  return x < -87.0f ? 0.0f : p * bits_float(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23);
}

/// ln 2 in two parts; multiples of the first up to 2^11 are exact.
inline constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;

/// exp(x) for x <= 700; 0 below -700.
HADAL_EXACT double exp64(double x) {
  if (x < -700.0) return 0.0;
  const double n = rint(x * 0x1.71547652b82fep+0);
  const double r = fma(-n, kLn2Low, fma(-n, kLn2High, x));
  // The series' terms up to r^13 / 13!, |r| <= ln 2 / 2.
  double p = 1.0 / 6227020800.0;
  p = fma(p, r, 1.0 / 479001600.0);
  p = fma(p, r, 1.0 / 39916800.0);
  p = fma(p, r, 1.0 / 3628800.0);
  p = fma(p, r, 1.0 / 362880.0);
  p = fma(p, r, 1.0 / 40320.0);
  p = fma(p, r, 1.0 / 5040.0);
  p = fma(p, r, 1.0 / 720.0);
  p = fma(p, r, 1.0 / 120.0);
  p = fma(p, r, 1.0 / 24.0);
  p = fma(p, r, 1.0 / 6.0);
  p = fma(p, r, 0.5);
  p = fma(p, r * r, r) + 1.0;
  return p * bits_double(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

/// log(x) for normal positive x.
HADAL_EXACT double log64(double x) {
  // x = 2^k m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s) with s = f / (2 + f), f = m - 1.
  uint64_t bits = double_bits(x);
  const uint64_t shifted = bits - 0x3fe6a09e667f3bcdu;
  const auto k = static_cast<double>(static_cast<int64_t>(shifted) >> 52);
  bits = (shifted & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu;
  const double f = bits_double(bits) - 1.0;
  const double s = f / (2.0 + f), z = s * s;
  // sum over i of 2 z^i / (2 i + 1), i = 1 .. 10: |s| <= 0.1716.
  double r = 2.0 / 21.0;
  r = fma(r, z, 2.0 / 19.0);
  r = fma(r, z, 2.0 / 17.0);
  r = fma(r, z, 2.0 / 15.0);
  r = fma(r, z, 2.0 / 13.0);
  r = fma(r, z, 2.0 / 11.0);
  r = fma(r, z, 2.0 / 9.0);
  r = fma(r, z, 2.0 / 7.0);
  r = fma(r, z, 2.0 / 5.0);
  r = fma(r, z, 2.0 / 3.0);
  r = r * z;
  // log m = 2 s + s r, and 2 s = f - s f: f less a part that is small beside it.
  const double half = 0.5 * f * f;
  return fma(k, kLn2High, f - (half - fma(s, half + r, k * kLn2Low)));
}

/// log(1 + exp(x)), x itself above 20; a NaN stays one.
HADAL_EXACT double softplus64(double x) {
  if (!(x <= 20.0)) return x;
  const double t = exp64(x), u = 1.0 + t;
  return log64(u) + (t - (u - 1.0)) / u;  // what 1 + t lost, back
}

}  // namespace hadal::ops
