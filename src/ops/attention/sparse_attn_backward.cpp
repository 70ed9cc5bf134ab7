#include "ops/attention/sparse_attn_backward.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/attention/attention_backward_cpu.h"
#include "ops/gemm/trained_product.h"
#include "ops/sum_tree.h"

namespace hadal::ops {

constinit CpuSlot<void(const LogitGradientRow&, int64_t, float)> logit_gradient_cpu;
constinit CpuSlot<void(const float*, const float*, int64_t, int64_t, float*)> row_dots_cpu;

namespace {

/// Tokens of one query tile and keys of one key tile.
constexpr int64_t kTile = 64;

/// A run of keys of one sequence: tokens, or blocks of it.
struct KeyRun {
  bool is_blocks;
  /// Token of the step, or block of the sequence. Tokens from before the step go on in front of the
  /// sequence's first one.
  int64_t first, count;
  int64_t row;  ///< of the first one in kv_ or blocks_
};

class Backward {
 public:
  Backward(const AttentionStep& step,
           const at::Tensor& grad_out,
           const AttentionKeys& keys,
           const Batch& batch,
           const AttentionParams& params)
      : batch_(batch),
        params_(params),
        where_(keys),
        heads_(step.q.size(1)),
        dim_(step.q.size(2)),
        q_(wide(step.q)),
        grad_out_(wide(grad_out)),
        both_(at::stack({grad_out_, q_}, 1)),
        lse_(wide(step.lse)),
        delta_(at::empty_like(lse_)),
        grad_q_(at::empty_like(q_)) {
    lay_out(step);
    grad_kv_ = at::empty_like(kv_);
    if (params.ratio > 0) {
      blocks_ = wide(step.blocks);
      grad_blocks_ = at::empty_like(blocks_);
    }
    if (step.selection.defined()) selection_ = step.selection.contiguous();
    const at::Tensor out = wide(step.out);
    parallel_for(q_.size(0), kTile, [&](int64_t begin, int64_t end) {
      const int64_t row = begin * heads_;
      row_dots_cpu(grad_out_.const_data_ptr<float>() + row * dim_,
                   out.const_data_ptr<float>() + row * dim_, (end - begin) * heads_, dim_,
                   delta_.mutable_data_ptr<float>() + row);
    });
  }

  AttentionGradients run(const AttentionStep& step) {
    std::vector<Tile> queries, keys;
    for (int64_t seq = 0; seq < batch_.num_seqs(); ++seq) {
      const int64_t begin = batch_.begin(seq), end = batch_.end(seq);
      // A tile is the same wherever a pass was cut between chunks.
      for (int64_t token = begin, next = 0; token < end; token = next) {
        next = std::min(end, (token / kTile + 1) * kTile);
        queries.push_back({.seq = seq, .run = window_run(seq, token, next)});
      }
      // Sums of a chunk go in slabs from its first row on, which must be the same, too.
      for (int64_t token = oldest(seq), next = 0; token < end; token = next) {
        next = std::min(end, token - ((token % kTile + kTile) % kTile) + kTile);
        keys.push_back({.seq = seq, .run = window_run(seq, token, next)});
      }
      const int64_t blocks = num_blocks(seq, end);
      for (int64_t block = 0; block < blocks; block += kTile) {
        const int64_t count = std::min(kTile, blocks - block);
        keys.push_back({.seq = seq, .run = {true, block, count, first_block(seq) + block}});
      }
    }
    parallel_for(std::ssize(queries), 1, [&](int64_t from, int64_t to) {
      const at::NoGradGuard no_grad;
      for (int64_t i = from; i < to; ++i) query_tile(queries[static_cast<size_t>(i)]);
    });
    parallel_for(std::ssize(keys), 1, [&](int64_t from, int64_t to) {
      const at::NoGradGuard no_grad;
      for (int64_t i = from; i < to; ++i) key_tile(keys[static_cast<size_t>(i)]);
    });
    AttentionGradients grads{.q = grad_q_.to(step.q.scalar_type()),
                             .kv = {},
                             .history = {},
                             .blocks = {},
                             .sink = sink_gradient(wide(step.sink)).to(step.sink.scalar_type())};
    // A chunk whose queries see nothing of a key is no leaf of its sum or a zero: +0 in any case.
    grad_kv_.add_(0.0);
    if (grad_blocks_.defined()) grads.blocks = grad_blocks_.add_(0.0).to(step.blocks.scalar_type());
    take_apart(step, grads);
    return grads;
  }

