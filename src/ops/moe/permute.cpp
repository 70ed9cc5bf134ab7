#include "ops/moe/permute.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/moe/moe_cpu.h"
#include "ops/moe/moe_sm90.h"
#include "ops/op.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor sum_by_token(const at::Tensor& rows, const at::Tensor& place, int64_t tokens) {
  const int64_t topk = place.size(0) / tokens;
  const at::Tensor by_token = rows.index_select(0, place).reshape({tokens, topk, -1});
  if (rows.is_cuda() && rows.scalar_type() == at::kBFloat16) {
    return by_token.sum({1}, /*keepdim=*/false, at::kFloat);
  }
  at::Tensor sum = to_compute(by_token.select(1, 0));
  for (int64_t k = 1; k < topk; ++k) sum = sum + by_token.select(1, k);
  return sum;
}

struct PermuteRows : torch::autograd::Function<PermuteRows> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& token,
                            const at::Tensor& place) {
    context->save_for_backward({place});
    context->set_materialize_grads(false);
    context->saved_data["tokens"] = x.size(0);
    return x.index_select(0, token);
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const at::Tensor& grad = grad_outputs[0];
    if (!grad.defined()) return variable_list(3);
    const at::Tensor sum = sum_by_token(grad, context->get_saved_variables()[0],
                                        context->saved_data["tokens"].toInt());
    return {sum.to(grad.scalar_type()), at::Tensor(), at::Tensor()};
  }
};

at::Tensor run_cpu(const at::Tensor& rows, const at::Tensor& place, const at::Tensor& shared) {
  const at::Tensor r = rows.contiguous(), s = shared.contiguous(), slots = place.contiguous();
  at::Tensor out = at::empty_like(s);
  const CombineCpuParams params{.rows = r.const_data_ptr(),
                                .place = slots.const_data_ptr<int64_t>(),
                                .shared = s.const_data_ptr(),
                                .out = out.mutable_data_ptr(),
                                .topk = slots.size(0) / s.size(0),
                                .dim = s.size(1),
                                .dtype = element_type(s)};
  parallel_for(s.size(0), 8, [&](int64_t begin, int64_t end) { combine_cpu(params, begin, end); });
  return out;
}

bool wants_gradient(const at::Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }

/// The same permutation by counting, without a tensor operation for every step of it.
Permutation permute_on_cpu(const at::Tensor& experts_any, int64_t num_experts) {
  const at::Tensor experts = experts_any.contiguous();
  const int64_t pairs = experts.numel(), topk = experts.size(1);
  const Permutation result{.token = at::empty({pairs}, at::kLong),
                           .slot = at::empty({pairs}, at::kLong),
                           .place = at::empty({pairs}, at::kLong),
                           .offsets = at::empty({num_experts + 1}, at::kLong)};
  const int64_t* expert = experts.const_data_ptr<int64_t>();
  int64_t* token = result.token.mutable_data_ptr<int64_t>();
  int64_t* slot = result.slot.mutable_data_ptr<int64_t>();
  int64_t* place = result.place.mutable_data_ptr<int64_t>();
  int64_t* offsets = result.offsets.mutable_data_ptr<int64_t>();
  std::vector<int64_t> next(static_cast<size_t>(num_experts) + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    HADAL_CHECK(expert[i] >= 0 && expert[i] < num_experts, "permute: expert ", expert[i], " of ",
                num_experts);
    ++next[static_cast<size_t>(expert[i]) + 1];
  }
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
  std::copy(next.begin(), next.end(), offsets);
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t to = next[static_cast<size_t>(expert[i])]++;
    place[i] = to;
    slot[to] = i;
    token[to] = i / topk;
  }
  return result;
}

at::Tensor copy_rows(const at::Tensor& x_any, const at::Tensor& token) {
  const at::Tensor x = x_any.contiguous();
  const int64_t count = token.size(0), bytes = x.size(1) * x.element_size();
  at::Tensor out = at::empty({count, x.size(1)}, x.options());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* rows = token.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * bytes, from + rows[i] * bytes, static_cast<size_t>(bytes));
  }
  return out;
}

