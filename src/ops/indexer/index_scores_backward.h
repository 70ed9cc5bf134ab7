// The gradient of index_scores on the CPU (index_scores.h). Private to this folder.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/indexer/index_scores.h"

namespace hadal::ops {

/// What `forward` makes of {q, w, rows of the keys}: {scores}, with a gradient of our own;
/// roundings pass it through. That of a key is a sum over queries by the tree of sum_tree.h, places
/// counted in the pass; that of a query has the bits of any pass in which it stands at the same
/// place modulo 64. Keys do not lie in pages.
at::Tensor with_score_gradient(const TensorFunction& forward,
                               const std::vector<at::Tensor>& inputs,
                               const BlockView& keys,
                               const Batch& batch,
                               int64_t ratio);

}  // namespace hadal::ops
