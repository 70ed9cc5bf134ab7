// How a token is drawn from its logits: what a client asks for, from the API down to the op.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace hadal {

/// Randomness is keyed by (seed, choice, position) alone, so that a request with a seed gives the
/// same tokens alone, in a batch, after preemption and on resume.
struct Sampling {
  double temperature = 1.0;  ///< 0: the largest logit, ties to the lower id
  double top_p = 1.0;        ///< (0, 1]: the fewest likeliest tokens with this mass
  uint64_t seed = 0;
  int64_t top_k = 0;                ///< only the k likeliest, ties to the lower id; 0: no limit
  double min_p = 0.0;               ///< [0, 1): of the most likely token's probability
  double repetition_penalty = 1.0;  ///< > 0; on every token of the prompt and the answer: logits
                                    ///< are divided by it where positive, multiplied where negative
  double presence_penalty = 0.0;    ///< [-2, 2]; off the logits of tokens of the answer
  double frequency_penalty = 0.0;   ///< [-2, 2]; off them as often as they stand there
  std::vector<std::pair<int64_t, double>> logit_bias = {};  ///< token, added to its logit
};

struct TokenLogprob {
  int64_t token = 0;
  double logprob = 0;
  friend bool operator==(const TokenLogprob&, const TokenLogprob&) = default;
};

}  // namespace hadal
