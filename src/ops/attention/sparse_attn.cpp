#include "ops/attention/sparse_attn.h"

#include <algorithm>
#include <limits>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/math.h"
#include "base/parallel.h"
#include "ops/attention/attention_cpu.h"
#include "ops/attention/key_list.h"
#include "ops/attention/sm90_attention.h"
#include "ops/attention/sparse_attn_backward.h"
#include "ops/attention/sparse_attn_kernels.h"
#include "ops/rows/gather.h"

namespace hadal::ops {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

/// The running state of the fold over key chunks for some queries.
struct Fold {
  at::Tensor max;  // [tokens, heads, 1]
  at::Tensor sum;  // [tokens, heads, 1]
  at::Tensor acc;  // [tokens, heads, dim]
};

/// Adds one chunk of keys. keys [tokens or 1, chunk, dim]; hidden [tokens, chunk] true where there
/// is no key.
void fold_chunk(Fold& fold,
                const at::Tensor& q,
                const at::Tensor& keys,
                const at::Tensor& hidden,
                const AttentionParams& params) {
  const at::Tensor logits =
      (at::matmul(q, keys.transpose(-1, -2)) * params.scale)
          .masked_fill(hidden.unsqueeze(1), kMinusInfinity);  // [tokens, heads, chunk]
  const at::Tensor seen = at::maximum(fold.max, logits.detach().amax(-1, /*keepdim=*/true));
  // A query that has met no key yet keeps -inf as its maximum; 0 in its place keeps the
  // exponentials at 0.
  const at::Tensor base = seen.masked_fill(seen == kMinusInfinity, 0.0);
  const at::Tensor rescale = at::exp(fold.max - base);
  const at::Tensor p = at::exp(logits - base);
  const at::Tensor weights =
      rounds_probabilities(params.numerics) ? p.to(at::kBFloat16).to(p.scalar_type()) : p;
  fold.sum = fold.sum * rescale + p.sum(-1, /*keepdim=*/true);
  fold.acc = fold.acc * rescale + at::matmul(weights, keys);
  fold.max = seen;
}

/// Latents of positions [from, to) of a sequence in the fold's type; positions before 0 are zero
/// rows.
at::Tensor window_rows(const at::Tensor& kv,
                       const RingView& history,
                       const Batch& batch,
                       int64_t seq,
                       int64_t from,
                       int64_t to) {
  const at::ScalarType type = compute_type(kv);
  const int64_t start = batch.start(seq), begin = batch.begin(seq);
  std::vector<at::Tensor> parts;
  if (from < 0) parts.push_back(at::zeros({-from, kv.size(1)}, kv.options().dtype(type)));
  if (std::max<int64_t>(from, 0) < start) {
    HADAL_CHECK(history.rows.defined(), "sparse_attn: sequence ", seq, " starts at ", start,
                " without a history");
    const int64_t first = std::max<int64_t>(from, 0);
    parts.push_back(history.gather(seq, first, std::min(start, to)).to(type));
  }
  const int64_t end = start + batch.length(seq);
  if (std::min(to, end) > std::max(from, start)) {
    const int64_t first = std::max(from, start);
    parts.push_back(kv.narrow(0, begin + first - start, std::min(to, end) - first).to(type));
  }
  if (to > end) parts.push_back(at::zeros({to - end, kv.size(1)}, kv.options().dtype(type)));
  return at::cat(parts);
}

/// Folds the window chunks of one block of queries whose positions lie in one chunk of 64.
void fold_window(Fold& fold,
                 const at::Tensor& q,
                 const at::Tensor& pos,
                 int64_t first_pos,
                 int64_t last_pos,
                 const at::Tensor& kv,
                 const RingView& history,
                 const Batch& batch,
                 int64_t seq,
                 const AttentionParams& params) {
  const int64_t oldest = std::max<int64_t>(first_pos - params.window + 1, 0);
  for (int64_t chunk = oldest / kFoldChunk; chunk <= last_pos / kFoldChunk; ++chunk) {
    // Rows older than the window of the first query have left the ring: they are masked for every
    // query.
    const int64_t from = std::max(chunk * kFoldChunk, oldest), to = (chunk + 1) * kFoldChunk;
    const at::Tensor keys = window_rows(kv, history, batch, seq, from, to);
    const at::Tensor key_pos = at::arange(from, to, pos.options()).unsqueeze(0);
    const at::Tensor hidden =
        (key_pos > pos.unsqueeze(1)).logical_or(key_pos <= pos.unsqueeze(1) - params.window);
    fold_chunk(fold, q, keys.unsqueeze(0), hidden, params);
  }
}

void fold_blocks(Fold& fold,
                 const at::Tensor& q,
                 const at::Tensor& pos,
                 int64_t last_pos,
                 const BlockView& blocks,
                 int64_t seq,
                 const AttentionParams& params) {
  const at::ScalarType type = q.scalar_type();
  const int64_t visible = (last_pos + 1) / params.ratio;
  const at::Tensor limit = (pos + 1).div(params.ratio, "floor").unsqueeze(1);
  for (int64_t from = 0; from < visible; from += kFoldChunk) {
    const int64_t to = std::min(from + kFoldChunk, visible);
    const at::Tensor keys = blocks.gather(seq, from, to).to(type);
    const at::Tensor hidden = at::arange(from, to, pos.options()).unsqueeze(0) >= limit;
    fold_chunk(fold, q, keys.unsqueeze(0), hidden, params);
  }
}

void fold_selection(Fold& fold,
                    const at::Tensor& q,
                    const at::Tensor& selection,
                    const BlockView& blocks,
                    int64_t seq,
                    int64_t num_blocks,
                    const AttentionParams& params) {
  const at::Tensor all = blocks.gather(seq, 0, num_blocks);
  for (int64_t from = 0; from < selection.size(1); from += kFoldChunk) {
    const at::Tensor chosen =
        selection.narrow(1, from, std::min(kFoldChunk, selection.size(1) - from)).to(at::kLong);
    // -1 stands on block 0 and is masked.
    const at::Tensor keys = gather_rows(all, chosen.clamp_min(0).flatten())
                                .to(q.scalar_type())
                                .reshape({chosen.size(0), chosen.size(1), -1});
    fold_chunk(fold, q, keys, chosen < 0, params);
  }
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The CUDA kernels behind autograd. Everything but the differentiable tensors travels by value.
struct CudaInputs : torch::CustomClassHolder {
  CudaInputs(Batch step, const AttentionParams& p, at::Tensor chosen)
      : batch(std::move(step)), params(p), selection(std::move(chosen)) {}
  Batch batch;
  AttentionParams params;
  at::Tensor selection;
};

SparseAttnParams kernel_params(const at::Tensor& q,
                               const at::Tensor& kv,
                               const at::Tensor& blocks,
                               const at::Tensor& sink,
                               const at::Tensor& selection,
                               const at::Tensor& out,
                               const at::Tensor& lse,
                               const Batch& batch,
                               const AttentionParams& params) {
  const int64_t heads = q.size(1);
  const at::Tensor& tiles =
      batch.token_tiles(selection.defined() ? 1 : kSparseAttnMaxHeads / heads);
  return {.q = q.const_data_ptr(),
          .kv = kv.const_data_ptr(),
          .blocks = params.ratio > 0 ? blocks.const_data_ptr() : nullptr,
          .sink = sink.const_data_ptr<float>(),
          .selection = selection.defined() ? selection.const_data_ptr<int32_t>() : nullptr,
          .tiles = reinterpret_cast<const TokenTile*>(tiles.const_data_ptr<int32_t>()),
          .cu_seqlens = batch.device_cu_seqlens().const_data_ptr<int32_t>(),
          .cu_blocks = params.ratio > 0
                           ? batch.blocks(params.ratio).device_cu_blocks.const_data_ptr<int32_t>()
                           : nullptr,
          .out = out.mutable_data_ptr(),
          .lse = lse.mutable_data_ptr<float>(),
          .num_tiles = narrow<int32_t>(tiles.size(0)),
          .tokens = narrow<int32_t>(q.size(0)),
          .heads = narrow<int32_t>(heads),
          .window = narrow<int32_t>(params.window),
          .ratio = narrow<int32_t>(params.ratio),
          .topk = selection.defined() ? narrow<int32_t>(selection.size(1)) : 0,
          .scale = static_cast<float>(params.scale)};
}

struct SparseAttnCuda : torch::autograd::Function<SparseAttnCuda> {
  static variable_list forward(AutogradContext* context,
                               const at::Tensor& q,
                               const at::Tensor& kv,
                               const at::Tensor& blocks,
                               const at::Tensor& sink,
                               const c10::intrusive_ptr<CudaInputs>& shared) {
    const CudaInputs& inputs = *shared;
    const at::Tensor out = at::empty_like(q);
    const at::Tensor lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
    sparse_attn_cuda(
        kernel_params(q, kv, blocks, sink, inputs.selection, out, lse, inputs.batch, inputs.params),
        current_stream(q));
    context->save_for_backward({q, kv, blocks, sink, inputs.selection, out, lse});
    context->saved_data["inputs"] = c10::IValue::make_capsule(shared);
    context->mark_non_differentiable({lse});
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &q = saved[0], &kv = saved[1], &blocks = saved[2], &sink = saved[3],
                     &selection = saved[4], &out = saved[5], &lse = saved[6];
    const auto inputs =
        c10::static_intrusive_pointer_cast<CudaInputs>(context->saved_data["inputs"].toCapsule());
    const Batch& batch = inputs->batch;
    const AttentionParams& params = inputs->params;
    const at::Tensor grad_out = grad_outputs[0].contiguous();
    const at::Tensor delta = at::empty_like(lse);
    const at::Tensor grad_q = at::empty_like(q), grad_kv = at::empty_like(kv);
    const at::Tensor grad_blocks = params.ratio > 0 ? at::empty_like(blocks) : at::Tensor();
    const at::Tensor& tiles = batch.key_tiles(kFoldChunk, params.ratio);
    at::Tensor selected;
    if (selection.defined()) {
      const int64_t words = ceil_div(std::max<int64_t>(batch.max_end_pos() / params.ratio, 1), 32);
      selected = at::empty({q.size(0), words}, selection.options());
    }
    sparse_attn_backward_cuda(
        {.forward = kernel_params(q, kv, blocks, sink, selection, out, lse, batch, params),
         .grad_out = grad_out.const_data_ptr(),
         .key_tiles = reinterpret_cast<const KeyTile*>(tiles.const_data_ptr<int32_t>()),
         .selected = selected.defined()
                         ? reinterpret_cast<const uint32_t*>(selected.mutable_data_ptr<int32_t>())
                         : nullptr,
         .delta = delta.mutable_data_ptr<float>(),
         .grad_q = grad_q.mutable_data_ptr(),
         .grad_kv = grad_kv.mutable_data_ptr(),
         .grad_blocks = grad_blocks.defined() ? grad_blocks.mutable_data_ptr() : nullptr,
         .num_key_tiles = narrow<int32_t>(tiles.size(0)),
         .mask_words = selected.defined() ? narrow<int32_t>(selected.size(1)) : 0},
        current_stream(q));
    const at::Tensor grad_sink = -(at::exp(sink.unsqueeze(0) - lse) * delta).sum(0);
    return {grad_q, grad_kv, grad_blocks, grad_sink, at::Tensor()};
  }
};

bool use_cuda_kernel(const at::Tensor& q,
                     const RingView& history,
                     const at::Tensor& selection,
                     const Batch& batch,
                     const AttentionParams& params) {
  return q.is_cuda() && sparse_attn_cuda && !reference_forced() &&
         q.scalar_type() == at::kBFloat16 && q.size(2) == kSparseAttnDim &&
         q.size(1) <= (selection.defined() ? kSparseAttnMaxSelectedHeads : kSparseAttnMaxHeads) &&
         !history.rows.defined() && batch.whole() && params.numerics != Numerics::kIdeal;
}

}  // namespace

constinit KernelSlot<void(const SparseAttnParams&, Stream)> sparse_attn_cuda;
constinit KernelSlot<void(const SparseAttnBackwardParams&, Stream)> sparse_attn_backward_cuda;

namespace reference {

AttentionResult sparse_attn(const at::Tensor& q,
                            const at::Tensor& kv,
                            const RingView& history,
                            const BlockView& blocks,
                            const at::Tensor& selection,
                            const at::Tensor& sink,
                            const Batch& batch,
                            const AttentionParams& params) {
  const at::ScalarType type = compute_type(q);
  const int64_t heads = q.size(1);
  const at::Tensor sink_logit = sink.to(type).reshape({1, heads, 1});
  std::vector<at::Tensor> outs, lses;
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const int64_t end = batch.start(seq) + batch.length(seq);
    for (int64_t first = batch.start(seq); first < end;) {
      // Queries of one chunk of 64 positions share their window chunks.
      const int64_t next = std::min(end, (first / kFoldChunk + 1) * kFoldChunk),
                    count = next - first;
      const int64_t row = batch.begin(seq) + first - batch.start(seq);
      const at::Tensor queries = q.narrow(0, row, count).to(type),
                       pos = batch.pos().narrow(0, row, count);
      Fold fold{.max = at::full({count, heads, 1}, kMinusInfinity, queries.options()),
                .sum = at::zeros({count, heads, 1}, queries.options()),
                .acc = at::zeros_like(queries)};
      fold_window(fold, queries, pos, first, next - 1, kv, history, batch, seq, params);
      if (params.ratio > 0 && next / params.ratio > 0) {
        if (selection.defined()) {
          fold_selection(fold, queries, selection.narrow(0, row, count), blocks, seq,
                         next / params.ratio, params);
        } else {
          fold_blocks(fold, queries, pos, next - 1, blocks, seq, params);
        }
      }
      const at::Tensor denominator = fold.sum + at::exp(sink_logit - fold.max);
      outs.push_back((fold.acc / denominator).to(q.scalar_type()));
      lses.push_back((fold.max + at::log(denominator)).squeeze(-1));
      first = next;
    }
  }
  return {.out = at::cat(outs), .lse = at::cat(lses)};
}

}  // namespace reference

