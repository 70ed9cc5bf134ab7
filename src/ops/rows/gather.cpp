#include "ops/rows/gather.h"

#include <algorithm>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/parallel.h"
#include "ops/op.h"
#include "ops/sum_tree.h"

namespace hadal::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The same on the CPU in FP32, by the tree of sum_tree.h over i; rows that nobody names hold
/// kNoSum.
at::Tensor scatter_tree_sum(const at::Tensor& flat, const at::Tensor& rows, int64_t num_rows) {
  const int64_t width = flat.size(1);
  const at::Tensor sums = at::full({num_rows, width}, kNoSum, flat.options());
  const auto [sorted, order] = at::sort(rows, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const int64_t* row = sorted.const_data_ptr<int64_t>();
  const int64_t* place = order.const_data_ptr<int64_t>();
  std::vector<int64_t> begins;  // of each row's segment
  for (int64_t i = 0; i < rows.size(0); ++i)
    if (i == 0 || row[i] != row[i - 1]) begins.push_back(i);
  begins.push_back(rows.size(0));
  const float* values = flat.const_data_ptr<float>();
  parallel_for(std::ssize(begins) - 1, 8, [&](int64_t from, int64_t to) {
    std::vector<float> stack;
    for (int64_t segment = from; segment < to; ++segment) {
      const int64_t begin = begins[static_cast<size_t>(segment)],
                    end = begins[static_cast<size_t>(segment) + 1];
      stack.clear();
      for (const ChunkRun& run : chunk_runs(end - begin, place + begin)) {
        stack.resize(stack.size() + static_cast<size_t>(width), 0.0f);
        float* top = stack.data() + stack.size() - width;
        for (int64_t i = run.begin; i < run.end; ++i) {
          const float* add = values + place[begin + i] * width;
          for (int64_t c = 0; c < width; ++c) top[c] += add[c];
        }
        for (int32_t merge = 0; merge < run.merges; ++merge, top -= width) {
          for (int64_t c = 0; c < width; ++c) top[c - width] += top[c];
          stack.resize(stack.size() - static_cast<size_t>(width));
        }
      }
      std::copy_n(stack.data(), width, sums.mutable_data_ptr<float>() + row[begin] * width);
    }
  });
  return sums;
}

/// sum over i with rows[i] == r of grad[i], into [num_rows, ...] of the type that it is summed in:
/// a stable sort by row, then segment sums. Autograd rounds it where x's gradient is of another
/// type.
at::Tensor scatter_sum(const at::Tensor& grad, const at::Tensor& rows, int64_t num_rows) {
  const at::Tensor flat = grad.reshape({grad.size(0), -1});
  std::vector<int64_t> shape(grad.sizes().begin(), grad.sizes().end());
  shape[0] = num_rows;
  if (use_cpu_kernel(flat))
    return scatter_tree_sum(flat.to(at::kFloat).contiguous(), rows.contiguous(), num_rows)
        .reshape(shape);
  // Few rows have long segments: a product with the rows' marks keeps a GPU busy.
  if (grad.is_cuda() && num_rows <= 256) {
    const at::Tensor marks = (at::arange(num_rows, rows.options()).unsqueeze(1) == rows)
                                 .to(to_compute(flat).scalar_type());
    return at::mm(marks, to_compute(flat)).reshape(shape);
  }
  const auto [sorted, order] = at::sort(rows, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor lengths =
      at::diff(at::searchsorted(sorted, at::arange(num_rows + 1, rows.options())));
  // segment_reduce walks each segment in order on one thread: deterministic, unlike index_add on
  // CUDA.
  const at::Tensor sums =
      at::segment_reduce(to_compute(flat).index_select(0, order), "sum", lengths,
                         /*indices=*/std::nullopt, /*offsets=*/std::nullopt,
                         /*axis=*/0, /*unsafe=*/true, /*initial=*/0.0);
  return sums.reshape(shape);
}

struct GatherRows : torch::autograd::Function<GatherRows> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& rows) {
    context->save_for_backward({rows});
    context->saved_data["num_rows"] = x.size(0);
    context->set_materialize_grads(false);  // no gradient stays none, not zeros that are decayed
    return x.index_select(0, rows);
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    if (!grad_outputs[0].defined()) return {at::Tensor(), at::Tensor()};
    const at::Tensor rows = context->get_saved_variables()[0];
    return {scatter_sum(grad_outputs[0], rows, context->saved_data["num_rows"].toInt()),
            at::Tensor()};
  }
};

struct GatherDistinctRows : torch::autograd::Function<GatherDistinctRows> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& rows) {
    context->save_for_backward({rows});
    context->saved_data["num_rows"] = x.size(0);
    context->set_materialize_grads(false);
    return x.index_select(0, rows);
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    if (!grad_outputs[0].defined()) return {at::Tensor(), at::Tensor()};
    const at::Tensor rows = context->get_saved_variables()[0];
    std::vector<int64_t> shape(grad_outputs[0].sizes().begin(), grad_outputs[0].sizes().end());
    shape[0] = context->saved_data["num_rows"].toInt();
    at::Tensor grad = at::zeros(shape, grad_outputs[0].options());
    grad.index_copy_(0, rows, grad_outputs[0]);
    return {grad, at::Tensor()};
  }
};

}  // namespace

at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& rows) {
  check_shape(rows, {-1}, "gather_rows: rows");
  if (!at::GradMode::is_enabled() || !x.requires_grad()) return x.index_select(0, rows);
  return GatherRows::apply(x, rows);
}

at::Tensor gather_distinct_rows(const at::Tensor& x, const at::Tensor& rows) {
  check_shape(rows, {-1}, "gather_distinct_rows: rows");
  if (!at::GradMode::is_enabled() || !x.requires_grad()) return x.index_select(0, rows);
  return GatherDistinctRows::apply(x, rows);
}

}  // namespace hadal::ops
