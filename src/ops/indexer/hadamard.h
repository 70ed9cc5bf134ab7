// Orthonormal Hadamard rotation of indexer queries and keys (model.md 7).
#pragma once

#include "base/fwd.h"

namespace hadal::ops {

/// y = H x / sqrt(dim) in natural (Sylvester) order, FP32 inside, one rounding to x's dtype.
///   x  [..., dim], dim a power of two
at::Tensor hadamard(const at::Tensor& x);

namespace reference {
at::Tensor hadamard(const at::Tensor& x);
}  // namespace reference

}  // namespace hadal::ops
