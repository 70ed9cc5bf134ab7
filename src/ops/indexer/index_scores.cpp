#include "ops/indexer/index_scores.h"

#include <algorithm>
#include <limits>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/indexer/index_scores_backward.h"
#include "ops/indexer/index_scores_cpu.h"
#include "ops/indexer/sm90_index.h"
#include "ops/indexer/visible_blocks.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

}  // namespace

namespace reference {

at::Tensor index_scores(const at::Tensor& q,
                        const at::Tensor& w,
                        const BlockView& keys,
                        const Batch& batch,
                        int64_t ratio,
                        Numerics numerics) {
  const at::ScalarType type = compute_type(q);
  const int64_t columns = max_visible(batch, ratio);
  const auto round = [&](const at::Tensor& x) {
    return numerics == Numerics::kReleased ? x.to(at::kBFloat16).to(type) : x;
  };
  std::vector<at::Tensor> per_seq;
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const int64_t begin = batch.begin(seq), length = batch.length(seq);
    const int64_t visible = visible_blocks(batch, seq, ratio);
    if (visible == 0) {
      per_seq.push_back(at::full({length, columns}, kMinusInfinity, q.options().dtype(type)));
      continue;
    }
    const at::Tensor key = keys.gather(seq, 0, visible).to(type);
    const at::Tensor queries = q.narrow(0, begin, length).to(type);  // [length, heads, dim]
    const at::Tensor dots = round(at::matmul(queries, key.t()));     // [length, heads, visible]
    const at::Tensor weights = w.narrow(0, begin, length).to(type).unsqueeze(-1);
    const at::Tensor scores = round(round(at::relu(dots) * weights).sum(1));  // [length, visible]
    const at::Tensor limit =
        (batch.pos().narrow(0, begin, length) + 1).div(ratio, "floor").unsqueeze(1);
    const at::Tensor hidden = at::arange(visible, limit.options()).unsqueeze(0) >= limit;
    per_seq.push_back(at::constant_pad_nd(scores.masked_fill(hidden, kMinusInfinity),
                                          {0, columns - visible}, kMinusInfinity));
  }
  return at::cat(per_seq);
}

}  // namespace reference

constinit CpuSlot<void(const IndexScoresCpuParams&)> index_scores_cpu;

namespace {

/// Tokens that share a pass over the keys.
constexpr int64_t kScoreTokens = 8;

}  // namespace

