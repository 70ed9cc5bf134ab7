// Token embedding (model.md 2) with a deterministic gradient (rows summed in token order, no
// atomics).
#pragma once

#include "base/fwd.h"

namespace hadal::ops {

/// Rows of the table: ids [tokens] I64 (checked against the table on the CPU), table [vocab, dim]
/// -> [tokens, dim].
///   master  [vocab, dim] what the table is rounded from: it gets the gradient, summed in its type;
///           undefined: the table itself
at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table, const at::Tensor& master);
at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table);

}  // namespace hadal::ops
