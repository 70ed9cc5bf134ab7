#include "ops/moe/gate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/moe/gate_sm90.h"
#include "ops/op.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

Routing route(const at::Tensor& affinity, const at::Tensor& experts, double route_scale) {
  const at::Tensor ascending = std::get<0>(experts.sort(1));
  const at::Tensor chosen = affinity.gather(1, ascending);
  return {.experts = ascending,
          .weights = chosen / chosen.sum(1, /*keepdim=*/true) * route_scale,
          .affinity = affinity};
}

/// The experts with the largest scores of one row, ties to the lower id, ascending; NaN counts as
/// the lowest.
void choose_experts(const float* scores,
                    int64_t num_experts,
                    int64_t topk,
                    std::vector<int64_t>& order) {
  order.resize(static_cast<size_t>(num_experts));
  std::iota(order.begin(), order.end(), 0);
  const auto key = [scores](int64_t e) { return std::isnan(scores[e]) ? -INFINITY : scores[e]; };
  std::partial_sort(order.begin(), order.begin() + topk, order.end(), [&](int64_t a, int64_t b) {
    return key(a) > key(b) || (key(a) == key(b) && a < b);
  });
  std::sort(order.begin(), order.begin() + topk);
}

/// One token at a time, so that no vector remainder or batch size touches a bit. `bias` null:
/// `fixed` names the experts.
std::vector<at::Tensor> run_cpu(const at::Tensor& logits_in,
                                const float* bias,
                                const int64_t* fixed,
                                int64_t topk,
                                double route_scale) {
  const at::Tensor logits = logits_in.contiguous();
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  at::Tensor affinity = at::empty_like(logits),
             weights = at::empty({tokens, topk}, logits.options());
  at::Tensor experts = at::empty({tokens, topk}, logits.options().dtype(at::kLong));
  const float* z = logits.const_data_ptr<float>();
  float* a = affinity.mutable_data_ptr<float>();
  float* w = weights.mutable_data_ptr<float>();
  int64_t* chosen = experts.mutable_data_ptr<int64_t>();
  const auto scale = static_cast<float>(route_scale);
  parallel_for(tokens, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(static_cast<size_t>(num_experts));
    std::vector<int64_t> order;
    for (int64_t token = begin; token < end; ++token) {
      float* row = a + token * num_experts;
      for (int64_t e = 0; e < num_experts; ++e) {
        const double x = z[token * num_experts + e];
        row[e] = std::sqrt(static_cast<float>(x > 20.0 ? x : std::log1p(std::exp(x))));
        if (bias != nullptr) scores[static_cast<size_t>(e)] = row[e] + bias[e];
      }
      if (bias != nullptr) {
        choose_experts(scores.data(), num_experts, topk, order);
      } else {
        order.assign(fixed + token * topk, fixed + (token + 1) * topk);
        std::sort(order.begin(), order.end());
      }
      float sum = 0.0f;
      for (int64_t k = 0; k < topk; ++k) sum += row[order[static_cast<size_t>(k)]];
      for (int64_t k = 0; k < topk; ++k) {
        chosen[token * topk + k] = order[static_cast<size_t>(k)];
        w[token * topk + k] = row[order[static_cast<size_t>(k)]] / sum * scale;
      }
    }
  });
  return {experts, weights, affinity};
}

/// The kernel's choice, differentiated as the reference routed to the experts it chose.
Routing with_gradient(const at::Tensor& logits,
                      const at::Tensor& bias,
                      const at::Tensor& fixed,
                      int64_t topk,
                      double route_scale) {
  const std::vector<at::Tensor> raw =
      run_cpu(logits.detach(), bias.defined() ? bias.const_data_ptr<float>() : nullptr,
              fixed.defined() ? fixed.const_data_ptr<int64_t>() : nullptr, topk, route_scale);
  const at::Tensor experts = raw[0];
  const std::vector<at::Tensor> out = with_reference_gradient(
      [&](const auto&) {
        return std::vector{raw[1], raw[2]};
      },
      [experts, route_scale](const auto& in) {
        const Routing r = route(sqrt_softplus(in[0]), experts, route_scale);
        return std::vector{r.weights, r.affinity};
      },
      {logits});
  return {.experts = experts, .weights = out[0], .affinity = out[1]};
}