void score_tokens(const std::vector<at::Tensor>& in,
                  const BlockView& keys,
                  const Batch& batch,
                  int64_t ratio,
                  Numerics numerics,
                  const UseScores& use) {
  const at::Tensor q = in[0].contiguous(), w = in[1].to(q.scalar_type()).contiguous(),
                   rows = keys.format.packed() ? in[2] : in[2].to(q.scalar_type()).contiguous();
  const int64_t heads = q.size(1), dim = q.size(2), bytes = q.element_size();
  const int64_t row_bytes = rows.stride(0) * rows.element_size();
  const auto* q_data = static_cast<const char*>(q.const_data_ptr());
  const auto* w_data = static_cast<const char*>(w.const_data_ptr());
  const auto* row_data = static_cast<const char*>(rows.const_data_ptr());
  const int64_t most = max_visible(batch, ratio);
  const BlockRows table = keys.table();
  parallel_for(batch.num_tokens(), 1, [&](int64_t begin, int64_t end) {
    std::vector<const void*> key_rows(static_cast<size_t>(most));
    std::vector<float> scores(static_cast<size_t>(kScoreTokens * most)),
        scratch(static_cast<size_t>(16 * dim));
    int64_t seq = 0, known = 0;
    for (int64_t token = begin; token < end;) {
      while (batch.end(seq) <= token) {
        ++seq;
        known = 0;
      }
      const int64_t count = std::min({kScoreTokens, end - token, batch.end(seq) - token});
      int64_t num_keys[kScoreTokens];
      for (int64_t t = 0; t < count; ++t) {
        num_keys[t] = (batch.host_pos()[static_cast<size_t>(token + t)] + 1) / ratio;
      }
      for (; known < num_keys[count - 1]; ++known) {
        key_rows[static_cast<size_t>(known)] = row_data + table.row(seq, known) * row_bytes;
      }
      index_scores_cpu({.q = q_data + token * heads * dim * bytes,
                        .w = w_data + token * heads * bytes,
                        .rows = key_rows.data(),
                        .num_keys = num_keys,
                        .scores = scores.data(),
                        .scratch = scratch.data(),
                        .tokens = count,
                        .heads = heads,
                        .dim = dim,
                        .scores_row = most,
                        .dtype = element_type(q),
                        .format = keys.format,
                        .round_bf16 = numerics == Numerics::kReleased});
      for (int64_t t = 0; t < count; ++t) use(token + t, scores.data() + t * most, num_keys[t]);
      token += count;
    }
  });
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Blocks [length, visible] of one sequence that its tokens do not see yet.
at::Tensor hidden_blocks(const Batch& batch, int64_t seq, int64_t ratio, int64_t visible) {
  const at::Tensor limit = (batch.pos().narrow(0, batch.begin(seq), batch.length(seq)) + 1)
                               .div(ratio, "floor")
                               .unsqueeze(1);
  return at::arange(visible, limit.options()).unsqueeze(0) >= limit;
}

/// A batch that autograd keeps until the backward pass.
struct SharedBatch : torch::CustomClassHolder {
  explicit SharedBatch(Batch b) : batch(std::move(b)) {}
  Batch batch;
};

/// Until the indexer has kernels of its own, BF16 training on CUDA scores with library products:
/// the dot products of one sequence at a time, rounded to BF16, recomputed by the backward pass.
struct LibraryIndexScores : torch::autograd::Function<LibraryIndexScores> {
  /// key_rows [num_blocks, dim]: the step's own blocks, in the order of its plan.
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& q,
                            const at::Tensor& w,
                            const at::Tensor& key_rows,
                            const c10::intrusive_ptr<SharedBatch>& shared,
                            int64_t ratio,
                            bool released) {
    const Batch* batch = &shared->batch;
    const std::vector<int64_t>& first_row = batch->blocks(ratio).cu_blocks;
    context->save_for_backward({q, w, key_rows});
    context->saved_data["batch"] = c10::IValue::make_capsule(shared);
    context->saved_data["ratio"] = ratio;
    at::Tensor scores = at::full({q.size(0), max_visible(*batch, ratio)}, kMinusInfinity,
                                 q.options().dtype(at::kFloat));
    for (int64_t seq = 0; seq < batch->num_seqs(); ++seq) {
      const int64_t visible = visible_blocks(*batch, seq, ratio);
      if (visible == 0) continue;
      const int64_t begin = batch->begin(seq), length = batch->length(seq);
      at::Tensor terms = positive_dots(q, key_rows, first_row, *batch, seq, visible);
      terms.mul_(w.narrow(0, begin, length).unsqueeze(-1));
      at::Tensor sum = terms.sum({1}, /*keepdim=*/false, at::kFloat);
      if (released) sum = sum.to(at::kBFloat16).to(at::kFloat);
      scores.narrow(0, begin, length)
          .narrow(1, 0, visible)
          .copy_(sum.masked_fill_(hidden_blocks(*batch, seq, ratio, visible), kMinusInfinity));
    }
    return scores;
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &q = saved[0], &w = saved[1], &key_rows = saved[2];
    const auto shared =
        c10::static_intrusive_pointer_cast<SharedBatch>(context->saved_data["batch"].toCapsule());
    const Batch* batch = &shared->batch;
    const int64_t ratio = context->saved_data["ratio"].toInt(), heads = q.size(1), dim = q.size(2);
    const std::vector<int64_t>& first_row = batch->blocks(ratio).cu_blocks;
    at::Tensor grad_q = at::zeros_like(q), grad_w = at::zeros_like(w),
               grad_keys = at::zeros_like(key_rows);
    for (int64_t seq = 0; seq < batch->num_seqs(); ++seq) {
      const int64_t visible = visible_blocks(*batch, seq, ratio);
      if (visible == 0) continue;
      const int64_t begin = batch->begin(seq), length = batch->length(seq);
      const at::Tensor grad = grad_outputs[0]
                                  .narrow(0, begin, length)
                                  .narrow(1, 0, visible)
                                  .masked_fill(hidden_blocks(*batch, seq, ratio, visible), 0.0)
                                  .to(at::kBFloat16);  // [length, visible]
      const at::Tensor dots = positive_dots(q, key_rows, first_row, *batch, seq, visible);
      grad_w.narrow(0, begin, length).copy_(at::bmm(dots, grad.unsqueeze(-1)).squeeze(-1));
      at::Tensor grad_dots = w.narrow(0, begin, length).unsqueeze(-1) * grad.unsqueeze(1);
      grad_dots = at::threshold_backward(grad_dots, dots, 0).reshape({length * heads, visible});
      const int64_t row = first_row[static_cast<size_t>(seq)];
      const at::Tensor keys = key_rows.narrow(0, row, visible);
      const at::Tensor queries = q.narrow(0, begin, length).reshape({length * heads, dim});
      grad_q.narrow(0, begin, length).copy_(at::mm(grad_dots, keys).reshape({length, heads, dim}));
      grad_keys.narrow(0, row, visible).copy_(at::mm(grad_dots.t(), queries));
    }
    return {grad_q, grad_w, grad_keys, {}, {}, {}};
  }

 private:
  /// relu(q . key) [length, heads, visible] BF16 of one sequence.
  static at::Tensor positive_dots(const at::Tensor& q,
                                  const at::Tensor& key_rows,
                                  const std::vector<int64_t>& first_row,
                                  const Batch& batch,
                                  int64_t seq,
                                  int64_t visible) {
    const int64_t length = batch.length(seq), heads = q.size(1);
    const at::Tensor queries =
        q.narrow(0, batch.begin(seq), length).reshape({length * heads, q.size(2)});
    const at::Tensor keys = key_rows.narrow(0, first_row[static_cast<size_t>(seq)], visible);
    return at::mm(queries, keys.t()).relu_().reshape({length, heads, visible});
  }
};

}  // namespace

