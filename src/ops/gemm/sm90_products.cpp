#include "ops/gemm/sm90_products.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/op.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

Sm90Output output_of(const at::Tensor& y, int64_t first_column) {
  auto* data = static_cast<char*>(y.mutable_data_ptr()) + first_column * y.element_size();
  return {.y = data, .stride = y.size(1), .type = element_type(y)};
}

const uint8_t* matrix_data(const Sm90Matrices& w, int64_t matrix) {
  return w.data.const_data_ptr<uint8_t>() + matrix * w.data.stride(0);
}

/// y columns from first_column on = w[matrix] times the rows of an operand.
void multiply_bf16(const uint8_t* operand,
                   int64_t x_groups,
                   int64_t rows,
                   const Sm90Matrices& w,
                   int64_t matrix,
                   const at::Tensor& y,
                   int64_t first_column) {
  const auto kernel = [](const auto& p, Stream stream) { linear_bf16_sm90(p, stream); };
  run_sm90(y, kernel, linear_bf16_twin,
           {.x = operand,
            .w = matrix_data(w, matrix),
            .x_groups = x_groups,
            .w_groups = w.row_groups(),
            .x_scale = nullptr,
            .w_scale = nullptr,
            .rows = rows,
            .outputs = w.out,
            .slabs = w.slabs(),
            .out = output_of(y, first_column)});
}

/// K of a whole row of the operand is K of one group behind another's.
void multiply_widened(const Sm90Rows& x, const Sm90Matrices& w, const at::Tensor& y) {
  const auto kernel = [](const auto& p, Stream stream) { widened_sm90(p, stream); };
  run_sm90(y, kernel, widened_twin,
           {.x = x.codes.const_data_ptr<uint8_t>(),
            .x_groups = x.groups,
            .w = matrix_data(w, 0),
            .scales = w.scales.const_data_ptr<float>(),
            .rows = x.rows,
            .groups = w.matrices,
            .outputs = w.out,
            .slabs = w.slabs(),
            .out = mutable_bf16_data(y),
            .stride = y.size(1)});
}

at::Tensor result_rows(const at::Tensor& like, int64_t rows, const Sm90Matrices& w, GemmRole role) {
  return at::empty({rows, w.out},
                   like.options().dtype(role == GemmRole::kFp32 ? at::kFloat : at::kBFloat16));
}

/// Rows of x in a tile for so many rows an expert on average; changes no bit.
int expert_tile(int64_t rows, int64_t experts) {
  const int64_t each = ceil_div(rows, experts);
  for (const int tile : {8, 16, 32, 64})
    if (each <= tile) return tile;
  return 128;
}

}  // namespace

Sm90Rows empty_rows_sm90(int64_t rows, int64_t in, at::Device device) {
  const int64_t groups = ceil_div(rows, sm90::kGroupRows), padded = groups * sm90::kGroupRows;
  const auto options = at::TensorOptions(device);
  return {.codes = at::empty({padded * in}, options.dtype(at::kByte)),
          .scales = at::empty({in / sm90::kFp8Chain, padded}, options.dtype(at::kFloat)),
          .groups = groups,
          .rows = rows};
}

Sm90Rows operand_rows_sm90(const at::Tensor& x,
                           const at::Tensor& source,
                           int64_t rows,
                           bool rounds) {
  const int64_t in = x.size(1);
  const int32_t* from = source.defined() ? source.const_data_ptr<int32_t>() : nullptr;
  if (!rounds) {
    const int64_t groups = ceil_div(rows, sm90::kGroupRows);
    Sm90Rows operand{
        .codes = at::empty({sm90::round_up(in * 2, sm90::kSlabBytes) * groups * sm90::kGroupRows},
                           x.options().dtype(at::kByte)),
        .scales = {},
        .groups = groups,
        .rows = rows};
    run_sm90(x, bf16_operand_sm90, bf16_operand_twin,
             {.x = x.const_data_ptr(),
              .rows = rows,
              .in = in,
              .stride = in,
              .operand = operand.codes.mutable_data_ptr<uint8_t>(),
              .x_groups = groups,
              .source = from});
    return operand;
  }
  Sm90Rows q = empty_rows_sm90(rows, in, x.device());
  run_sm90(x, quantise_operand_sm90, quantise_operand_twin,
           {.x = x.const_data_ptr(),
            .source = from,
            .rows = rows,
            .in = in,
            .stride = in,
            .codes = q.codes.mutable_data_ptr<uint8_t>(),
            .scales = q.scales.mutable_data_ptr<float>(),
            .x_groups = q.groups});
  return q;
}

