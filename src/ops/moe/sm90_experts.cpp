#include "ops/moe/sm90_experts.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/gemm/sm90_products.h"
#include "ops/moe/moe_sm90.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

/// Where the rows of a step's choices go (route_sm90).
struct Route {
  at::Tensor source, weight, place;
  ExpertRuns runs;
  int64_t rows;

  Route(const Routing& routing, int64_t num_experts) {
    const at::Tensor experts = routing.experts.to(at::kInt).contiguous(),
                     weights = fp32_input(routing.weights);
    const int64_t tokens = experts.size(0), topk = experts.size(1);
    rows = max_routed_rows(tokens, topk, num_experts);
    source = at::empty({rows}, experts.options());
    weight = at::empty({rows}, weights.options());
    place = at::empty_like(experts);
    runs = ExpertRuns(tokens * topk, num_experts, experts.device());
    // One block takes 4 us for a few tokens, 14 for 64 and 1.2 ms for 4,096.
    constexpr int64_t kTokensOfABlock = 16;
    at::Tensor counts;
    if (tokens > kTokensOfABlock) counts = at::empty({num_experts}, experts.options());
    run_sm90(experts, route_sm90, route_twin,
             {.experts = experts.const_data_ptr<int32_t>(),
              .weights = weights.const_data_ptr<float>(),
              .source = source.mutable_data_ptr<int32_t>(),
              .row_weight = weight.mutable_data_ptr<float>(),
              .place = place.mutable_data_ptr<int32_t>(),
              .runs = runs.data(),
              .num_runs = runs.count.mutable_data_ptr<int32_t>(),
              .tokens = tokens,
              .topk = topk,
              .num_experts = num_experts,
              .rows = rows,
              .counts = counts.defined() ? counts.mutable_data_ptr<int32_t>() : nullptr});
  }
};

/// Products of w1 and w3: gate and up side by side where their SwiGLU is rounded, [rows, 2 inter],
/// else one behind the other, [2, rows, inter].
at::Tensor gate_and_up(const Sm90Rows& rows,
                       const RoutedExperts& experts,
                       const Route& route,
                       const at::Tensor& x) {
  const Sm90Matrices &w1 = experts.w1.sm90(), &w3 = experts.w3.sm90();
  if (w1.rounds_rows()) {
    at::Tensor y = at::empty({route.rows, 2 * w1.out}, x.options());
    multiply_expert_pair_sm90(rows, w1, w3, route.runs, y);
    return y;
  }
  at::Tensor y = at::empty({2, route.rows, w1.out}, x.options());
  multiply_experts_sm90(rows, w1, route.runs, y[0], 0);
  multiply_experts_sm90(rows, w3, route.runs, y[1], 0);
  return y;
}

/// Their SwiGLU, as rows of w2's product.
Sm90Rows hidden_rows(
    const at::Tensor& gate_up, const Route& route, int64_t inter, bool rounds, float limit) {
  const float* weight = route.weight.const_data_ptr<float>();
  if (!rounds) {
    const at::Tensor out = at::empty({route.rows, inter}, gate_up.options());
    run_sm90(gate_up, swiglu_sm90, swiglu_twin,
             {.gate = gate_up[0].const_data_ptr(),
              .up = gate_up[1].const_data_ptr(),
              .weight = weight,
              .out = out.mutable_data_ptr(),
              .rows = route.rows,
              .inter = inter,
              .limit = limit});
    return operand_rows_sm90(out, {}, route.rows, rounds);
  }
  const Sm90Rows hidden = empty_rows_sm90(route.rows, inter, gate_up.device());
  run_sm90(gate_up, swiglu_quantise_sm90, swiglu_quantise_twin,
           {.gate_up = gate_up.const_data_ptr(),
            .weight = weight,
            .source = route.source.const_data_ptr<int32_t>(),
            .limit = limit,
            .rows = route.rows,
            .inter = inter,
            .codes = hidden.codes.mutable_data_ptr<uint8_t>(),
            .scales = hidden.scales.mutable_data_ptr<float>(),
            .x_groups = hidden.groups});
  return hidden;
}

}  // namespace