at::Tensor index_scores(const at::Tensor& q,
                        const at::Tensor& w,
                        const BlockView& keys,
                        const Batch& batch,
                        int64_t ratio,
                        Numerics numerics) {
  check_shape(q, {batch.num_tokens(), -1, keys.width()}, "index_scores: q");
  check_shape(w, {batch.num_tokens(), q.size(1)}, "index_scores: w");
  if (serves_index_sm90(q, w, keys, numerics))
    return index_scores_on_sm90(q, w, keys, batch, ratio, numerics);
  refuse_as_hopper(q, "index_scores");
  if (use_cpu_kernel(q)) {
    const auto kernel = [&](const auto& in) {
      const int64_t columns = max_visible(batch, ratio);
      at::Tensor scores = at::full({batch.num_tokens(), columns}, kMinusInfinity, at::kFloat);
      float* out = scores.mutable_data_ptr<float>();
      score_tokens(in, keys, batch, ratio, numerics,
                   [&](int64_t token, const float* row, int64_t count) {
                     std::copy(row, row + count, out + token * columns);
                   });
      return std::vector{scores};
    };
    if (keys.page_blocks == INT64_MAX && !keys.format.packed())
      return with_score_gradient(kernel, {q, w, keys.rows}, keys, batch, ratio);
    return with_reference_gradient(
        kernel,
        [keys, batch, ratio, numerics](const auto& in) {
          BlockView view = keys;
          view.rows = in[2];
          return std::vector{reference::index_scores(in[0], in[1], view, batch, ratio, numerics)};
        },
        {q, w, keys.rows})[0];
  }
  const bool all_bf16 = q.scalar_type() == at::kBFloat16 && w.scalar_type() == at::kBFloat16 &&
                        keys.rows.scalar_type() == at::kBFloat16;
  if (q.is_cuda() && !reference_forced() && all_bf16 && keys.of_step) {
    return LibraryIndexScores::apply(q, w, keys.rows, c10::make_intrusive<SharedBatch>(batch),
                                     ratio, numerics == Numerics::kReleased);
  }
  return reference::index_scores(q, w, keys, batch, ratio, numerics);
}

}  // namespace hadal::ops