 private:
  struct Tile {
    int64_t seq;
    KeyRun run;
  };

  static at::Tensor wide(const at::Tensor& x) { return x.detach().to(at::kFloat).contiguous(); }

  /// The oldest key of the window that a sequence's first query sees.
  int64_t oldest(int64_t seq) const {
    return batch_.begin(seq) -
           std::min(batch_.start(seq), std::max<int64_t>(params_.window - 1, 0));
  }
  KeyRun window_run(int64_t seq, int64_t begin, int64_t end) const {
    return {false, begin, end - begin, begin + shift_[static_cast<size_t>(seq)]};
  }
  /// Rows of the ring that hold the window before a sequence.
  at::Tensor past_rows(int64_t seq) const {
    const int64_t start = batch_.start(seq), count = batch_.begin(seq) - oldest(seq);
    return where_.history.numbers(seq, start - count, start);
  }

  /// kv_: of every sequence the window before it, then its tokens.
  void lay_out(const AttentionStep& step) {
    std::vector<at::Tensor> parts;
    int64_t shift = 0;
    for (int64_t seq = 0; seq < batch_.num_seqs(); ++seq) {
      const int64_t past = batch_.begin(seq) - oldest(seq);
      if (past > 0) parts.push_back(wide(step.history.index_select(0, past_rows(seq))));
      parts.push_back(wide(step.kv.narrow(0, batch_.begin(seq), batch_.length(seq))));
      shift += past;
      shift_.push_back(shift);
    }
    kv_ = shift == 0 ? wide(step.kv) : at::cat(parts);
  }

  void take_apart(const AttentionStep& step, AttentionGradients& grads) const {
    if (step.history.defined()) grads.history = at::zeros_like(step.history);
    std::vector<at::Tensor> parts;
    for (int64_t seq = 0; seq < batch_.num_seqs(); ++seq) {
      const int64_t past = batch_.begin(seq) - oldest(seq),
                    shift = shift_[static_cast<size_t>(seq)];
      if (past > 0)
        grads.history.index_copy_(
            0, past_rows(seq),
            grad_kv_.narrow(0, oldest(seq) + shift, past).to(step.history.scalar_type()));
      parts.push_back(grad_kv_.narrow(0, batch_.begin(seq) + shift, batch_.length(seq)));
    }
    grads.kv = (shift_.back() == 0 ? grad_kv_ : at::cat(parts)).to(step.kv.scalar_type());
  }

  int64_t num_blocks(int64_t seq, int64_t end_token) const {
    return params_.ratio > 0 ? (batch_.start(seq) + end_token - batch_.begin(seq)) / params_.ratio
                             : 0;
  }
  int64_t first_block(int64_t seq) const { return where_.first_blocks[static_cast<size_t>(seq)]; }

  at::Tensor rows_of(const KeyRun& run) const {
    return (run.is_blocks ? blocks_ : kv_).narrow(0, run.row, run.count);
  }

  /// Rows (token, head) of tokens [begin, end).
  at::Tensor token_rows(const at::Tensor& x, int64_t begin, int64_t end) const {
    return x.narrow(0, begin, end - begin).reshape({(end - begin) * heads_, dim_});
  }

  /// Marks of the chosen blocks of a token among those of a run.
  void mark_chosen(int64_t token, const KeyRun& run, std::vector<uint8_t>& marks) const {
    marks.assign(static_cast<size_t>(run.count), 0);
    const int64_t k = selection_.size(1);
    const int32_t* chosen = selection_.const_data_ptr<int32_t>() + token * k;
    for (int64_t rank = 0; rank < k && chosen[rank] >= 0; ++rank) {
      const int64_t key = chosen[rank] - run.first;
      if (key >= 0 && key < run.count) marks[static_cast<size_t>(key)] = 1;
    }
  }

