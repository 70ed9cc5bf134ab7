// Rows of a tensor by number, with deterministic gradients.
#pragma once

#include "base/fwd.h"

namespace hadal::ops {

/// x.index_select(0, rows) for any x [n, ...]; rows [m] I64 may repeat. The gradient sums the
/// contributions of a row in ascending order of m; on the CPU by the tree of sum_tree.h over m.
at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& rows);

/// The same where no row of x is named twice: the gradient is one scattered copy.
at::Tensor gather_distinct_rows(const at::Tensor& x, const at::Tensor& rows);

}  // namespace hadal::ops
