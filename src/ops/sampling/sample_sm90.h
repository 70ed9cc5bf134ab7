// The choice of the next token on Hopper, as functions of pointers, and its twin on the CPU
// (sample.h has the definition and the order of everything). Free of ATen.
//
// Masses. A token's mass is exp((logit - largest) * r) in FP32, r = 1 / temperature rounded to
// FP32, as a whole number of 2^-44; their sums are sums of whole numbers, the same in every order
// and on any number of blocks or cards (docs/decisions/0017-masses-are-integers.md). Whoever needs
// a log-sum-exp over the vocabulary, the sampler, log-probabilities and losses, adds these.
//
// Keys: (logit - largest) / temperature - log(exponential draw) in FP64, by the logarithm of
// ops/exact_math.h. No draw is below 2^-53. A logit of +infinity is no model's: what is drawn
// beside one is not defined.
#pragma once

#include <cstdint>
#include <limits>

#include "ops/kernel_types.h"

namespace hadal::ops {

/// What a row is drawn with; from Sampling (base/sampling.h).
struct SamplingRowSm90 {
  double temperature = 1.0;                                 ///< 0: the largest logit
  double least = -std::numeric_limits<double>::infinity();  ///< log(min_p); without: this
  double top_p = 1.0;
  double repetition_penalty = 1.0, presence_penalty = 0.0, frequency_penalty = 0.0;
  uint64_t seed = 0, stream = 0;  ///< stream: fnv1a64("sample") ^ position
  uint32_t choice = 0;
  int32_t top_k = 0;    ///< 0: all
  int32_t mask = -1;    ///< row of the masks, negative: none
  int32_t changes = 0;  ///< first of its changes
  int32_t num_changes = 0;
  int32_t avoided = 0;      ///< first of the tokens that it avoids, unless nothing else is allowed
  int32_t num_avoided = 0;  ///< different ones, at most 512
};

/// A token whose logit is biased or penalised, at most one a row and token.
struct LogitChangeSm90 {
  int32_t token;
  int32_t in_answer;  ///< how often it stands there; negative: not penalised at all
  double bias;        ///< added first; -0.0: none
};

struct SampleSm90Params {
  const float* logits;  ///< [num_rows, stride], read only, at a multiple of 16 bytes
  const SamplingRowSm90* rows;
  const LogitChangeSm90* changes;
  const uint32_t* masks;    ///< [.., mask_words] a bit a token, set where it is allowed; or null
  const int32_t* avoided;   ///< tokens that rows avoid; or null
  int32_t* tokens;          ///< [num_rows] -1 where no logit can be chosen
  int64_t num_rows, vocab;  ///< vocab: at most 400,000
  int64_t stride;           ///< a multiple of 4
  int64_t mask_words;
};
void sample_sm90(const SampleSm90Params& p, Stream stream);
void sample_twin(const SampleSm90Params& p);

/// Log-probabilities of the model, without changes or masks: of `picked`, of the likeliest, and the
/// log-sum-exp.
struct LogProbsSm90Params {
  const float* logits;     ///< [num_rows, stride] as above
  const int32_t* picked;   ///< [num_rows], negative: none; or null
  double* picked_logprob;  ///< [num_rows]; null with picked
  int32_t* tokens;         ///< [num_rows, count] likeliest first, ties to the lower id, then -1
  double* logprobs;        ///< [num_rows, count]
  double* log_sum_exp;     ///< [num_rows], or null
  int64_t num_rows, vocab, stride, count;  ///< count: at most 32
};
void log_probs_sm90(const LogProbsSm90Params& p, Stream stream);
void log_probs_twin(const LogProbsSm90Params& p);

}  // namespace hadal::ops
