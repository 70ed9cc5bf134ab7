// Models as a serving process on a card holds them, and passes that say where their bits first
// differ.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/transformer.h"
#include "ops/op.h"

namespace hadal::testing {

/// A random model whose matrices are packed for the Hopper kernels: in `released` FP8 and FP4 where
/// an official checkpoint has them, BF16 elsewhere and in `bf16`. On the CPU.
model::Transformer packed_model(const model::ModelConfig& config,
                                ops::Numerics numerics,
                                uint64_t seed);

/// What a pass computed, by name in the order of computation, on the CPU.
struct TracedPass {
  std::vector<std::pair<std::string, at::Tensor>> values;
  at::Tensor logits;                         ///< [tokens, vocab] FP32
  std::vector<model::BlockChoices> choices;  ///< of the last step, by block
};

/// Where a traced pass runs: a card, a CPU in its place, or the CPU's own kernels.
enum class RunsOn { kCard, kAsHopper, kCpu };

/// One sequence in steps of `chunk` tokens through the caches. Of every step and block: queries,
/// compressed rows that the block's attention reads, chosen blocks, affinities and weights of
/// experts, chosen experts, and the streams behind it. `forced`: choices of every step.
TracedPass traced_pass(const model::Transformer& model,
                       ops::Numerics numerics,
                       std::span<const int64_t> tokens,
                       int64_t chunk,
                       RunsOn where,
                       const std::vector<model::BlockChoices>& forced = {});

/// The logits [tokens, vocab] of the same steps in which nobody looks at anything, as the engine
/// runs them.
at::Tensor plain_logits(const model::Transformer& model,
                        ops::Numerics numerics,
                        std::span<const int64_t> tokens,
                        int64_t chunk,
                        RunsOn where);

/// "NAME: 3 of 512 differ, the first [1, 7]: 0.25 instead of 0.5" of the first value that is not
/// the same bit for bit; "" where all are.
std::string first_difference(const TracedPass& found, const TracedPass& wanted);

/// Token ids that differ from seed to seed.
std::vector<int64_t> random_tokens(int64_t count, int64_t vocab_size, unsigned seed);

}  // namespace hadal::testing