  /// dot and grad [rows, columns] over runs that lie side by side become probabilities and the
  /// gradients of the logits before their scale.
  void differentiate(int64_t begin,
                     int64_t end,
                     int64_t seq,
                     const std::vector<KeyRun>& runs,
                     const at::Tensor& dot,
                     const at::Tensor& grad) const {
    const int64_t columns = dot.size(1);
    std::vector<uint8_t> marks;
    for (int64_t token = begin; token < end; ++token) {
      int64_t column = 0;
      for (const KeyRun& run : runs) {
        int64_t first = 0, last = 0;
        if (run.is_blocks) {
          last = num_blocks(seq, token + 1) - run.first;
          if (selection_.defined()) mark_chosen(token, run, marks);
        } else {
          first = token - params_.window + 1 - run.first;
          last = token + 1 - run.first;
        }
        const bool chosen = run.is_blocks && selection_.defined();
        for (int64_t head = 0; head < heads_; ++head) {
          const int64_t row = (token - begin) * heads_ + head, at = row * columns + column;
          logit_gradient_cpu({.dot = dot.mutable_data_ptr<float>() + at,
                              .grad = grad.mutable_data_ptr<float>() + at,
                              .chosen = chosen ? marks.data() : nullptr,
                              .first = std::clamp<int64_t>(first, 0, run.count),
                              .last = std::clamp<int64_t>(last, 0, run.count),
                              .lse = lse_.const_data_ptr<float>()[token * heads_ + head],
                              .delta = delta_.const_data_ptr<float>()[token * heads_ + head]},
                             run.count, static_cast<float>(params_.scale));
        }
        column += run.count;
      }
    }
  }

  void query_tile(const Tile& tile) {
    const int64_t begin = tile.run.first, end = begin + tile.run.count;
    std::vector<KeyRun> runs{
        window_run(tile.seq, std::max(oldest(tile.seq), begin - params_.window + 1), end)};
    at::Tensor keys = rows_of(runs[0]);
    if (const int64_t blocks = num_blocks(tile.seq, end); blocks > 0) {
      runs.push_back({true, 0, blocks, first_block(tile.seq)});
      keys = at::cat({keys, rows_of(runs[1])});
    }
    const Panels panels = pack_panels(keys);
    const at::Tensor dot = linear(token_rows(q_, begin, end), panels, GemmRole::kFp32);
    const at::Tensor grad = linear(token_rows(grad_out_, begin, end), panels, GemmRole::kFp32);
    differentiate(begin, end, tile.seq, runs, dot, grad);
    token_rows(grad_q_, begin, end).copy_(input_gradient(grad, keys));
  }

  void key_tile(const Tile& tile) {
    const KeyRun& run = tile.run;
    // The queries that may see one of the keys.
    const int64_t seq_begin = batch_.begin(tile.seq), seq_end = batch_.end(tile.seq);
    const int64_t first =
        run.is_blocks ? seq_begin - batch_.start(tile.seq) + (run.first + 1) * params_.ratio - 1
                      : run.first;
    const int64_t begin = std::max(seq_begin, first);
    const int64_t end =
        run.is_blocks ? seq_end : std::min(seq_end, run.first + run.count - 1 + params_.window);
    const at::Tensor keys = rows_of(run);
    const Panels panels = pack_panels(keys);
    const at::Tensor q = token_rows(q_, begin, end), out = token_rows(grad_out_, begin, end);
    const at::Tensor dot = linear(q, panels, GemmRole::kFp32);
    const at::Tensor grad = linear(out, panels, GemmRole::kFp32);
    differentiate(begin, end, tile.seq, {run}, dot, grad);
    const at::Tensor places = at::arange(begin, end, at::kLong).repeat_interleave(2 * heads_);
    const auto by_token = [&](const at::Tensor& x) {
      return x.reshape({end - begin, heads_, run.count});
    };
    const at::Tensor factors = at::stack({by_token(dot), by_token(grad)}, 1)
                                   .reshape({(end - begin) * 2 * heads_, run.count});
    const at::Tensor rows =
        both_.narrow(0, begin, end - begin).reshape({(end - begin) * 2 * heads_, dim_});
    (run.is_blocks ? grad_blocks_ : grad_kv_)
        .narrow(0, run.row, run.count)
        .copy_(weight_gradient(factors, rows, places));
  }

  at::Tensor sink_gradient(const at::Tensor& sink) const {
    const int64_t tokens = lse_.size(0);
    const at::Tensor result = at::empty({heads_}, sink.options());
    std::vector<float> terms(static_cast<size_t>(tokens));
    for (int64_t head = 0; head < heads_; ++head) {
      const double logit = sink.const_data_ptr<float>()[head];
      for (int64_t token = 0; token < tokens; ++token) {
        const int64_t at = token * heads_ + head;
        const double share =
            std::exp(logit - static_cast<double>(lse_.const_data_ptr<float>()[at]));
        terms[static_cast<size_t>(token)] =
            -static_cast<float>(share) * delta_.const_data_ptr<float>()[at];
      }
      result.mutable_data_ptr<float>()[head] = tree_sum(terms.data(), tokens);
    }
    return result;
  }

