#include "ops/moe/sm90_experts.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/gemm/sm90_products.h"
#include "ops/moe/moe_sm90.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

/// Room for the choices of so many tokens.
ExpertRoute room_for(int64_t tokens, int64_t topk, int64_t num_experts, at::Device device) {
  const auto ints = at::TensorOptions(at::kInt).device(device);
  const int64_t rows = max_routed_rows(tokens, topk, num_experts);
  return {.source = at::empty({rows}, ints),
          .weight = at::empty({rows}, ints.dtype(at::kFloat)),
          .place = at::empty({tokens, topk}, ints),
          .runs = ExpertRuns(tokens * topk, num_experts, device),
          .rows = rows};
}

RouteSm90Params params_of(const ExpertRoute& route, const Routing& routing, int64_t num_experts) {
  return {.experts = routing.experts.const_data_ptr<int32_t>(),
          .weights = routing.weights.const_data_ptr<float>(),
          .source = route.source.mutable_data_ptr<int32_t>(),
          .row_weight = route.weight.mutable_data_ptr<float>(),
          .place = route.place.mutable_data_ptr<int32_t>(),
          .runs = route.runs.data(),
          .num_runs = route.runs.count.mutable_data_ptr<int32_t>(),
          .tokens = route.place.size(0),
          .topk = route.place.size(1),
          .num_experts = num_experts,
          .rows = route.rows};
}

/// Products of w1 and w3: gate and up side by side where their SwiGLU is rounded, [rows, 2 inter],
/// else one behind the other, [2, rows, inter].
at::Tensor gate_and_up(const Sm90Rows& rows,
                       const RoutedExperts& experts,
                       const ExpertRoute& route,
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
    const at::Tensor& gate_up, const ExpertRoute& route, int64_t inter, bool rounds, float limit) {
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

ExpertRoute route_on_sm90(const Routing& routing_any, int64_t num_experts) {
  const Routing routing{.experts = routing_any.experts.to(at::kInt).contiguous(),
                        .weights = fp32_input(routing_any.weights),
                        .affinity = {}};
  const int64_t tokens = routing.experts.size(0);
  ExpertRoute route =
      room_for(tokens, routing.experts.size(1), num_experts, routing.experts.device());
  // One block takes 4 us for a few tokens, 14 for 64 and 1.2 ms for 4,096.
  constexpr int64_t kTokensOfABlock = 16;
  at::Tensor counts;
  if (tokens > kTokensOfABlock) counts = at::empty({num_experts}, routing.experts.options());
  RouteSm90Params p = params_of(route, routing, num_experts);
  if (counts.defined()) p.counts = counts.mutable_data_ptr<int32_t>();
  run_sm90(routing.experts, route_sm90, route_twin, p);
  return route;
}

bool serves_gate_route_sm90(const GateInput& in) {
  return serves_gate_route_sm90(in.logits.size(0), in.logits.size(1), in.topk) &&
         use_sm90_fp32(in.logits);
}

ExpertRoute gate_and_route_sm90(const GateInput& in, Routing& routing) {
  check_shape(in.logits, {-1, -1}, "gate: logits");
  const at::Tensor logits = kernel_input(in.logits);
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  at::Tensor bias, table, ids;
  if (in.bias.defined()) {
    check_shape(in.bias, {num_experts}, "gate: bias");
    bias = fp32_input(in.bias);
  } else {
    check_shape(in.table, {-1, in.topk}, "gate: table of experts");
    HADAL_CHECK(in.ids.defined() || in.table.size(0) == tokens, "gate: experts of ",
                in.table.size(0), " tokens, expected ", tokens);
    table = in.table.to(at::kLong).contiguous();
    if (in.ids.defined()) ids = in.ids.to(at::kLong).contiguous();
  }
  routing = {.experts = at::empty({tokens, in.topk}, logits.options().dtype(at::kInt)),
             .weights = at::empty({tokens, in.topk}, logits.options()),
             .affinity = {}};
  ExpertRoute route = room_for(tokens, in.topk, num_experts, logits.device());
  run_sm90(logits, gate_route_sm90, gate_route_twin,
           GateRouteSm90Params{
               .gate = {.logits = logits.const_data_ptr<float>(),
                        .bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                        .table = table.defined() ? table.const_data_ptr<int64_t>() : nullptr,
                        .ids = ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr,
                        .experts = routing.experts.mutable_data_ptr<int32_t>(),
                        .weights = routing.weights.mutable_data_ptr<float>(),
                        .tokens = tokens,
                        .num_experts = num_experts,
                        .topk = in.topk,
                        .scale = static_cast<float>(in.route_scale)},
               .route = params_of(route, routing, num_experts)});
  return route;
}

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
                           const ExpertRoute& route,
                           const RoutedExperts& experts,
                           const at::Tensor& shared_any,
                           SideBranch& shared_beside) {
  const Sm90Matrices &w1 = experts.w1.sm90(), &w3 = experts.w3.sm90(), &w2 = experts.w2.sm90();
  const int64_t tokens = x_any.size(0), dim = w1.in, inter = w1.out;
  check_shape(x_any, {-1, dim}, "experts: x");
  check_shape(shared_any, {tokens, dim}, "experts: shared");
  check_shape(route.place, {tokens, -1}, "experts: choices");
  HADAL_CHECK(w3.in == dim && w3.out == inter && w2.in == inter && w2.out == dim &&
                  w1.matrices == w2.matrices && w1.matrices == w3.matrices,
              "experts: matrices that do not belong together");
  const at::Tensor x = kernel_input(x_any);
  if (tokens == 0) return shared_any;
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