namespace {

/// Matrices behind the first, and the results of all.
struct Factors {
  const Sm90Matrices* first = nullptr;
  std::vector<Sm90Factor> all;

  void add(const Sm90Matrices& w, const at::Tensor& y, int64_t first_column) {
    if (first == nullptr) first = &w;
    HADAL_CHECK(w.in == first->in && w.format == first->format && !w.widened,
                "linear: matrices that the same rows are not for");
    all.push_back({.w = matrix_data(w, 0),
                   .w_groups = w.row_groups(),
                   .w_scale = w.scales.defined() ? w.scales.const_data_ptr<float>() : nullptr,
                   .outputs = w.out,
                   .out = output_of(y, first_column)});
  }
  int more() const { return static_cast<int>(all.size()) - 1; }
};

/// One launch on a GPU; on the CPU the twin of one product after the other.
void multiply(const Sm90Rows& x, const Factors& factors) {
  if (x.rows == 0) return;
  const bool fp8 = factors.first->rounds_rows();
  HADAL_CHECK(x.scales.defined() == fp8, "linear: rows of another product");
  LinearSm90Params p{.x = x.codes.const_data_ptr<uint8_t>(),
                     .w = nullptr,
                     .x_groups = x.groups,
                     .w_groups = 0,
                     .x_scale = fp8 ? x.scales.const_data_ptr<float>() : nullptr,
                     .w_scale = nullptr,
                     .rows = x.rows,
                     .outputs = 0,
                     .slabs = factors.first->slabs(),
                     .out = {}};
  const auto take = [&p](const Sm90Factor& factor) {
    p.w = factor.w;
    p.w_groups = factor.w_groups;
    p.w_scale = factor.w_scale;
    p.outputs = factor.outputs;
    p.out = factor.out;
  };
  take(factors.all[0]);
  if (!x.codes.is_cpu()) {
    const Stream stream = current_stream(x.codes);
    const Sm90Factor* more = factors.all.data() + 1;
    if (fp8) return linear_fp8_sm90(p, more, factors.more(), stream);
    return linear_bf16_sm90(p, more, factors.more(), stream);
  }
  for (const Sm90Factor& factor : factors.all) {
    take(factor);
    fp8 ? linear_fp8_twin(p) : linear_bf16_twin(p);
  }
}

}  // namespace

void multiply_fp8_sm90(const Sm90Rows& x,
                       const std::vector<const Sm90Matrices*>& matrices,
                       const at::Tensor& y) {
  Factors factors;
  int64_t column = 0;
  for (const Sm90Matrices* w : matrices) {
    factors.add(*w, y, column);
    column += w->out;
  }
  multiply(x, factors);
}

std::vector<at::Tensor> linear_sm90(const Sm90Rows& x, std::span<const Sm90Product> products) {
  std::vector<at::Tensor> y;
  Factors factors;
  for (const auto& [w, role] : products) {
    y.push_back(result_rows(x.codes, x.rows, *w, role));
    factors.add(*w, y.back(), 0);
  }
  multiply(x, factors);
  return y;
}

at::Tensor linear_sm90(const Sm90Rows& x, const Sm90Matrices& w, GemmRole role) {
  const Sm90Product product{.w = &w, .role = role};
  return linear_sm90(x, {&product, 1})[0];
}

