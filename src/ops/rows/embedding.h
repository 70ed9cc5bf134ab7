// Token embedding (model.md 2) with a deterministic gradient (rows summed in token order, no
// atomics).
#pragma once

#include "base/fwd.h"

namespace hadal::ops {

/// Rows of the table: ids [tokens] I64 (checked against the table on the CPU), table [vocab, dim]
/// -> [tokens, dim].
at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table);

}  // namespace hadal::ops
