// The matrix products of a token's path on Hopper, as functions of pointers: y = x w^T for FP8, FP4
// and BF16 weights. Free of ATen. Layouts: sm90_layout.h; trees:
// docs/decisions/0010-product-trees.md.
//
// Every launch of a product gives the bits of ops/gemm/hopper_twin.h, whatever the number of rows,
// the kernel, its tile and the split of K; which kernel runs is chosen from the shape alone.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

/// Where the FP32 sums of a product go.
struct Sm90Output {
  void* y;           ///< [rows, outputs] of `type`: one rounding
  int64_t stride;    ///< elements from row to row
  ElementType type;  ///< BF16 or FP32
};

/// One product of K-major operands: E4M3 (chains of 128, scaled) or BF16 (chains of 1,024).
struct LinearSm90Params {
  const uint8_t* x;  ///< K-major operand, x_groups row groups
  const uint8_t*
      w;  ///< K-major operand, w_groups row groups (a multiple of 8: tiles of 64 outputs)
  int64_t x_groups, w_groups;
  const float* x_scale;  ///< E4M3: [slabs, 8 * x_groups]; BF16: null
  const float* w_scale;  ///< E4M3: [slabs, ceil(outputs / 128)]; BF16: null
  int64_t rows, outputs, slabs;
  Sm90Output out;
};

/// How to compute it, for tests and measurements; -1: by the shape.
struct Sm90Choice {
  int tile =
      -1;  ///< rows of x in a tile: 8 to 256 (w is the 64-row operand); 0: x is the 64-row one
  int split = -1;  ///< blocks of a cluster that share K: 1, 2, 4, 8
};

void linear_fp8_sm90(const LinearSm90Params& p, Stream stream, const Sm90Choice& choice = {});
void linear_bf16_sm90(const LinearSm90Params& p, Stream stream, const Sm90Choice& choice = {});
void linear_fp8_twin(const LinearSm90Params& p);  ///< the same on a CPU, as every *_twin here
void linear_bf16_twin(const LinearSm90Params& p);

/// A further matrix that the same rows are multiplied with, of as many inputs.
struct Sm90Factor {
  const uint8_t* w;
  int64_t w_groups;
  const float* w_scale;
  int64_t outputs;
  Sm90Output out;
};
inline constexpr int kMaxFactors = 6;
/// `count` products more in the launch of the first: for rows so few that one product alone does
/// not fill the card. The same bits.
void linear_fp8_sm90(const LinearSm90Params& p, const Sm90Factor* more, int count, Stream stream);
void linear_bf16_sm90(const LinearSm90Params& p, const Sm90Factor* more, int count, Stream stream);

/// Products of BF16 rows with E4M3 weights widened to BF16 (`wo_a`), for several groups: out[r, g]
/// = w[g] x[r, g], in chains of 1,024.
struct WidenedSm90Params {
  const uint8_t* x;  ///< [groups] BF16 K-major operands of x_groups row groups
  int64_t x_groups;
  const uint8_t* w;     ///< [groups][slabs][outputs / 64] tiles (sm90_layout.h)
  const float* scales;  ///< [groups][slabs][ceil(outputs / 128)] powers of two, at most 2^7
  int64_t rows, groups, outputs, slabs;  ///< outputs: a multiple of 64; slabs of 128 inputs
  uint16_t* out;  ///< [rows, stride] BF16, a group's outputs behind another's
  int64_t stride;
};
void widened_sm90(const WidenedSm90Params& p, Stream stream, const Sm90Choice& choice = {});
void widened_twin(const WidenedSm90Params& p);

/// Rounds x to E4M3 by Q8_128 (numerics.md) and lays it out as an operand; rows from p.rows on
/// become zero.
struct QuantiseSm90Params {
  const void* x;  ///< [.., stride] BF16
  /// Row of x that becomes row i of the operand, or -1 for zeros; null: row i. [rows]
  const int32_t* source;
  int64_t rows, in, stride;  ///< in: a multiple of 128
  uint8_t* codes;            ///< K-major operand of x_groups row groups
  float* scales;             ///< [in / 128, 8 * x_groups]
  int64_t x_groups;
};
void quantise_operand_sm90(const QuantiseSm90Params& p, Stream stream);
void quantise_operand_twin(const QuantiseSm90Params& p);

