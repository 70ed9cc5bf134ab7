#include "model/part_ops.h"

#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "ops/tensor_sums.h"

namespace hadal::model {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void wait_all(std::vector<dist::Transfer>& transfers) {
  for (dist::Transfer& transfer : transfers) transfer.wait();
}

/// Rows of the ring that hold the halo, oldest first.
at::Tensor halo_numbers(const RowPart& part) {
  const int64_t start = part.start(part.index());
  return at::arange(start - part.halo(part.index()), start, at::kLong).remainder(kHaloRows);
}

at::ScalarType type_of(AutogradContext* context) {
  return static_cast<at::ScalarType>(context->saved_data["type"].toInt());
}

/// Every member runs it and its gradient, in one order.
struct Halo : torch::autograd::Function<Halo> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x, const RowPart* part) {
    context->saved_data["part"] = reinterpret_cast<int64_t>(part);
    context->saved_data["type"] = static_cast<int64_t>(x.scalar_type());
    context->set_materialize_grads(false);
    const int64_t index = part->index(), from = part->halo(index);
    std::vector<dist::Transfer> transfers;
    at::Tensor last;
    if (index + 1 < part->members()) {
      const int64_t count = part->halo(index + 1);
      last = x.narrow(0, x.size(0) - count, count).contiguous();
      transfers.push_back(part->group().send(last, index + 1));
    }
    const at::Tensor rows = at::empty({from, x.size(1)}, x.options());
    if (index > 0) transfers.push_back(part->group().receive(rows, index - 1));
    wait_all(transfers);
    const at::Tensor ring = at::zeros({kHaloRows, x.size(1)}, x.options().dtype(at::kFloat));
    ring.index_copy_(0, halo_numbers(*part), rows.to(at::kFloat));
    return {ring, x.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true)};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto* part = reinterpret_cast<const RowPart*>(context->saved_data["part"].toInt());
    const int64_t index = part->index();
    const int64_t width = (grads[0].defined() ? grads[0] : grads[1]).size(1);
    const auto options = at::TensorOptions(at::kFloat);
    std::vector<dist::Transfer> transfers;
    at::Tensor past;
    if (index > 0) {
      past = grads[0].defined() ? grads[0].index_select(0, halo_numbers(*part))
                                : at::zeros({part->halo(index), width}, options);
      transfers.push_back(part->group().send(past.contiguous(), index - 1));
    }
    at::Tensor own = grads[1].defined() ? grads[1].clone(at::MemoryFormat::Contiguous)
                                        : at::zeros({part->batch().num_tokens(), width}, options);
    if (index + 1 < part->members()) {
      const at::Tensor next = at::empty({part->halo(index + 1), width}, options);
      transfers.push_back(part->group().receive(next, index + 1));
      wait_all(transfers);
      // Two neighbouring nodes of the row's tree.
      own.narrow(0, own.size(0) - next.size(0), next.size(0)).add_(next);
    } else {
      wait_all(transfers);
    }
    return {own.to(type_of(context)), at::Tensor()};
  }
};

/// Rows of this member's blocks that every later one of its last sample is sent; the same for all
/// who are sent some.
struct Blocks : torch::autograd::Function<Blocks> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& rows,
                            const RowPart* part,
                            int64_t ratio) {
    context->saved_data["part"] = reinterpret_cast<int64_t>(part);
    context->saved_data["type"] = static_cast<int64_t>(rows.scalar_type());
    context->saved_data["ratio"] = ratio;
    context->set_materialize_grads(false);
    const int64_t index = part->index();
    const at::Tensor dense = rows.contiguous();
    std::vector<dist::Transfer> transfers;
    for (int64_t to = index + 1; to < part->members(); ++to) {
      const int64_t count = part->shared_blocks(ratio, index, to);
      transfers.push_back(part->group().send(dense.narrow(0, dense.size(0) - count, count), to));
    }
    std::vector<at::Tensor> all;
    for (int64_t from = 0; from < index; ++from) {
      all.push_back(
          at::empty({part->shared_blocks(ratio, from, index), rows.size(1)}, rows.options()));
      transfers.push_back(part->group().receive(all.back(), from));
    }
    wait_all(transfers);
    all.push_back(dense);
    return at::cat(all).to(at::kFloat);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const auto* part = reinterpret_cast<const RowPart*>(context->saved_data["part"].toInt());
    const int64_t ratio = context->saved_data["ratio"].toInt(), index = part->index();
    const at::Tensor all = grads[0].contiguous();
    std::vector<dist::Transfer> transfers;
    int64_t row = 0;
    for (int64_t from = 0; from < index; ++from) {
      const int64_t count = part->shared_blocks(ratio, from, index);
      transfers.push_back(part->group().send(all.narrow(0, row, count), from));
      row += count;
    }
    at::Tensor own = all.narrow(0, row, all.size(0) - row).clone();
    // A later member's gradient is the node of its queries.
    std::vector<uint64_t> numbers{static_cast<uint64_t>(index)};
    std::vector<at::Tensor> nodes(1);
    for (int64_t to = index + 1; to < part->members(); ++to) {
      const int64_t count = part->shared_blocks(ratio, index, to);
      if (count == 0) continue;
      numbers.push_back(static_cast<uint64_t>(to));
      nodes.push_back(at::empty({count, all.size(1)}, all.options()));
      transfers.push_back(part->group().receive(nodes.back(), to));
    }
    wait_all(transfers);
    if (nodes.size() > 1) {
      nodes[0] = own.narrow(0, own.size(0) - nodes[1].size(0), nodes[1].size(0));
      ops::sum_by_number(numbers, std::move(nodes));
    }
    result[0] = own.to(type_of(context));
    return result;
  }
};

}  // namespace

HaloRows exchange_halo(const at::Tensor& x, const RowPart& part) {
  HADAL_CHECK(x.is_cpu() && x.dim() == 2 && x.size(0) == part.batch().num_tokens(),
              "exchange_halo: rows of ", x.sizes(), " for ", part.batch().num_tokens(), " tokens");
  const variable_list made = Halo::apply(x, &part);
  const std::vector<int64_t> slots(static_cast<size_t>(part.batch().num_seqs()), 0);
  return {.past = ops::RingView::of_slots(made[0], slots, kHaloRows), .own = made[1]};
}

ops::BlockView gather_blocks(const at::Tensor& rows, int64_t ratio, const RowPart& part) {
  const ops::BlockPlan& plan = part.batch().blocks(ratio);
  HADAL_CHECK(rows.is_cpu() && rows.dim() == 2 && rows.size(0) == plan.num_blocks(),
              "gather_blocks: rows of ", rows.sizes(), " for ", plan.num_blocks(), " blocks");
  const at::Tensor all = Blocks::apply(rows, &part, ratio);
  const int64_t before = all.size(0) - rows.size(0);
  HADAL_CHECK(before == part.start(part.index()) / ratio, "gather_blocks: ", before,
              " blocks from before position ", part.start(part.index()));
  std::vector<int64_t> first{0};
  for (int64_t seq = 1; seq < part.batch().num_seqs(); ++seq)
    first.push_back(before + plan.cu_blocks[static_cast<size_t>(seq)]);
  return ops::BlockView::consecutive(all, first);
}

}  // namespace hadal::model
