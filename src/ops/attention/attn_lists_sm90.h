// The lists of sparse_attn_sm90 out of a step's tables (ops/cache/batch.h) on Hopper, as a function
// of pointers. Free of ATen.
#pragma once

#include "ops/attention/sparse_attn_sm90.h"
#include "ops/cache/row_tables.h"
#include "ops/kernel_types.h"

namespace hadal::ops {

/// A position p of the window has place p mod `window` for every token (docs/decisions/0011), so
/// that a token's list does not depend on the step it comes in; places from `window` up to whole
/// chunks are empty. Rows of the window: those of the
/// rings and, from row `step_row` on, the step's own; a position of the step is found there. A
/// sequence's tokens are consecutive, and every token is one (none is padding).
struct AttnListsSm90Params {
  const int64_t* pos;        ///< [tokens] absolute position
  const int64_t* seq;        ///< [tokens]
  const int32_t* first_row;  ///< [sequences] row of each sequence's first token in the step
  RingRows ring;             ///< of at least window - 1 positions
  int64_t step_row;          ///< negative: the rings hold the step's rows, too
  BlockRows blocks;
  int64_t ratio;             ///< tokens of a block; 0: there are none
  const int32_t* selection;  ///< [tokens, block_places] block numbers ascending, then negative;
                             ///< null: all blocks that a token sees
  int32_t* window_row;       ///< [tokens, attn_window_places(window)]
  int32_t* block_row;        ///< [tokens, block_places]
  int32_t* num_blocks;       ///< [tokens]
  int64_t tokens, window, block_places;
  int64_t ring_row = 0;  ///< the rings' first row
};
void attn_lists_sm90(const AttnListsSm90Params& p, Stream stream);
/// The same on a CPU.
void attn_lists_twin(const AttnListsSm90Params& p);

}  // namespace hadal::ops