/// Lays BF16 rows out as an operand; rows from p.rows on and channels from p.in on become zero.
struct Bf16OperandSm90Params {
  const void* x;                    ///< [.., stride] BF16, of p.in values each
  int64_t rows, in, stride;         ///< in, stride: multiples of 8
  uint8_t* operand;                 ///< K-major operand of ceil(in / 64) slabs
  int64_t x_groups;                 ///< its row groups: at least ceil(rows / 8)
  const int32_t* source = nullptr;  ///< as of QuantiseSm90Params
};
void bf16_operand_sm90(const Bf16OperandSm90Params& p, Stream stream);
void bf16_operand_twin(const Bf16OperandSm90Params& p);

/// SwiGLU of a gate and up product, rounded to BF16 and then as above.
struct SwigluQuantiseSm90Params {
  const void* gate_up;    ///< [rows, 2 inter] BF16: gate, then up
  const float* weight;    ///< [rows], or null for ones
  const int32_t* source;  ///< [rows] rows below 0 become zero; or null
  float limit;
  int64_t rows, inter;  ///< inter: a multiple of 128
  uint8_t* codes;       ///< K-major operand of x_groups row groups
  float* scales;        ///< [inter / 128, 8 * x_groups]
  int64_t x_groups;
};
void swiglu_quantise_sm90(const SwigluQuantiseSm90Params& p, Stream stream);
void swiglu_quantise_twin(const SwigluQuantiseSm90Params& p);

/// Products of rows with the weights of their experts. Rows lie sorted by expert, each expert's
/// from a multiple of 8 on; `tiles` says which expert a run of rows belongs to.
struct ExpertRun {
  int32_t expert, first_row, rows;
};
/// Rows that any choice needs at most.
constexpr int64_t max_routed_rows(int64_t tokens, int64_t topk, int64_t num_experts) {
  const int64_t choices = tokens * topk;
  return (choices + 7 * (choices < num_experts ? choices : num_experts) + 7) / 8 * 8;
}
/// Makes runs of rows that lie sorted by expert, one behind the other: every expert's go to places
/// from a multiple of 8 on.
struct PadGroupsSm90Params {
  const int64_t* offsets;  ///< [num_experts + 1] first row of each expert
  int32_t* source;         ///< [rows] sorted row of a padded one, -1 where there is none
  int32_t* place;          ///< [count] padded row of a sorted one
  ExpertRun* runs;         ///< [min(num_experts, count)]
  int32_t* num_runs;       ///< [1]
  int64_t num_experts;     ///< at most 1,024
  int64_t count, rows;     ///< rows: at least max_routed_rows(count, 1, num_experts)
};
void pad_groups_sm90(const PadGroupsSm90Params& p, Stream stream);
void pad_groups_twin(const PadGroupsSm90Params& p);

struct ExpertsSm90Params {
  const uint8_t* x;      ///< K-major operand of x_groups row groups: E4M3; BF16 for BF16 weights
  const float* x_scale;  ///< [slabs, 8 * x_groups]; BF16: null
  int64_t x_groups;
  /// FP4: [experts][slabs][outputs / 64] tiles; FP8, BF16: [experts] K-major operands of
  /// ceil(outputs / 64) * 8 row groups.
  const uint8_t* w;
  int64_t outputs, slabs;  ///< outputs of FP4: a multiple of 64
  const ExpertRun* runs;   ///< on the device, as num_runs: written two launches before, or earlier,
  const int32_t* num_runs;  ///< since they are read before the kernel before this one has ended
  int64_t max_runs;         ///< an upper bound of *num_runs, known on the host
  Sm90Output out;           ///< rows as in x
  const float* w_scale = nullptr;  ///< FP8: [experts, slabs, ceil(outputs / 128)]
  /// FP4 on a card: a second matrix of each expert, of the same shape, for the same rows in the
  /// same launch, or null.
  const uint8_t* second_w = nullptr;
  Sm90Output second_out = {};
};
void experts_fp4_sm90(const ExpertsSm90Params& p, Stream stream, const Sm90Choice& choice = {});
void experts_fp8_sm90(const ExpertsSm90Params& p, Stream stream, const Sm90Choice& choice = {});
void experts_bf16_sm90(const ExpertsSm90Params& p, Stream stream, const Sm90Choice& choice = {});
void experts_fp4_twin(const ExpertsSm90Params& p);
void experts_fp8_twin(const ExpertsSm90Params& p);
void experts_bf16_twin(const ExpertsSm90Params& p);

}  // namespace hadal::ops