ExpertRuns::ExpertRuns(int64_t num_rows, int64_t num_experts, at::Device device)
    : runs(at::empty({std::min(num_rows, num_experts), 3},
                     at::TensorOptions(device).dtype(at::kInt))),
      count(at::empty({1}, runs.options())),
      rows(num_rows) {
  static_assert(sizeof(ExpertRun) == 3 * sizeof(int32_t));
}

ExpertRun* ExpertRuns::data() const {
  return reinterpret_cast<ExpertRun*>(runs.mutable_data_ptr<int32_t>());
}

namespace {

ExpertsSm90Params experts_task(const Sm90Rows& x,
                               const Sm90Matrices& w,
                               const ExpertRuns& runs,
                               const Sm90Output& out) {
  HADAL_CHECK(x.scales.defined() == w.rounds_rows(), "experts: rows of another product");
  return {.x = x.codes.const_data_ptr<uint8_t>(),
          .x_scale = x.scales.defined() ? x.scales.const_data_ptr<float>() : nullptr,
          .x_groups = x.groups,
          .w = w.data.const_data_ptr<uint8_t>(),
          .outputs = w.out,
          .slabs = w.slabs(),
          .runs = runs.data(),
          .num_runs = runs.count.const_data_ptr<int32_t>(),
          .max_runs = runs.runs.size(0),
          .out = out,
          .w_scale = w.scales.defined() ? w.scales.const_data_ptr<float>() : nullptr};
}

Sm90Choice expert_choice(const ExpertRuns& runs) {
  return {.tile = expert_tile(runs.rows, runs.runs.size(0))};
}

}  // namespace

void multiply_experts_sm90(const Sm90Rows& x,
                           const Sm90Matrices& w,
                           const ExpertRuns& runs,
                           const at::Tensor& y,
                           int64_t first_column) {
  const ExpertsSm90Params p = experts_task(x, w, runs, output_of(y, first_column));
  const Sm90Choice choice = expert_choice(runs);
  const auto run = [&](auto kernel, auto twin) {
    run_sm90(
        y, [&](const auto& task, Stream stream) { kernel(task, stream, choice); }, twin, p);
  };
  switch (w.format) {
    case WeightFormat::kFp4:
      return run(experts_fp4_sm90, experts_fp4_twin);
    case WeightFormat::kFp8:
      return run(experts_fp8_sm90, experts_fp8_twin);
    default:
      run(experts_bf16_sm90, experts_bf16_twin);
  }
}

void multiply_expert_pair_sm90(const Sm90Rows& x,
                               const Sm90Matrices& w,
                               const Sm90Matrices& second,
                               const ExpertRuns& runs,
                               const at::Tensor& y) {
  const bool one_launch =
      w.format == WeightFormat::kFp4 && second.format == w.format && !y.is_cpu();
  if (!one_launch) {
    multiply_experts_sm90(x, w, runs, y, 0);
    return multiply_experts_sm90(x, second, runs, y, w.out);
  }
  HADAL_CHECK(second.out == w.out && second.in == w.in && second.matrices == w.matrices,
              "experts: matrices that are no pair");
  ExpertsSm90Params p = experts_task(x, w, runs, output_of(y, 0));
  p.second_w = second.data.const_data_ptr<uint8_t>();
  p.second_out = output_of(y, w.out);
  experts_fp4_sm90(p, current_stream(y), expert_choice(runs));
}

bool serves_linear_sm90(const Sm90Matrices& w, GemmRole role) {
  if (w.matrices != 1) return false;
  if (w.format == WeightFormat::kBf16) return true;
  if (w.format != WeightFormat::kFp8) return false;
  return w.widened ? role == GemmRole::kBf16 : w.in % sm90::kFp8Chain == 0;
}

