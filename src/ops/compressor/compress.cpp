#include "ops/compressor/compress.h"

#include <limits>
#include <utility>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/compressor/compress_cpu.h"
#include "ops/compressor/compress_sm90.h"
#include "ops/gemm/trained_product.h"
#include "ops/op.h"
#include "ops/rows/gather.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

/// x at every position of every new block, [num_blocks, ratio, width], from the step or its
/// history.
at::Tensor block_rows(const at::Tensor& x,
                      const RingView& history,
                      const Batch& batch,
                      int64_t ratio) {
  const BlockPlan& plan = batch.blocks(ratio);
  const std::vector<int64_t> shape = {plan.num_blocks(), ratio, x.size(1)};
  if (plan.inside) return gather_distinct_rows(x, plan.rows).reshape(shape);
  HADAL_CHECK(history.rows.defined(), "compress: a sequence continues without a history");
  const at::Tensor seq = plan.seq.repeat_interleave(ratio);
  const at::Tensor past = history.numbers(seq, plan.rows.add(1).neg().clamp_min(0));
  const at::Tensor rows = at::where(plan.rows >= 0, plan.rows + history.rows.size(0), past);
  return gather_distinct_rows(at::cat({history.rows, x}), rows).reshape(shape);
}

/// The first half of the block before each sequence's first new one, [num_seqs, ratio, d]; `absent`
/// at position 0.
at::Tensor leading_rows(const at::Tensor& x,
                        const RingView& history,
                        const Batch& batch,
                        int64_t ratio,
                        int64_t d,
                        double absent) {
  const BlockPlan& plan = batch.blocks(ratio);
  at::Tensor result = at::full({batch.num_seqs(), ratio, d}, absent, x.options());
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const int64_t first = plan.first_block[static_cast<size_t>(seq)];
    const bool any =
        plan.cu_blocks[static_cast<size_t>(seq) + 1] > plan.cu_blocks[static_cast<size_t>(seq)];
    if (first == 0 || !any) continue;
    HADAL_CHECK(history.rows.defined(), "compress: sequence ", seq, " continues without a history");
    result[seq].copy_(history.gather(seq, (first - 1) * ratio, first * ratio).narrow(1, 0, d));
  }
  return result;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// x [num_blocks, candidates, d] + bias [candidates, d], whose gradient is a sum over blocks by the
/// tree of their places.
struct AddBias : torch::autograd::Function<AddBias> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& bias,
                            const at::Tensor& places) {
    context->save_for_backward({places});
    context->set_materialize_grads(false);
    context->saved_data["shape"] = bias.sizes();
    return x + bias;
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const at::Tensor& grad = grad_outputs[0];
    if (!grad.defined()) return variable_list(3);
    const at::Tensor sum = weight_gradient(
        grad.reshape({grad.size(0), grad.size(1) * grad.size(2)}),
        at::ones({grad.size(0), 1}, grad.options()), context->get_saved_variables()[0]);
    return {grad, sum.reshape(context->saved_data["shape"].toIntVector()), {}};
  }
};

/// Candidates of every block, [num_blocks, ratio or 2 ratio, d].
at::Tensor candidates(const at::Tensor& x,
                      const RingView& history,
                      const Batch& batch,
                      int64_t ratio,
                      double absent) {
  const at::Tensor blocks = block_rows(x, history, batch, ratio);
  if (ratio != 4) return blocks;
  const int64_t d = x.size(1) / 2;
  const at::Tensor first_halves =
      at::cat({leading_rows(x, history, batch, ratio, d, absent), blocks.narrow(2, 0, d)});
  const at::Tensor previous = gather_distinct_rows(first_halves, batch.blocks(ratio).previous);
  return at::cat({previous, blocks.narrow(2, d, d)}, 1);
}

