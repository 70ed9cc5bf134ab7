// RMSNorm whose results are rows of products: on a GPU one kernel makes the operands, too.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/gemm/product_input.h"

namespace hadal::ops {

/// Which operands somebody will ask for; others are made when they are.
struct OperandKinds {
  bool codes = true, bf16 = true;
};

/// rms_norm(x, weight, eps) [rows, dim] as the input of products.
ProductInput normalised_input(const at::Tensor& x,
                              const at::Tensor& weight,
                              double eps,
                              Numerics numerics,
                              OperandKinds kinds);

}  // namespace hadal::ops
