// The discrete choices of a block: as a pass made them, and as a replay forces them on another.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "model/config.h"
#include "ops/cache/batch.h"

namespace hadal::model {

/// What the router and the indexer of one block chose for every token of a step. A part that is
/// forced is obeyed; an undefined one is chosen freely. Everything else, the routing weights too,
/// is computed from the pass's own values, so a pass that is forced to its own choices is the free
/// pass, bit for bit. Choices of several steps of a sequence, one after the other, are those of one
/// longer step.
struct BlockChoices {
  at::Tensor experts;    ///< [tokens, n_activated_experts] I64, distinct within a token
  at::Tensor selection;  ///< [tokens, index_topk] I32 of a CSA layer in sparse passes: blocks that
                         ///< the token sees, ascending, then -1; at least one where there is one
};

struct BlockAux;

/// Choices that force what `aux` reports of a sparse pass with AuxRequest::experts and
/// ::selection. The selection of a CSA layer is made complete: where it reports none, all blocks
/// that a token sees.
BlockChoices choices_of(const BlockAux& aux,
                        const ModelConfig& config,
                        int64_t block,
                        const ops::Batch& batch);

/// Throws Error that names block, token and value unless block `block` can be forced to these in a
/// step of `batch`; `sparse`: whether CSA layers select in this pass. Reads the choices on the
/// host.
void check_choices(const BlockChoices& choices,
                   const ModelConfig& config,
                   int64_t block,
                   const ops::Batch& batch,
                   bool sparse);

}  // namespace hadal::model