  const Batch& batch_;
  const AttentionParams& params_;
  const AttentionKeys& where_;
  int64_t heads_, dim_;
  at::Tensor q_, grad_out_;
  at::Tensor both_;  ///< [tokens, 2, heads, head_dim] grad_out, then q
  at::Tensor lse_, delta_, grad_q_, kv_, grad_kv_, blocks_, grad_blocks_, selection_;
  std::vector<int64_t> shift_;  ///< [num_seqs] from a token to its row of kv_
};

}  // namespace

AttentionGradients sparse_attn_backward(const AttentionStep& step,
                                        const at::Tensor& grad_out,
                                        const AttentionKeys& keys,
                                        const Batch& batch,
                                        const AttentionParams& params) {
  HADAL_CHECK(batch.whole() || step.history.defined(),
              "sparse_attn_backward: a sequence continues without a history");
  check_shape(grad_out, {step.q.size(0), step.q.size(1), step.q.size(2)},
              "sparse_attn_backward: grad_out");
  if (params.ratio > 0)
    check_shape(step.blocks, {-1, step.q.size(2)}, "sparse_attn_backward: blocks");
  return Backward(step, grad_out, keys, batch, params).run(step);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Held : torch::CustomClassHolder {
  Held(Batch step, const AttentionParams& p, at::Tensor chosen, AttentionKeys where)
      : batch(std::move(step)), params(p), selection(std::move(chosen)), keys(std::move(where)) {}
  Batch batch;
  AttentionParams params;
  at::Tensor selection;
  AttentionKeys keys;
};

struct SparseAttnCpu : torch::autograd::Function<SparseAttnCpu> {
  static variable_list forward(AutogradContext* context,
                               const at::Tensor& q,
                               const at::Tensor& kv,
                               const std::optional<at::Tensor>& history,
                               const std::optional<at::Tensor>& blocks,
                               const at::Tensor& sink,
                               const TensorFunction& kernel,
                               const c10::intrusive_ptr<Held>& held) {
    const at::Tensor past = history.value_or(at::Tensor()), rows = blocks.value_or(at::Tensor());
    variable_list results = kernel({q, kv, past, rows, sink});
    context->save_for_backward({q, kv, past, rows, sink, results[0], results[1]});
    context->saved_data["held"] = c10::IValue::make_capsule(held);
    context->mark_non_differentiable({results[1]});
    context->set_materialize_grads(false);
    return results;
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    variable_list grads(7);
    if (!grad_outputs[0].defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    const auto held =
        c10::static_intrusive_pointer_cast<Held>(context->saved_data["held"].toCapsule());
    AttentionGradients computed =
        sparse_attn_backward({.q = saved[0],
                              .kv = saved[1],
                              .history = saved[2],
                              .blocks = saved[3],
                              .selection = held->selection,
                              .sink = saved[4],
                              .out = saved[5],
                              .lse = saved[6]},
                             grad_outputs[0], held->keys, held->batch, held->params);
    grads[0] = std::move(computed.q);
    grads[1] = std::move(computed.kv);
    grads[2] = std::move(computed.history);
    grads[3] = std::move(computed.blocks);
    grads[4] = std::move(computed.sink);
    return grads;
  }
};

}  // namespace

std::vector<at::Tensor> with_attention_gradient(const TensorFunction& forward,
                                                const std::vector<at::Tensor>& inputs,
                                                const at::Tensor& selection,
                                                const RingView& history,
                                                const BlockView& blocks,
                                                const Batch& batch,
                                                const AttentionParams& params) {
  const auto wanted = [](const at::Tensor& x) { return x.defined() && x.requires_grad(); };
  if (!at::GradMode::is_enabled() || std::ranges::none_of(inputs, wanted)) return forward(inputs);
  const auto optional = [](const at::Tensor& x) {
    return x.defined() ? std::optional(x) : std::nullopt;
  };
  AttentionKeys where{.history = history, .first_blocks = {}};
  where.history.rows = at::Tensor();  // saved by autograd
  if (params.ratio > 0) where.first_blocks = blocks.first_rows();
  return SparseAttnCpu::apply(
      inputs[0], inputs[1], optional(inputs[2]), optional(inputs[3]), inputs[4], forward,
      c10::make_intrusive<Held>(batch, params, selection, std::move(where)));
}

}  // namespace hadal::ops