/// Pooled rows; `ape` is added to the candidates, so that histories are rows of the gate itself.
at::Tensor pool(const at::Tensor& kv,
                const at::Tensor& gate,
                const at::Tensor& ape,
                const RingView& kv_history,
                const RingView& gate_history,
                const Batch& batch,
                int64_t ratio) {
  const at::Tensor values = candidates(kv, kv_history, batch, ratio, 0.0);
  const at::Tensor gates =
      candidates(gate, gate_history, batch, ratio, -std::numeric_limits<double>::infinity());
  const int64_t d = values.size(2);
  const at::Tensor wide = ape.to(gate.scalar_type());
  const at::Tensor bias = ratio == 4 ? at::cat({wide.narrow(1, 0, d), wide.narrow(1, d, d)}) : wide;
  const at::Tensor scores =
      use_cpu_kernel(gates) ? AddBias::apply(gates, bias, batch.block_places(ratio)) : gates + bias;
  return (at::softmax(scores, 1) * values).sum(1);
}

}  // namespace

namespace reference {

Compressed compress(const at::Tensor& kv,
                    const at::Tensor& gate,
                    const at::Tensor& ape,
                    const RingView& kv_history,
                    const RingView& score_history,
                    const Batch& batch,
                    int64_t ratio) {
  const at::Tensor position = batch.pos().remainder(ratio);
  const at::Tensor score = gate + gather_rows(ape.to(gate.scalar_type()), position);
  const at::Tensor values = candidates(kv, kv_history, batch, ratio, 0.0);
  const at::Tensor scores =
      candidates(score, score_history, batch, ratio, -std::numeric_limits<double>::infinity());
  return {.pooled = (at::softmax(scores, 1) * values).sum(1), .score = score};
}

}  // namespace reference

constinit CpuSlot<void(const CompressCpuParams&, int64_t, int64_t)> compress_cpu;

namespace {

/// Row of `pos` of a sequence in the step or its history.
const float* find_row(
    const at::Tensor& x, const RingView& history, const Batch& batch, int64_t seq, int64_t pos) {
  const int64_t width = x.size(1), start = batch.start(seq);
  if (pos >= start) return x.const_data_ptr<float>() + (batch.begin(seq) + pos - start) * width;
  HADAL_CHECK(history.rows.defined(), "compress: sequence ", seq, " starts at ", start,
              " without a history");
  return history.rows.const_data_ptr<float>() + history.table().row(seq, pos) * width;
}

std::vector<at::Tensor> run_cpu(const at::Tensor& kv_in,
                                const at::Tensor& gate,
                                const at::Tensor& ape,
                                const RingView& kv_history,
                                const RingView& score_history,
                                const Batch& batch,
                                int64_t ratio) {
  const at::Tensor kv = kv_in.contiguous();
  const int64_t width = kv.size(1), overlap = ratio == 4 ? 2 : 1, d = width / overlap;
  // One addition an entry: the same bits for any batch.
  at::Tensor score = gate.contiguous().clone();
  const at::Tensor bias = ape.to(at::kFloat).contiguous();
  for (int64_t token = 0; token < batch.num_tokens(); ++token) {
    const int64_t place = batch.host_pos()[static_cast<size_t>(token)] % ratio;
    const float* b = bias.const_data_ptr<float>() + place * width;
    float* s = score.mutable_data_ptr<float>() + token * width;
    for (int64_t i = 0; i < width; ++i) s[i] += b[i];
  }
  const BlockPlan& plan = batch.blocks(ratio);
  const int64_t candidates = overlap * ratio;
  std::vector<const float*> kv_rows, score_rows;
  kv_rows.reserve(static_cast<size_t>(plan.num_blocks() * candidates));
  score_rows.reserve(kv_rows.capacity());
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const size_t s = static_cast<size_t>(seq);
    const int64_t first = plan.first_block[s], count = plan.cu_blocks[s + 1] - plan.cu_blocks[s];
    for (int64_t block = first; block < first + count; ++block) {
      for (int64_t j = 0; j < candidates; ++j) {
        // CSA: the previous block's first half of the columns, then this block's second half.
        const int64_t pos = (block - overlap + 1) * ratio + j;
        const int64_t column = overlap == 2 && j >= ratio ? d : 0;
        const bool absent = pos < 0;
        kv_rows.push_back(absent ? nullptr : find_row(kv, kv_history, batch, seq, pos) + column);
        score_rows.push_back(absent ? nullptr
                                    : find_row(score, score_history, batch, seq, pos) + column);
      }
    }
  }
  at::Tensor pooled = at::empty({plan.num_blocks(), d}, kv.options());
  const CompressCpuParams params{.kv = kv_rows.data(),
                                 .score = score_rows.data(),
                                 .pooled = pooled.mutable_data_ptr<float>(),
                                 .candidates = candidates,
                                 .d = d};
  parallel_for(plan.num_blocks(), 1,
               [&](int64_t begin, int64_t end) { compress_cpu(params, begin, end); });
  return {pooled, score};
}

