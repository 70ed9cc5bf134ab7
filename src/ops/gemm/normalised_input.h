// RMSNorm whose results are rows of products: on a GPU one kernel makes the operands, too.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "ops/gemm/normalised_sm90.h"
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

/// Whether a kernel makes the operands of rows of `dim` channels, which are x or are made of it.
bool serves_normalised_sm90(const at::Tensor& x,
                            int64_t dim,
                            const at::Tensor& weight,
                            Numerics numerics,
                            OperandKinds kinds);

/// What such a kernel writes, for rows of x's number, width (its last size) and type.
class NormalisedRows {
 public:
  NormalisedRows(const at::Tensor& x,
                 const at::Tensor& weight,
                 double eps,
                 Numerics numerics,
                 OperandKinds kinds);
  NormalisedSm90Params params;  ///< x: null
  ProductInput input(Numerics numerics) &&;

 private:
  at::Tensor weight_, out_;
  std::optional<Sm90Rows> codes_, bf16_;
};

}  // namespace hadal::ops