constinit CpuSlot<void(const AttentionCpuParams&, const AttentionKeysCpu&)> attention_cpu;

namespace {

/// Rows of a tensor [rows, width] by number.
struct RowTable {
  const char* rows;
  int64_t bytes;
  explicit RowTable(const at::Tensor& x)
      : rows(x.defined() ? static_cast<const char*>(x.const_data_ptr()) : nullptr),
        bytes(x.defined() ? x.stride(0) * x.element_size() : 0) {}
  const void* row(int64_t index) const { return rows + index * bytes; }
};

/// What the CPU kernel of one step reads.
struct CpuStep {
  const RingView& history;
  const BlockView& blocks;
  at::Tensor selection;
  const Batch& batch;
  const AttentionParams& params;
};

/// Rows before the step: their bytes and which is whose.
struct CachedRows {
  RowTable history, compressed;
  RingRows ring;
  BlockRows blocks;
};

void list_keys(KeyList& keys,
               const CpuStep& step,
               int64_t token,
               int64_t seq,
               const RowTable& kv,
               const CachedRows& cached) {
  const int64_t start = step.batch.start(seq), begin = step.batch.begin(seq);
  const int64_t pos = start + token - begin, ratio = step.params.ratio;
  keys.clear();
  for (int64_t p = std::max<int64_t>(0, pos - step.params.window + 1); p <= pos; ++p) {
    if (p % kFoldChunk == 0) keys.end_chunk();
    if (p >= start) {
      keys.add(kv.row(begin + p - start), false);
    } else {
      keys.add(cached.history.row(cached.ring.row(seq, p)), step.history.format.packed());
    }
  }
  keys.end_chunk();
  const int64_t visible = ratio > 0 ? (pos + 1) / ratio : 0;
  if (step.selection.defined()) {
    const int64_t k = step.selection.size(1);
    const int32_t* chosen = step.selection.const_data_ptr<int32_t>() + token * k;
    for (int64_t rank = 0; rank < k && chosen[rank] >= 0; ++rank) {
      if (rank % kFoldChunk == 0) keys.end_chunk();
      keys.add(cached.compressed.row(cached.blocks.row(seq, chosen[rank])),
               step.blocks.format.packed());
    }
  } else {
    for (int64_t block = 0; block < visible; ++block) {
      if (block % kFoldChunk == 0) keys.end_chunk();
      keys.add(cached.compressed.row(cached.blocks.row(seq, block)), step.blocks.format.packed());
    }
  }
  keys.end_chunk();
}

void check_rows(const at::Tensor& rows, const RowFormat& format, const at::Tensor& q) {
  if (!rows.defined()) return;
  HADAL_CHECK(format.packed() ? rows.scalar_type() == at::kByte && format.width == q.size(2)
                              : rows.scalar_type() == q.scalar_type(),
              "sparse_attn: queries are ", q.scalar_type(), " of ", q.size(2),
              " channels, cached rows are ", rows.scalar_type());
}

std::vector<at::Tensor> run_cpu(const std::vector<at::Tensor>& in, const CpuStep& step) {
  const at::Tensor q = in[0].contiguous(), kv = in[1].to(q.scalar_type()).contiguous(),
                   compressed = in[2].defined() ? in[2].contiguous() : in[2],
                   sink = in[3].to(at::kFloat).contiguous();
  const at::Tensor& past = step.history.rows;
  const int64_t heads = q.size(1), dim = q.size(2);
  check_rows(past, step.history.format, q);
  check_rows(compressed, step.blocks.format, q);
  const RowFormat format = step.history.format.packed() ? step.history.format : step.blocks.format;
  HADAL_CHECK(!step.blocks.format.packed() || step.blocks.format == format,
              "sparse_attn: window and blocks are packed differently");
  at::Tensor out = at::empty_like(q), lse = at::empty({q.size(0), heads}, sink.options());
  const RowTable table_q(q), table_kv(kv);
  const CachedRows cached{.history = RowTable(past),
                          .compressed = RowTable(compressed),
                          .ring = past.defined() ? step.history.table() : RingRows{},
                          .blocks = step.params.ratio > 0 ? step.blocks.table() : BlockRows{}};
  char* out_rows = static_cast<char*>(out.mutable_data_ptr());
  parallel_for(step.batch.num_tokens(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(attention_scratch_floats(heads, dim)));
    KeyList keys;
    int64_t seq = 0;
    for (int64_t token = begin; token < end; ++token) {
      while (step.batch.end(seq) <= token) ++seq;
      HADAL_CHECK(step.batch.start(seq) == 0 || past.defined() || step.params.window == 0,
                  "sparse_attn: sequence ", seq, " continues without a history");
      list_keys(keys, step, token, seq, table_kv, cached);
      attention_cpu({.q = table_q.row(token),
                     .sink = sink.const_data_ptr<float>(),
                     .out = out_rows + token * table_q.bytes,
                     .lse = lse.mutable_data_ptr<float>() + token * heads,
                     .scratch = scratch.data(),
                     .heads = heads,
                     .dim = dim,
                     .scale = static_cast<float>(step.params.scale),
                     .dtype = element_type(q),
                     .format = format,
                     .round_probabilities = rounds_probabilities(step.params.numerics)},
                    keys.view());
    }
  });
  return {out, lse};
}

}  // namespace

