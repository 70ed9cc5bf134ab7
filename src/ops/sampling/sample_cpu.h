// CPU kernel contract of sampling (sample.h): which tokens of a row can win at all, and sums over
// rows. What the first find is exact and sums walk one tree, so any split over threads and any
// instruction set chooses the same token.
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace hadal::ops {

/// The place of the largest of [n] that is neither NaN nor -infinity, of equal ones the first; -1.
extern CpuSlot<void(const float*, int64_t, int64_t*)> largest_cpu;

/// The tokens whose key, scaled logit + Gumbel noise, may reach `bound`. A draw with the leading
/// word at least 2^(32-n) has noise of at most n ln 2, so no logarithm is needed.
struct ReachParams {
  const float* logits;  ///< [count]
  const int32_t* ids;   ///< [count] tokens; null: the places themselves
  float highest;        ///< among the logits
  float inverse;        ///< 1 / temperature
  float bound;          ///< with room for rounding below it
  float floor;          ///< only tokens of at least this logit
  uint64_t seed, stream;
  uint32_t choice;  ///< upper half of the counter; the token is the lower
};

/// Places [begin, begin + 64 n), those up to `end`: bit t of words[w] says whether the token at
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

inline constexpr int kMassSteps = 8;
inline constexpr float kMassStep = 1.5f;  ///< between two bounds, of scaled logits

/// About masses_cpu's masses[0], to 1e-6 of it; then, for i < kMassSteps, the mass of the tokens
/// whose scaled logit is at least -(i + 1) kMassStep. `token` does not count.
extern CpuSlot<void(const MassParams&, double*)> step_masses_cpu;

struct GatherParams {
  const float* logits;  ///< [count]
  int64_t count;
  float floor;
  int32_t first;  ///< the id of logits[0]
};

/// Ids and logits of the tokens of at least `floor`, in order, to ids[*found] and values[*found]
/// on, where 16 more than are found may be written; `*found` counts them. NaN is not among them.
extern CpuSlot<void(const GatherParams&, int32_t* ids, float* values, int64_t* found)> gather_cpu;

/// The sum of exp((x - highest) * inverse) in double precision, to 1e-14 of it: sixteen sums of
/// every sixteenth, then a tree. NaN and -infinity count as nothing.
extern CpuSlot<void(const float* x, int64_t n, double highest, double inverse, double* total)>
    exp_total_cpu;

}  // namespace hadal::ops
