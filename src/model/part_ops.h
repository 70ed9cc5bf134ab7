// What a member of a shared row needs of the others' places, with gradients: the two stages of
// docs/parallelism.md. Rows come in FP32, so that their gradients are whole nodes of sums: they go
// back unrounded, are added where the rows came from in the order of the row's tree, and are
// rounded there.
#pragma once

#include <ATen/core/Tensor.h>

#include "model/row_part.h"
#include "ops/cache/cache_views.h"

namespace hadal::model {

/// Stage one: the last rows of the part before.
struct HaloRows {
  ops::RingView
      past;        ///< ring of kHaloRows [., width] FP32: the halo(index()) rows before the part
  at::Tensor own;  ///< [tokens, width] FP32: x
};
/// x [tokens, width] FP32 or BF16. All members call it, whether their samples cross a border or
/// not.
HaloRows exchange_halo(const at::Tensor& x, const RowPart& part);

/// Stage two: rows [blocks that end in the part, width] of the compressed blocks -> the view of all
/// blocks that the part's samples have up to its end, FP32. `rows` in the order of
/// part.batch().blocks(ratio).
ops::BlockView gather_blocks(const at::Tensor& rows, int64_t ratio, const RowPart& part);

}  // namespace hadal::model
