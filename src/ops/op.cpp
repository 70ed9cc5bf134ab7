#include "ops/op.h"

#include <optional>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"

namespace hadal::ops {
namespace {

thread_local bool force_reference = false;

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct StraightThrough : torch::autograd::Function<StraightThrough> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& value, const at::Tensor&) {
    context->set_materialize_grads(false);  // no gradient stays none
    return value.view_as(value);
  }
  static variable_list backward(AutogradContext*, variable_list grad_outputs) {
    return {at::Tensor(), grad_outputs[0]};
  }
};

/// Autograd follows single tensors, not vectors of them, so a kernel has up to kMaxInputs optional
/// ones.
constexpr size_t kMaxInputs = 5;
using OptionalTensor = std::optional<at::Tensor>;

struct ReferenceGradient : torch::autograd::Function<ReferenceGradient> {
  static variable_list forward(AutogradContext* context,
                               const TensorFunction& kernel,
                               const TensorFunction& reference,
                               size_t num_inputs,
                               const OptionalTensor& a,
                               const OptionalTensor& b,
                               const OptionalTensor& c,
                               const OptionalTensor& d,
                               const OptionalTensor& e) {
    variable_list inputs;
    for (const OptionalTensor* input : {&a, &b, &c, &d, &e}) {
      if (inputs.size() < num_inputs) inputs.push_back(input->value_or(at::Tensor()));
    }
    context->save_for_backward(inputs);
    context->set_materialize_grads(false);  // no gradient stays none, not zeros that are decayed
    context->saved_data["reference"] =
        c10::IValue::make_capsule(c10::make_intrusive<Holder>(reference));
    variable_list outputs = kernel(inputs);
    variable_list integral;
    for (const at::Tensor& output : outputs) {
      if (!output.is_floating_point()) integral.push_back(output);
    }
    context->mark_non_differentiable(integral);
    return outputs;
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    auto holder =
        c10::static_intrusive_pointer_cast<Holder>(context->saved_data["reference"].toCapsule());
    const variable_list saved = context->get_saved_variables();
    at::AutoGradMode enable_grad(true);
    variable_list inputs, differentiable;
    std::vector<size_t> places;
    for (size_t i = 0; i < saved.size(); ++i) {
      const bool wanted = saved[i].defined() && saved[i].requires_grad();
      inputs.push_back(wanted ? saved[i].detach().requires_grad_(true) : saved[i]);
      if (!wanted) continue;
      differentiable.push_back(inputs.back());
      places.push_back(i);
    }
    const variable_list outputs = holder->function(inputs);
    variable_list roots, root_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grad_outputs[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grad_outputs[i]);
    }
    variable_list grads(3 + kMaxInputs);  // the functions and the count take the first places
    if (roots.empty()) return grads;
    const variable_list computed = torch::autograd::grad(roots, differentiable, root_grads,
                                                         /*retain_graph=*/std::nullopt,
                                                         /*create_graph=*/false,
                                                         /*allow_unused=*/true);
    for (size_t i = 0; i < places.size(); ++i) grads[3 + places[i]] = computed[i];
    return grads;
  }

 private:
  struct Holder : torch::CustomClassHolder {
    explicit Holder(TensorFunction f) : function(std::move(f)) {}
    TensorFunction function;
  };
};

}  // namespace

const char* numerics_name(Numerics numerics) {
  switch (numerics) {
    case Numerics::kIdeal:
      return "ideal";
    case Numerics::kBf16:
      return "bf16";
    case Numerics::kReleased:
      return "released";
    case Numerics::kFp8:
      return "fp8";
  }
  return "unknown";
}

Numerics parse_numerics(const std::string& name) {
  for (const Numerics numerics :
       {Numerics::kIdeal, Numerics::kBf16, Numerics::kReleased, Numerics::kFp8}) {
    if (name == numerics_name(numerics)) return numerics;
  }
  throw InputError(concat("numerics: expected ideal, bf16, released or fp8, found '", name, "'"));
}

at::ScalarType compute_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor to_compute(const at::Tensor& x) { return x.to(compute_type(x)); }

void check_shape(const at::Tensor& x, std::initializer_list<int64_t> shape, const char* what) {
  const at::IntArrayRef expected(shape.begin(), shape.size());
  bool same = x.defined() && x.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) {
    same = expected[i] == -1 || x.size(static_cast<int64_t>(i)) == expected[i];
  }
  if (same) return;
  throw Error(x.defined() ? concat(what, ": expected shape ", expected, ", found ", x.sizes())
                          : concat(what, ": expected shape ", expected, ", found no tensor"));
}

ReferenceGuard::ReferenceGuard() : previous_(force_reference) { force_reference = true; }
ReferenceGuard::~ReferenceGuard() { force_reference = previous_; }
bool reference_forced() { return force_reference; }

bool use_cpu_kernel(const at::Tensor& x) {
  return !force_reference && x.is_cpu() &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

bool use_cuda_kernel(const at::Tensor& x) {
  return !force_reference && x.is_cuda() && x.numel() > 0 &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

at::Tensor kernel_input(const at::Tensor& x) {
  if (!x.defined()) return x;
  const at::Tensor dense = x.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

ElementType element_type(const at::Tensor& x) {
  HADAL_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "kernel: expected FP32 or BF16, found ", x.scalar_type());
  return x.scalar_type() == at::kFloat ? ElementType::kF32 : ElementType::kBf16;
}

at::Tensor straight_through(const at::Tensor& value, const at::Tensor& source) {
  if (!at::GradMode::is_enabled() || !source.requires_grad()) return value;
  return StraightThrough::apply(value.detach(), source);
}

std::vector<at::Tensor> with_reference_gradient(const TensorFunction& kernel,
                                                const TensorFunction& reference,
                                                const std::vector<at::Tensor>& inputs) {
  bool needs_grad = false;
  if (at::GradMode::is_enabled()) {
    for (const at::Tensor& input : inputs) needs_grad |= input.defined() && input.requires_grad();
  }
  if (!needs_grad) return kernel(inputs);
  HADAL_CHECK(inputs.size() <= kMaxInputs, "with_reference_gradient: ", inputs.size(), " inputs");
  const auto input = [&](size_t i) {
    return i < inputs.size() && inputs[i].defined() ? OptionalTensor(inputs[i]) : OptionalTensor();
  };
  return ReferenceGradient::apply(kernel, reference, inputs.size(), input(0), input(1), input(2),
                                  input(3), input(4));
}

}  // namespace hadal::ops