const float* ring_data(const RingView& ring) {
  return ring.rows.defined() ? ring.rows.const_data_ptr<float>() : nullptr;
}

/// What both kernels read; the tensors must outlive it.
CompressorRowsSm90 rows_of(const at::Tensor& kv,
                           const at::Tensor& gate,
                           const at::Tensor& ape,
                           const RingView& kv_history,
                           const RingView& score_history,
                           const Batch& batch,
                           int64_t ratio) {
  const bool continues = kv_history.rows.defined() && score_history.rows.defined();
  return {.kv = kv.const_data_ptr<float>(),
          .gate = gate.const_data_ptr<float>(),
          .ape = ape.const_data_ptr<float>(),
          .kv_ring = const_cast<float*>(ring_data(kv_history)),  // pooling only reads
          .score_ring = const_cast<float*>(ring_data(score_history)),
          .ring = continues ? kv_history.table()
                            : RingRows{.slots = batch.slots().const_data_ptr<int32_t>(), .size = 1},
          .first_row = batch.device_cu_seqlens().const_data_ptr<int32_t>(),
          .pos = batch.pos().const_data_ptr<int64_t>(),
          .stride = kv.size(1),
          .ratio = ratio,
          .d = kv.size(1) / (ratio == 4 ? 2 : 1)};
}

Compressed compress_on_sm90(const at::Tensor& kv_any,
                            const at::Tensor& gate_any,
                            const at::Tensor& ape_any,
                            const RingView& kv_history,
                            const RingView& score_history,
                            const Batch& batch,
                            int64_t ratio,
                            bool scores) {
  const at::Tensor kv = kernel_input(kv_any), gate = kernel_input(gate_any),
                   ape = fp32_input(ape_any);
  const bool continues = kv_history.rows.defined() && score_history.rows.defined();
  HADAL_CHECK(continues || batch.whole(), "compress: a sequence continues without a history");
  const BlockPlan& plan = batch.blocks(ratio);
  const int64_t d = kv.size(1) / (ratio == 4 ? 2 : 1);
  const at::Tensor pooled = at::empty({plan.num_blocks(), d}, kv.options().dtype(at::kBFloat16));
  run_sm90(kv, compress_sm90, compress_twin,
           {.rows = rows_of(kv, gate, ape, kv_history, score_history, batch, ratio),
            .block_seq = plan.seq.const_data_ptr<int64_t>(),
            .block_pos = plan.pos.const_data_ptr<int64_t>(),
            .pooled = mutable_bf16_data(pooled),
            .blocks = plan.num_blocks()});
  Compressed result{.pooled = pooled, .score = {}};
  if (scores) result.score = gate + ape.index_select(0, batch.pos().remainder(ratio));
  return result;
}

}  // namespace