struct Combine : torch::autograd::Function<Combine> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& rows,
                            const at::Tensor& shared,
                            const at::Tensor& place,
                            const at::Tensor& token) {
    context->save_for_backward({token});
    context->set_materialize_grads(false);
    context->saved_data["type"] = static_cast<int64_t>(rows.scalar_type());
    if (use_cpu_kernel(shared) && rows.scalar_type() == shared.scalar_type()) {
      return run_cpu(rows, place, shared);
    }
    return (sum_by_token(rows, place, shared.size(0)) + to_compute(shared))
        .to(shared.scalar_type());
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    if (!grad_outputs[0].defined()) return variable_list(4);
    const at::Tensor token = context->get_saved_variables()[0];
    const auto type = static_cast<at::ScalarType>(context->saved_data["type"].toInt());
    return {grad_outputs[0].index_select(0, token).to(type), grad_outputs[0], at::Tensor(),
            at::Tensor()};
  }
};

at::Tensor combine_on_sm90(const at::Tensor& rows_any,
                           const at::Tensor& place_any,
                           const at::Tensor& shared_any) {
  const at::Tensor rows = kernel_input(rows_any), shared = kernel_input(shared_any);
  const at::Tensor place = place_any.to(at::kInt).contiguous();
  at::Tensor out = at::empty_like(shared);
  const int64_t tokens = shared.size(0);
  run_sm90(shared, combine_sm90, combine_twin,
           {.rows = rows.const_data_ptr(),
            .place = place.const_data_ptr<int32_t>(),
            .shared = shared.const_data_ptr(),
            .out = out.mutable_data_ptr(),
            .tokens = tokens,
            .topk = tokens == 0 ? 0 : place.size(0) / tokens,
            .dim = shared.size(1)});
  return out;
}

}  // namespace

constinit CpuSlot<void(const CombineCpuParams&, int64_t, int64_t)> combine_cpu;

Permutation permute_by_expert(const at::Tensor& experts, int64_t num_experts) {
  check_shape(experts, {-1, -1}, "permute: experts");
  if (experts.is_cpu() && experts.scalar_type() == at::kLong) {
    return permute_on_cpu(experts, num_experts);
  }
  const auto [sorted, slot] =
      at::sort(experts.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor bounds = at::arange(num_experts + 1, experts.options());
  at::Tensor place = at::empty_like(slot);
  place.scatter_(0, slot, at::arange(slot.size(0), slot.options()));
  return {.token = slot.div(experts.size(1), "floor"),
          .slot = slot,
          .place = place,
          .offsets = at::searchsorted(sorted, bounds)};
}

at::Tensor permute_rows(const at::Tensor& x, const Permutation& order) {
  check_shape(x, {order.place.size(0) * x.size(0) / order.token.size(0), -1}, "permute_rows: x");
  if (x.is_cpu() && !wants_gradient(x)) return copy_rows(x, order.token);
  return PermuteRows::apply(x, order.token, order.place);
}

at::Tensor combine(const at::Tensor& rows, const Permutation& order, const at::Tensor& shared) {
  const int64_t tokens = shared.size(0), topk = order.place.size(0) / tokens;
  check_shape(rows, {tokens * topk, shared.size(1)}, "combine: rows");
  if (serves_moe_rows_sm90(shared.size(1)) && use_sm90(shared) && use_sm90(rows))
    return combine_on_sm90(rows, order.place, shared);
  refuse_as_hopper(shared, "combine");
  if (use_cpu_kernel(shared) && rows.scalar_type() == shared.scalar_type() &&
      !wants_gradient(rows) && !wants_gradient(shared)) {
    return run_cpu(rows, order.place, shared);
  }
  return Combine::apply(rows, shared, order.place, order.token);
}

}  // namespace hadal::ops
