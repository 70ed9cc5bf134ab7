// CPU kernel contract of sampling (sample.h): which tokens of a row can win at all. What they find
// is exact, so any split over threads and any instruction set chooses the same token.
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace hadal::ops {

/// The tokens whose key, scaled logit + Gumbel noise, may reach `bound`. A draw with the leading
/// word at least 2^(32-n) has noise of at most n ln 2, so no logarithm is needed.
struct ReachParams {
  const float* logits;  ///< [vocab]
  float highest;        ///< among the logits
  float inverse;        ///< 1 / temperature
  float bound;          ///< with room for rounding below it
  float floor;          ///< only tokens of at least this logit
  uint64_t seed, stream;
  uint32_t choice;  ///< upper half of the counter; the token is the lower
};

/// Tokens [begin, begin + 64 n), those up to `end`: bit t of words[w] says whether token
/// begin + 64 w + t may reach the bound. NaN may.
extern CpuSlot<void(const ReachParams&, int64_t, int64_t, uint64_t*)> reaching_cpu;

struct MassParams {
  const float* logits;  ///< [vocab]
  int64_t vocab;
  float highest, inverse;  ///< as above
  int64_t token;
};

/// masses[0]: the sum of exp(scaled logit); masses[1]: of the tokens likelier than `token`, equal
/// ones with a lower id included. NaN counts as nothing.
extern CpuSlot<void(const MassParams&, double*)> masses_cpu;

/// The place of the largest of [n] that is neither NaN nor -infinity, of equal ones the first; -1.
extern CpuSlot<void(const float*, int64_t, int64_t*)> largest_cpu;

}  // namespace hadal::ops