bool serves_experts_sm90(const at::Tensor& x, const RoutedExperts& experts, Numerics numerics) {
  for (const Weight* w : {&experts.w1, &experts.w3, &experts.w2}) {
    if (w->form() != WeightForm::kSm90 || !serves_grouped_sm90(w->sm90()) ||
        w->sm90().rounds_rows() != (numerics == Numerics::kReleased))
      return false;
  }
  return serves_moe_rows_sm90(x.size(1)) && serves_moe_rows_sm90(experts.w1.sm90().out) &&
         use_sm90(x);
}

at::Tensor experts_on_sm90(const at::Tensor& x_any,
                           const Routing& routing,
                           const RoutedExperts& experts,
                           const at::Tensor& shared_any,
                           SideBranch& shared_beside) {
  const Sm90Matrices &w1 = experts.w1.sm90(), &w3 = experts.w3.sm90(), &w2 = experts.w2.sm90();
  const int64_t tokens = x_any.size(0), dim = w1.in, inter = w1.out;
  check_shape(x_any, {-1, dim}, "experts: x");
  check_shape(shared_any, {tokens, dim}, "experts: shared");
  check_shape(routing.experts, {tokens, -1}, "experts: choices");
  HADAL_CHECK(w3.in == dim && w3.out == inter && w2.in == inter && w2.out == dim &&
                  w1.matrices == w2.matrices && w1.matrices == w3.matrices,
              "experts: matrices that do not belong together");
  const at::Tensor x = kernel_input(x_any);
  if (tokens == 0) return shared_any;
  const Route route(routing, w1.matrices);

  const bool rounds = w1.rounds_rows();
  const Sm90Rows rows = operand_rows_sm90(x, route.source, route.rows, rounds);
  const at::Tensor gate_up = gate_and_up(rows, experts, route, x);
  const Sm90Rows hidden =
      hidden_rows(gate_up, route, inter, rounds, static_cast<float>(experts.swiglu_limit));
  const at::Tensor y = at::empty({route.rows, dim}, x.options());
  multiply_experts_sm90(hidden, w2, route.runs, y, 0);
  shared_beside.join();
  const at::Tensor shared = kernel_input(shared_any), out = at::empty_like(shared);
  run_sm90(x, combine_sm90, combine_twin,
           {.rows = y.const_data_ptr(),
            .place = route.place.const_data_ptr<int32_t>(),
            .shared = shared.const_data_ptr(),
            .out = out.mutable_data_ptr(),
            .tokens = tokens,
            .topk = route.place.size(1),
            .dim = dim});
  return out;
}

bool serves_shared_expert_sm90(const ProductInput& x, const RoutedExperts& shared) {
  if (x.numerics() != Numerics::kReleased) return false;
  for (const Weight* w : {&shared.w1, &shared.w3, &shared.w2}) {
    if (w->form() != WeightForm::kSm90 || w->matrices() != 1 ||
        w->sm90().format != WeightFormat::kFp8 || !serves_linear_sm90(w->sm90(), GemmRole::kFp8)) {
      return false;
    }
  }
  return use_sm90(x.x());
}

at::Tensor shared_expert_on_sm90(const ProductInput& x, const RoutedExperts& shared) {
  const Sm90Matrices &w1 = shared.w1.sm90(), &w3 = shared.w3.sm90(), &w2 = shared.w2.sm90();
  const int64_t tokens = x.x().size(0), inter = w1.out;
  HADAL_CHECK(w3.out == inter && w2.in == inter && w1.in == w3.in && w1.in == x.x().size(1),
              "shared expert: matrices that do not belong together");
  const at::Tensor gate_up = at::empty({tokens, 2 * inter}, x.x().options());
  multiply_fp8_sm90(x.codes(), {&w1, &w3}, gate_up);
  const Sm90Rows hidden = empty_rows_sm90(tokens, inter, x.x().device());
  run_sm90(x.x(), swiglu_quantise_sm90, swiglu_quantise_twin,
           {.gate_up = gate_up.const_data_ptr(),
            .weight = nullptr,
            .source = nullptr,
            .limit = static_cast<float>(shared.swiglu_limit),
            .rows = tokens,
            .inter = inter,
            .codes = hidden.codes.mutable_data_ptr<uint8_t>(),
            .scales = hidden.scales.mutable_data_ptr<float>(),
            .x_groups = hidden.groups});
  return linear_sm90(hidden, w2, GemmRole::kFp8);
}

}  // namespace hadal::ops
