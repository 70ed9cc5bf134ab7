// Products of tensors on a GPU by the Hopper kernels (linear_sm90.h): x is BF16, weights lie as
// these kernels read them. Every result has the bits of hopper_twin.h, whatever rows come along.
// Nothing here waits for the device.
#pragma once

#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/gemm/linear.h"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/sm90_matrices.h"

namespace hadal::ops {

/// Whether linear_sm90 has a kernel for one such matrix: BF16, widened FP8 with a BF16 result, and
/// other FP8 of a multiple of 128 inputs.
bool serves_linear_sm90(const Sm90Matrices& w, GemmRole role);
/// x [rows, in]; of FP8 that is not widened x is rounded by Q8_128, which leaves what went through
/// quantise_input as it is. Result [rows, out] FP32 for kFp32, else BF16.
at::Tensor linear_sm90(const at::Tensor& x, const Sm90Matrices& w, GemmRole role);

/// Whether grouped_linear_sm90 has a kernel for these: FP4 with out a multiple of 64 and in of 128,
/// FP8 with in a multiple of 128, BF16; at most 1,024 experts.
bool serves_grouped_sm90(const Sm90Matrices& w);
/// Rows sorted by expert (ops::grouped_linear); x as above. offsets [experts + 1] I64 on the GPU.
at::Tensor grouped_linear_sm90(const at::Tensor& x,
                               const Sm90Matrices& w,
                               const at::Tensor& offsets);

/// Rows as an operand: what these products are made of.
struct Sm90Rows {
  at::Tensor codes;   ///< E4M3, or BF16
  at::Tensor scales;  ///< of E4M3; else undefined
  int64_t groups;     ///< of 8 rows
  int64_t rows = 0;   ///< that count
};
/// E4M3; in: a multiple of 128.
Sm90Rows empty_rows_sm90(int64_t rows, int64_t in, at::Device device);
/// x [.., in] contiguous, by Q8_128 where `rounds` (in a multiple of 128), else in BF16 (of 8):
/// rows `source` [rows] I32 of it, -1 for zeros; undefined: its first rows.
Sm90Rows operand_rows_sm90(const at::Tensor& x,
                           const at::Tensor& source,
                           int64_t rows,
                           bool rounds);

/// The products of linear_sm90 with rows that are operands already, E4M3 where a matrix asks for
/// them (rounds_rows()): of several matrices of one format in one launch on a GPU, at most
/// kMaxFactors. Results in their order. Not for weights that are widened.
struct Sm90Product {
  const Sm90Matrices* w = nullptr;
  GemmRole role = GemmRole::kBf16;
};
std::vector<at::Tensor> linear_sm90(const Sm90Rows& x, std::span<const Sm90Product> products);
at::Tensor linear_sm90(const Sm90Rows& x, const Sm90Matrices& w, GemmRole role);
/// The same of FP8 into the columns of y [rows, *], one matrix's behind another's.
void multiply_fp8_sm90(const Sm90Rows& x,
                       const std::vector<const Sm90Matrices*>& matrices,
                       const at::Tensor& y);
/// wo_a with BF16 rows that are operands of its groups already: result [rows, groups, out] BF16.
at::Tensor group_linear_sm90(const Sm90Rows& x, const Sm90Matrices& w);

/// Which expert rows belong to, as a kernel writes it on the GPU.
struct ExpertRuns {
  at::Tensor runs, count;  ///< [at most, 3] and [1] I32
  int64_t rows = 0;        ///< that belong to anybody

  ExpertRuns() = default;
  ExpertRuns(int64_t num_rows, int64_t num_experts, at::Device device);
  ExpertRun* data() const;
};
/// y [rows, *] BF16: columns from first_column on become weights times rows of x, which are E4M3
/// where w.rounds_rows(). One kernel
/// must have been launched since the one that wrote `runs`.
void multiply_experts_sm90(const Sm90Rows& x,
                           const Sm90Matrices& w,
                           const ExpertRuns& runs,
                           const at::Tensor& y,
                           int64_t first_column);

/// The same of two matrices of each expert: w's columns from 0 on, and then second's. One launch
/// for FP4 on a GPU.
void multiply_expert_pair_sm90(const Sm90Rows& x,
                               const Sm90Matrices& w,
                               const Sm90Matrices& second,
                               const ExpertRuns& runs,
                               const at::Tensor& y);

/// Whether group_linear_sm90 has a kernel for these: widened FP8, or BF16 with in a multiple of 64.
bool serves_groups_sm90(const Sm90Matrices& w);
/// x [tokens, groups, in], result [tokens, groups, out] BF16 (ops::group_linear).
at::Tensor group_linear_sm90(const at::Tensor& x, const Sm90Matrices& w);

}  // namespace hadal::ops
