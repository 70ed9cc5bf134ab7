// What the device's sampler and its twin compute of single tokens. Host and device.
#pragma once

#include "base/philox.h"
#include "ops/exact_math.h"
#include "ops/sampling/sample_sm90.h"

namespace hadal::ops {

/// exp(scaled) for scaled <= 0 in units of 2^-44; NaN and -infinity have none.
HADAL_EXACT uint64_t mass_of(float scaled) {
  return scaled <= 0.0f ? static_cast<uint64_t>(rintf(exp_exact(scaled) * 0x1p44f)) : 0;
}
/// The logarithm of a sum of masses.
HADAL_EXACT double log_mass(uint64_t sum) { return log64(static_cast<double>(sum) * 0x1p-44); }

/// A logit with bias and penalties (adjust_logits.h).
HADAL_EXACT float changed_logit(float logit,
                                const LogitChangeSm90& change,
                                const SamplingRowSm90& row) {
  logit = static_cast<float>(logit + change.bias);
  if (change.in_answer < 0) return logit;
  double x = logit;
  x = x > 0.0 ? x / row.repetition_penalty : x * row.repetition_penalty;
  if (change.in_answer > 0) {
    const double frequency = row.frequency_penalty * static_cast<double>(change.in_answer);
    x -= frequency + row.presence_penalty;
  }
  return static_cast<float>(x);
}

/// An order of tokens: likelier ones are larger, of equal logits the lower id. 0, below all, for
/// logits that are never chosen: NaN and -infinity.
HADAL_EXACT uint64_t rank_of(float logit, int64_t token) {
  if (!(logit > -INFINITY)) return 0;
  const uint32_t bits = float_bits(logit + 0.0f);  // one zero
  const uint32_t ordered = bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
  return static_cast<uint64_t>(ordered) << 32 |
         static_cast<uint32_t>(~static_cast<uint32_t>(token));
}
HADAL_EXACT int32_t token_of(uint64_t rank) {
  return static_cast<int32_t>(~static_cast<uint32_t>(rank));
}

/// (logit - highest) / temperature.
HADAL_EXACT double scaled_logit(float logit, float highest, const SamplingRowSm90& row) {
  return (static_cast<double>(logit) - static_cast<double>(highest)) / row.temperature;
}

/// The leading two words of a token's draw to its Gumbel noise.
HADAL_EXACT double gumbel(uint32_t word0, uint32_t word1) {
  const uint64_t uniform = static_cast<uint64_t>(word0) << 21 | word1 >> 11;  // of 2^53
  // Minus the logarithm of 1 - u, which is exact.
  const double draw = -log64(1.0 - static_cast<double>(uniform) * 0x1p-53);
  return -log64(draw > 0x1p-53 ? draw : 0x1p-53);
}

}  // namespace hadal::ops