at::Tensor linear_sm90(const at::Tensor& x_any, const Sm90Matrices& w, GemmRole role) {
  check_shape(x_any, {-1, w.in}, "linear: x");
  HADAL_CHECK(serves_linear_sm90(w, role), "linear: no kernel for these weights");
  const at::Tensor x = kernel_input(x_any);
  const int64_t rows = x.size(0);
  if (rows == 0) return result_rows(x, rows, w, role);
  const Sm90Rows operand = operand_rows_sm90(x, {}, rows, w.rounds_rows());
  if (!w.widened) return linear_sm90(operand, w, role);
  const at::Tensor y = result_rows(x, rows, w, role);
  multiply_widened(operand, w, y);
  return y;
}

bool serves_grouped_sm90(const Sm90Matrices& w) {
  if (w.widened || w.matrices > 1024) return false;
  if (w.format == WeightFormat::kFp4 && w.out % sm90::kTileRows != 0) return false;
  return !w.rounds_rows() || w.in % sm90::kFp8Chain == 0;
}

at::Tensor grouped_linear_sm90(const at::Tensor& x_any,
                               const Sm90Matrices& w,
                               const at::Tensor& offsets) {
  check_shape(x_any, {-1, w.in}, "grouped_linear: x");
  HADAL_CHECK(serves_grouped_sm90(w), "grouped_linear: no kernel for these weights");
  check_shape(offsets, {w.matrices + 1}, "grouped_linear: offsets");
  HADAL_CHECK(offsets.device() == x_any.device() && offsets.scalar_type() == at::kLong &&
                  offsets.is_contiguous(),
              "grouped_linear: offsets are I64 where x is");
  const at::Tensor x = kernel_input(x_any);
  const int64_t rows = x.size(0);
  if (rows == 0) return at::empty({0, w.out}, x.options());
  const int64_t padded = max_routed_rows(rows, 1, w.matrices);
  const ExpertRuns runs(rows, w.matrices, x.device());
  const at::Tensor source = at::empty({padded}, runs.runs.options()),
                   place = at::empty({rows}, runs.runs.options());
  run_sm90(x, pad_groups_sm90, pad_groups_twin,
           {.offsets = offsets.const_data_ptr<int64_t>(),
            .source = source.mutable_data_ptr<int32_t>(),
            .place = place.mutable_data_ptr<int32_t>(),
            .runs = runs.data(),
            .num_runs = runs.count.mutable_data_ptr<int32_t>(),
            .num_experts = w.matrices,
            .count = rows,
            .rows = padded});
  const at::Tensor y = at::empty({padded, w.out}, x.options());
  multiply_experts_sm90(operand_rows_sm90(x, source, padded, w.rounds_rows()), w, runs, y, 0);
  return y.index_select(0, place);
}

bool serves_groups_sm90(const Sm90Matrices& w) {
  return w.widened || (w.format == WeightFormat::kBf16 && w.in % 64 == 0);
}

at::Tensor group_linear_sm90(const at::Tensor& x_any, const Sm90Matrices& w) {
  check_shape(x_any, {-1, w.matrices, w.in}, "group_linear: x");
  const at::Tensor x = kernel_input(x_any.flatten(1));
  return group_linear_sm90(operand_rows_sm90(x, {}, x.size(0), /*rounds=*/false), w);
}

at::Tensor group_linear_sm90(const Sm90Rows& x, const Sm90Matrices& w) {
  HADAL_CHECK(serves_groups_sm90(w), "group_linear: no kernel for these weights");
  const int64_t rows = x.rows;
  const at::Tensor y =
      at::empty({rows, w.matrices * w.out}, x.codes.options().dtype(at::kBFloat16));
  if (rows > 0 && w.widened) {
    multiply_widened(x, w, y);
  } else if (rows > 0) {
    for (int64_t group = 0; group < w.matrices; ++group) {
      const uint8_t* k =
          x.codes.const_data_ptr<uint8_t>() + group * w.in * 2 * x.groups * sm90::kGroupRows;
      multiply_bf16(k, x.groups, rows, w, group, y, group * w.out);
    }
  }
  return y.reshape({rows, w.matrices, w.out});
}

}  // namespace hadal::ops