AttentionResult sparse_attn(const at::Tensor& q,
                            const at::Tensor& kv,
                            const RingView& history,
                            const BlockView& blocks,
                            const at::Tensor& selection,
                            const at::Tensor& sink,
                            const Batch& batch,
                            const AttentionParams& params) {
  check_shape(q, {batch.num_tokens(), -1, -1}, "sparse_attn: q");
  check_shape(sink, {q.size(1)}, "sparse_attn: sink");
  if (selection.defined())
    check_shape(selection, {batch.num_tokens(), -1}, "sparse_attn: selection");
  if (serves_attention_sm90(q, history, blocks, params))
    return attention_on_sm90(q, kv, history, blocks, selection, sink, batch, params);
  refuse_attention_as_hopper(q, params);
  check_shape(kv, {batch.num_tokens(), q.size(2)}, "sparse_attn: kv");
  if (use_cuda_kernel(q, history, selection, batch, params)) {
    // Window layers have no blocks; autograd wants a tensor in their place.
    const at::Tensor rows =
        params.ratio > 0 ? blocks.rows.contiguous() : at::empty({0, q.size(2)}, q.options());
    const variable_list results =
        SparseAttnCuda::apply(q.contiguous(), kv.contiguous(), rows, sink,
                              c10::make_intrusive<CudaInputs>(batch, params, selection));
    return {.out = results[0], .lse = results[1]};
  }
  if (use_cpu_kernel(q)) {
    const at::Tensor chosen = selection.defined() ? selection.contiguous() : selection;
    const bool dense = !history.format.packed() && !blocks.format.packed();
    const bool in_lines = params.ratio == 0 || blocks.page_blocks == INT64_MAX;
    // Rows of other ranks come in FP32: their gradients are parts of sums.
    const auto rows = [&](const at::Tensor& x) {
      return dense && x.defined() ? x.to(q.scalar_type()) : x;
    };
    const auto kernel = [&](const auto& in) {
      RingView past = history;
      past.rows = rows(in[2]);
      return run_cpu({in[0], in[1], rows(in[3]), in[4]}, {past, blocks, chosen, batch, params});
    };
    const auto backward = [history, blocks, chosen, batch, params](const auto& in) {
      BlockView view = blocks;
      view.rows = in[3];
      const AttentionResult r =
          reference::sparse_attn(in[0], in[1], history, view, chosen, in[4], batch, params);
      return std::vector{r.out, r.lse};
    };
    const std::vector<at::Tensor> inputs{q, kv, history.rows, blocks.rows, sink};
    const std::vector<at::Tensor> results =
        dense && in_lines
            ? with_attention_gradient(kernel, inputs, chosen, history, blocks, batch, params)
            : with_reference_gradient(kernel, backward, inputs);
    return {.out = results[0], .lse = results[1]};
  }
  return reference::sparse_attn(q, kv, history, blocks, selection, sink, batch, params);
}

}  // namespace hadal::ops