Compressed compress(const at::Tensor& kv,
                    const at::Tensor& gate,
                    const at::Tensor& ape,
                    const RingView& kv_history,
                    const RingView& score_history,
                    const Batch& batch,
                    int64_t ratio,
                    Numerics numerics,
                    bool scores) {
  HADAL_CHECK(ratio > 0, "compress: ratio ", ratio);
  check_shape(kv, {batch.num_tokens(), -1}, "compress: kv");
  check_shape(gate, {batch.num_tokens(), kv.size(1)}, "compress: gate");
  check_shape(ape, {ratio, kv.size(1)}, "compress: ape");
  const bool learns = at::GradMode::is_enabled() && (gate.requires_grad() || ape.requires_grad());
  if (numerics != Numerics::kIdeal && serves_compress_sm90(ratio) && use_sm90_fp32(kv) && !learns)
    return compress_on_sm90(kv, gate, ape, kv_history, score_history, batch, ratio, scores);
  refuse_as_hopper(kv, "compress");
  if (use_cpu_kernel(kv) && kv.scalar_type() == at::kFloat) {
    const std::vector<at::Tensor> out = with_reference_gradient(
        [&](const auto& in) {
          return run_cpu(in[0], in[1], in[2], kv_history, score_history, batch, ratio);
        },
        [kv_history, score_history, batch, ratio](const auto& in) {
          if (!kv_history.rows.defined()) {
            const at::Tensor place = batch.pos().remainder(ratio);
            return std::vector{pool(in[0], in[1], in[2], {}, {}, batch, ratio),
                               in[1] + gather_rows(in[2].to(in[1].scalar_type()), place)};
          }
          const Compressed r =
              reference::compress(in[0], in[1], in[2], kv_history, score_history, batch, ratio);
          return std::vector{r.pooled, r.score};
        },
        {kv, gate, ape});
    return {.pooled = out[0], .score = out[1]};
  }
  return reference::compress(kv, gate, ape, kv_history, score_history, batch, ratio);
}

at::Tensor compress_part(const at::Tensor& kv,
                         const at::Tensor& gate,
                         const at::Tensor& ape,
                         const RingView& kv_history,
                         const RingView& gate_history,
                         const Batch& batch,
                         int64_t ratio) {
  HADAL_CHECK(use_cpu_kernel(kv) && kv.scalar_type() == at::kFloat,
              "compress_part: FP32 on the CPU alone");
  HADAL_CHECK(ratio > 0 && gate_history.ring % ratio == 0, "compress_part: ratio ", ratio,
              " and rings of ", gate_history.ring);
  check_shape(kv, {batch.num_tokens(), -1}, "compress_part: kv");
  check_shape(gate, {batch.num_tokens(), kv.size(1)}, "compress_part: gate");
  check_shape(ape, {ratio, kv.size(1)}, "compress_part: ape");
  const auto with_rows = [](RingView ring, const at::Tensor& rows) {
    ring.rows = rows;
    return ring;
  };
  return with_reference_gradient(
      [&](const auto& in) {
        const at::Tensor score =
            in[4] + in[2].to(at::kFloat).repeat({in[4].size(0) / ratio, int64_t{1}});
        return std::vector{run_cpu(in[0], in[1], in[2], with_rows(kv_history, in[3].contiguous()),
                                   with_rows(gate_history, score), batch, ratio)[0]};
      },
      [with_rows, kv_history, gate_history, batch, ratio](const auto& in) {
        return std::vector{pool(in[0], in[1], in[2], with_rows(kv_history, in[3]),
                                with_rows(gate_history, in[4]), batch, ratio)};
      },
      {kv, gate, ape, kv_history.rows, gate_history.rows})[0];
}

bool serves_keep_rows_sm90(const at::Tensor& kv,
                           const RingView& kv_history,
                           const RingView& score_history,
                           Numerics numerics) {
  const auto is_ring = [&](const RingView& ring) {
    return ring.rows.defined() && ring.rows.scalar_type() == at::kFloat &&
           ring.rows.is_contiguous() && ring.rows.size(1) == kv.size(1);
  };
  return numerics != Numerics::kIdeal && kv.size(1) % 4 == 0 && is_ring(kv_history) &&
         is_ring(score_history) && kv_history.ring == score_history.ring && use_sm90_fp32(kv);
}

void keep_rows_on_sm90(const at::Tensor& kv_any,
                       const at::Tensor& gate_any,
                       const at::Tensor& ape_any,
                       const RingView& kv_history,
                       const RingView& score_history,
                       const Batch& batch,
                       int64_t ratio,
                       const RingWrites& writes) {
  const at::Tensor kv = kernel_input(kv_any), gate = kernel_input(gate_any),
                   ape = fp32_input(ape_any);
  run_sm90(kv, keep_rows_sm90, keep_rows_twin,
           {.rows = rows_of(kv, gate, ape, kv_history, score_history, batch, ratio),
            .from = writes.from.const_data_ptr<int64_t>(),
            .to = writes.to.const_data_ptr<int64_t>(),
            .count = writes.to.numel()});
}

}  // namespace hadal::ops
