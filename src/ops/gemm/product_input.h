// Rows that several products multiply, in each form that one of them takes: made when it is first
// asked for, and once.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/gemm/linear.h"
#include "ops/gemm/sm90_products.h"
#include "ops/gemm/weight.h"

namespace hadal::ops {

class ProductInput {
 public:
  /// x [rows, in] as it is, before any rounding that a product asks for. For one thread.
  ProductInput(at::Tensor x, Numerics numerics) : x_(std::move(x)), numerics_(numerics) {}
  /// With operands that are there already.
  ProductInput(at::Tensor x,
               Numerics numerics,
               std::optional<Sm90Rows> codes,
               std::optional<Sm90Rows> bf16_operand)
      : x_(std::move(x)),
        numerics_(numerics),
        codes_(std::move(codes)),
        bf16_operand_(std::move(bf16_operand)) {}

  /// The same rows, and the forms of them that are there, without their gradients.
  ProductInput detach() const;

  const at::Tensor& x() const { return x_; }
  Numerics numerics() const { return numerics_; }
  /// Through quantise_input.
  const at::Tensor& rounded(GemmRole role) const;
  /// On a GPU: E4M3 by Q8_128, and BF16, as operands of the Hopper kernels. Of rows that are
  /// rounded already the same codes come, or twice them with half the scale, which no sum sees.
  const Sm90Rows& codes() const;
  const Sm90Rows& bf16_operand() const;

 private:
  at::Tensor x_;
  Numerics numerics_;
  mutable at::Tensor rounded_;
  mutable std::optional<Sm90Rows> codes_, bf16_operand_;
};

/// The product that `linear` computes of x.rounded(role), without its rounding where a kernel
/// rounds anyway.
at::Tensor linear(const ProductInput& x, const Weight& w, GemmRole role);

/// Makes the form of x that this product takes, if nobody did: for products that run beside others
/// of the same x.
void make_operand(const ProductInput& x, const Weight& w, GemmRole role);

/// Several of them; on a GPU products of one format are one launch.
struct Factor {
  Weight w;
  GemmRole role = GemmRole::kBf16;
};
std::vector<at::Tensor> linear(const ProductInput& x, const std::vector<Factor>& factors);

}  // namespace hadal::ops