/// `bias` undefined: `fixed` names the experts.
Routing route_on_sm90(const at::Tensor& logits_any,
                      const at::Tensor& bias_any,
                      const at::Tensor& fixed,
                      int64_t topk,
                      double route_scale) {
  const at::Tensor logits = kernel_input(logits_any);
  const at::Tensor bias = bias_any.defined() ? fp32_input(bias_any) : bias_any;
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  const auto ints = logits.options().dtype(at::kInt);
  at::Tensor table;
  if (!bias.defined()) table = fixed.to(at::kLong).contiguous();
  Routing result{.experts = at::empty({tokens, topk}, ints),
                 .weights = at::empty({tokens, topk}, logits.options()),
                 .affinity = at::empty_like(logits)};
  run_sm90(logits, gate_sm90, gate_twin,
           {.logits = logits.const_data_ptr<float>(),
            .bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr,
            .table = table.defined() ? table.const_data_ptr<int64_t>() : nullptr,
            .ids = nullptr,
            .experts = result.experts.mutable_data_ptr<int32_t>(),
            .weights = result.weights.mutable_data_ptr<float>(),
            .tokens = tokens,
            .num_experts = num_experts,
            .topk = topk,
            .scale = static_cast<float>(route_scale),
            .affinity = result.affinity.mutable_data_ptr<float>()});
  return result;
}

}  // namespace

at::Tensor sqrt_softplus(const at::Tensor& logits) {
  return at::sqrt(at::softplus(logits, /*beta=*/1, /*threshold=*/20));
}

Routing gate(const at::Tensor& logits,
             const at::Tensor& bias,
             int64_t topk,
             double route_scale,
             Numerics numerics) {
  check_shape(logits, {-1, -1}, "gate: logits");
  check_shape(bias, {logits.size(1)}, "gate: bias");
  HADAL_CHECK(topk >= 1 && topk <= logits.size(1), "gate: top ", topk, " of ", logits.size(1));
  if (numerics != Numerics::kIdeal && serves_gate_sm90(logits.size(1), topk) &&
      use_sm90_fp32(logits)) {
    return route_on_sm90(logits, bias, at::Tensor(), topk, route_scale);
  }
  refuse_as_hopper(logits, "gate");
  if (use_cpu_kernel(logits) && logits.scalar_type() == at::kFloat) {
    return with_gradient(logits, bias.to(at::kFloat).contiguous(), at::Tensor(), topk, route_scale);
  }
  const at::Tensor affinity = sqrt_softplus(logits);
  const at::Tensor score = affinity.detach() + bias.to(affinity.scalar_type());
  const at::Tensor ordered =
      at::where(score.isnan(), -std::numeric_limits<double>::infinity(), score);
  const at::Tensor order =
      std::get<1>(at::sort(ordered, /*stable=*/true, /*dim=*/1, /*descending=*/true));
  return route(affinity, order.narrow(1, 0, topk), route_scale);
}

Routing gate_fixed(const at::Tensor& logits,
                   const at::Tensor& experts,
                   double route_scale,
                   Numerics numerics) {
  check_shape(logits, {-1, -1}, "gate: logits");
  check_shape(experts, {logits.size(0), -1}, "gate: experts");
  if (numerics != Numerics::kIdeal && serves_gate_sm90(logits.size(1), experts.size(1)) &&
      use_sm90_fp32(logits)) {
    return route_on_sm90(logits, at::Tensor(), experts, experts.size(1), route_scale);
  }
  refuse_as_hopper(logits, "gate_fixed");
  if (use_cpu_kernel(logits) && logits.scalar_type() == at::kFloat) {
    return with_gradient(logits, at::Tensor(), experts.contiguous(), experts.size(1), route_scale);
  }
  return route(sqrt_softplus(logits), experts, route_scale);
}

}  // namespace hadal::ops
