// The choice of the next token from its logits. Torch-free, one row at a time.
//
// Randomness is keyed by (seed, position): the same seed gives the same text alone, in a batch, on
// any number of threads and after a resumption (numerics contract, rule 3).
#pragma once

#include <cstdint>
#include <span>

namespace hadal::ops {

struct SamplingParams {
  double temperature = 1.0;  ///< 0: the largest logit, ties to the lower id
  double top_p = 1.0;        ///< smallest set of most likely tokens with at least this mass
  uint64_t seed = 0;
};

/// Samples exactly from softmax(logits / temperature) restricted to the top-p set, by Gumbel's
/// trick (as the official demo's exponential noise does). `position` is that of the token being
/// chosen. NaN logits are never chosen; an Error when all are NaN or the row is empty.
int64_t sample_token(std::span<const float> logits, const SamplingParams& params, int64_t position);

/// log softmax(logits)[token] in double precision.
double log_probability(std::span<const float> logits, int64_t token);

}  // namespace hadal::ops
