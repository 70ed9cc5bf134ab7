// The choice of next tokens from rows of logits. Torch-free.
//
// Randomness is keyed by (seed, choice, position): the same seed gives the same text alone, in a
// batch, on any number of threads and after a resumption (numerics contract, rule 3).
//
// The order of everything that bears on the choice:
//   adjust_logits   logit bias, repetition penalty, frequency and presence penalty, token mask
//   the draw        temperature, top-k, top-p of what top-k left, min-p, the draw
// Log-probabilities are offered of both ends: of the model, from the row as it came, and of the
// distribution that was drawn from, behind everything above.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/sampling.h"
#include "ops/sampling/adjust_logits.h"

namespace hadal::ops {

/// One token to draw.
struct DrawRow {
  std::span<const float> logits;  ///< [vocab]
  Adjustment adjustment;
  int64_t position = 0;       ///< of the token to be drawn
  int64_t choice = 0;         ///< the answer's number among several to one prompt; below 2^32
  int64_t top_logprobs = -1;  ///< -1: no log-probabilities of the model; k: with the k likeliest
  bool sampled_logprob = false;
};

struct Drawn {
  int64_t token = -1;  ///< -1: every logit is NaN or -infinity
  double logprob = 0;  ///< of the model; with top_logprobs >= 0
  std::vector<TokenLogprob> top;
  double sampled_logprob = 0;  ///< of the distribution drawn from; 0 at temperature 0
};

/// Draws from each row exactly from softmax(logits / temperature) restricted to the top-k, top-p
/// and min-p sets, by Gumbel's trick (as the official demo's exponential noise does): rows in
/// parallel, one row in pieces. Logits that are NaN or -infinity are never chosen. `drawn` has
/// [rows].
void draw_rows(std::span<const DrawRow> rows, std::span<Drawn> drawn);

/// One row as it is. Errors: Error where nothing can be drawn.
int64_t sample_token(std::span<const float> logits,
                     const Sampling& sampling,
                     int64_t position,
                     int64_t choice = 0);

/// log softmax of a row, in double precision; NaN logits have no mass.
class LogSoftmax {
 public:
  /// Errors: Error for a row whose logits are all NaN or -infinity.
  explicit LogSoftmax(std::span<const float> logits);
  double of(int64_t token) const;
  /// The `count` likeliest tokens, likeliest first, ties to the lower id; fewer if the row has
  /// fewer that are not NaN.
  std::vector<TokenLogprob> top(int64_t count) const;

 private:
  std::span<const float> logits_;
  double highest_, log_total_;
};

}  // namespace hadal::ops
