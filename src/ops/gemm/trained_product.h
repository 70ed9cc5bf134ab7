// Products whose weights are trained on the CPU: y = x w^T with a gradient of our own.
//
//   dx = dy w        the matrix kernel with w transposed: a row's bits depend on that row alone
//   dw = dy^T x      FP32, one tree over the rows (docs/decisions/0018-sums-over-tokens.md)
//
// In `fp8` products whose rows are rounded to E4M3 have gradients of E4M3 operands
// (docs/decisions/0033-fp8.md): dy along the outputs in groups of 128 for dx, and dy and x along
// the rows of a chunk, at most 128 with one scale, for dw. Trees are the same.
//
// A chunk is kSumChunk consecutive places. Inside it an output's sum starts at zero and takes rows
// in order: pairs of them, the odd one first, where both operands are BF16, else single ones, by
// fused multiply-add with subnormals flushed (as linear_cpu.h). Above it the tree is that of the
// chunks' numbers in binary; a chunk without rows adds nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "base/fwd.h"
#include "ops/gemm/linear.h"
#include "ops/sum_tree.h"

namespace hadal::ops {

/// linear, grouped_linear and group_linear (linear.h) for x and values on the CPU in FP32 or BF16.
///   values  what the product multiplies by; its gradient is not followed
///   master  as many elements as values, contiguous: what the gradient goes to, in FP32 (autograd
///           rounds it where the master is BF16)
///   numerics  kFp8: gradients of E4M3 operands where quantises_input(role, numerics)
at::Tensor trained_linear(const at::Tensor& x,
                          const at::Tensor& values,
                          const at::Tensor& master,
                          GemmRole role,
                          Numerics numerics = Numerics::kBf16);
/// places [rows] I64 on the CPU: where each row's token stands in the pass, not descending within
/// an expert; undefined: rows stand in their order within the expert.
at::Tensor trained_grouped_linear(const at::Tensor& x,
                                  const at::Tensor& values,
                                  const at::Tensor& master,
                                  const at::Tensor& offsets,
                                  const at::Tensor& places,
                                  GemmRole role,
                                  Numerics numerics = Numerics::kBf16);
at::Tensor trained_group_linear(const at::Tensor& x,
                                const at::Tensor& values,
                                const at::Tensor& master);

/// dw[o, i] = sum over rows of dy[row, o] x[row, i] by the tree, FP32; dy and x [rows, ..], FP32 or
/// BF16 on the CPU.
///   places  [rows] I64, not descending: where rows stand; undefined: 0, 1, ...
at::Tensor weight_gradient(const at::Tensor& dy,
                           const at::Tensor& x,
                           const at::Tensor& places = {});
/// dx = dy w in dy's dtype.
at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& w);
/// The groups of rows that share a scale in dw of `fp8`: bounds for e4m3_columns. Rows of one
/// matrix and chunk, 128 at most.
///   offsets  [matrices + 1] I64, or undefined: one matrix
///   places   as above
std::vector<int64_t> e4m3_groups(int64_t rows, const at::Tensor& offsets, const at::Tensor& places);

namespace reference {
/// In the operands' compute type, in any order: dw [matrices, out, in] of rows sorted by matrix.
at::Tensor grouped_weight_gradient(const at::Tensor& dy,
                                   const at::Tensor& x,
                                   const at::Tensor& offsets);
}  // namespace reference

}  // namespace hadal::ops
