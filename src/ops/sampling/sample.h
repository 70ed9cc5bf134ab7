// The choice of the next token from its logits. Torch-free, one row at a time.
//
// Randomness is keyed by (seed, choice, position): the same seed gives the same text alone, in a
// batch, on any number of threads and after a resumption (numerics contract, rule 3).
//
// The order of everything that bears on the choice:
//   adjust_logits   logit bias, repetition penalty, frequency and presence penalty, token mask
//   sample_token    temperature, top-k, top-p of what top-k left, min-p, the draw
// Log probabilities are those of the model: they are taken from the row before adjust_logits.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/sampling.h"

namespace hadal::ops {

/// How often each token stands in the prompt and in the answer so far.
class TokenHistory {
 public:
  void add_prompt(std::span<const int64_t> tokens);
  /// A token of the answer.
  void add(int64_t token) { ++counts_[token].in_answer; }
  /// Takes a token of the answer back (a rejected draft). Errors: Error if it is not there.
  void remove(int64_t token);

 private:
  friend void adjust_logits(std::span<float>,
                            const Sampling&,
                            const TokenHistory&,
                            std::span<const uint32_t>);
  struct Count {
    bool in_prompt = false;
    int64_t in_answer = 0;
  };
  std::unordered_map<int64_t, Count> counts_;
};

/// Whether adjust_logits would change anything without a mask.
bool adjusts_logits(const Sampling& sampling);

/// Applies bias and penalties in place, then sets the logits of forbidden tokens to -infinity.
/// `mask` has a bit for each token, set where it is allowed (token t: bit t % 32 of word t / 32);
/// tokens behind its end are forbidden; an empty mask allows all. Errors: Error for a biased token
/// outside the row.
void adjust_logits(std::span<float> logits,
                   const Sampling& sampling,
                   const TokenHistory& history,
                   std::span<const uint32_t> mask);

/// Samples exactly from softmax(logits / temperature) restricted to the top-k, top-p and min-p
/// sets, by Gumbel's trick (as the official demo's exponential noise does). `position` is that of
/// the token being chosen, `choice` the number of the answer among several to one prompt. Logits
/// that are NaN or -infinity are never chosen; an Error when all are or the row is empty.
int64_t sample_token(std::span<const float> logits,
                     const Sampling& sampling,
                     int64_t position,
                     int64_t choice = 0);

/// log softmax(logits)[token] in double precision; NaN logits have no mass.
double log_probability(std::span<const float> logits, int64_t token);

/// The `count` most likely tokens, likeliest first, ties to the lower id; fewer if the row has
/// fewer that are not NaN.
std::vector<TokenLogprob> top_log_probabilities(std::span<const float> logits, int64_t count);

}  // namespace hadal::ops
