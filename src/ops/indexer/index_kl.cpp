#include "ops/indexer/index_kl.h"

#include <limits>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

/// Attention mass [length, visible] of one sequence's queries over its blocks, summed over heads; 0
/// where hidden.
at::Tensor block_mass(const at::Tensor& q,
                      const BlockView& blocks,
                      const at::Tensor& lse,
                      const Batch& batch,
                      int64_t seq,
                      int64_t ratio,
                      double scale) {
  const at::NoGradGuard no_grad;
  const at::ScalarType type = compute_type(q);
  const int64_t begin = batch.begin(seq), length = batch.length(seq);
  const int64_t visible = (batch.start(seq) + length) / ratio;
  // BF16 operands have exact FP32 products, so the library need not be given widened copies.
  const bool library = q.is_cuda() && q.scalar_type() == at::kBFloat16 && !reference_forced();
  const at::Tensor keys = blocks.gather(seq, 0, visible).to(library ? at::kBFloat16 : type);
  const at::Tensor limit =
      (batch.pos().narrow(0, begin, length) + 1).div(ratio, "floor").unsqueeze(1);
  const at::Tensor hidden = at::arange(visible, limit.options()).unsqueeze(0) >= limit;
  at::Tensor mass = at::zeros({length, visible}, q.options().dtype(type));
  for (int64_t head = 0; head < q.size(1); ++head) {
    const at::Tensor queries = q.select(1, head).narrow(0, begin, length);
    at::Tensor logits =
        library ? at::mm(queries, keys.t(), at::kFloat) : at::matmul(queries.to(type), keys.t());
    logits.mul_(scale).sub_(lse.select(1, head).narrow(0, begin, length).unsqueeze(1));
    mass.add_(logits.exp_());
  }
  return mass.masked_fill_(hidden, 0.0);
}

/// One where the selection of a token names the block: [length, columns].
at::Tensor selected_mask(const at::Tensor& selection, int64_t columns) {
  // Column `columns` takes the -1 entries and is cut off.
  const at::Tensor chosen = selection.to(at::kLong);
  at::Tensor mask =
      at::zeros({selection.size(0), columns + 1}, selection.options().dtype(at::kBool));
  mask.scatter_(1, at::where(chosen < 0, columns, chosen), true);
  return mask.narrow(1, 0, columns);
}

}  // namespace

IndexKl index_kl(const at::Tensor& scores,
                 const at::Tensor& selection,
                 const at::Tensor& q,
                 const BlockView& blocks,
                 const at::Tensor& lse,
                 const Batch& batch,
                 int64_t ratio,
                 double scale) {
  check_shape(scores, {batch.num_tokens(), -1}, "index_kl: scores");
  check_shape(lse, {batch.num_tokens(), q.size(1)}, "index_kl: lse");
  IndexKl result{.sum = at::zeros({}, scores.options()), .num_queries = 0};
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const int64_t begin = batch.begin(seq), length = batch.length(seq), start = batch.start(seq);
    const int64_t visible = (start + length) / ratio;
    if (visible == 0) continue;
    // Queries before the first complete block see none and are left out.
    const int64_t skipped = std::max<int64_t>(0, ratio - 1 - start), count = length - skipped;
    at::Tensor mass =
        block_mass(q, blocks, lse, batch, seq, ratio, scale).narrow(0, skipped, count);
    at::Tensor logits = scores.narrow(0, begin + skipped, count).narrow(1, 0, visible);
    if (selection.defined()) {
      const at::Tensor mask = selected_mask(selection.narrow(0, begin + skipped, count), visible);
      mass = mass * mask;
      logits = logits.masked_fill(mask.logical_not(), -std::numeric_limits<double>::infinity());
    }
    const at::Tensor target = mass / mass.sum(1, /*keepdim=*/true).clamp_min(1e-30);
    const at::Tensor log_p = at::log_softmax(logits, 1);
    // Where the target is 0 the term is 0, also where log_p is -inf.
    const at::Tensor safe_log_p = log_p.masked_fill(target == 0, 0.0);
    result.sum = result.sum + (at::xlogy(target, target) - target * safe_log_p).sum();
    result.num_queries += count;
  }
  return result;
}

KeptMass selected_mass(const at::Tensor& selection,
                       const at::Tensor& q,
                       const BlockView& blocks,
                       const at::Tensor& lse,
                       const Batch& batch,
                       int64_t ratio,
                       double scale) {
  check_shape(selection, {batch.num_tokens(), -1}, "selected_mass: selection");
  KeptMass result{.sum = at::zeros({}, lse.options()), .best = at::zeros({}, lse.options())};
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const int64_t begin = batch.begin(seq), length = batch.length(seq), start = batch.start(seq);
    const int64_t visible = (start + length) / ratio;
    if (visible == 0) continue;
    const int64_t skipped = std::max<int64_t>(0, ratio - 1 - start), count = length - skipped;
    const at::Tensor mass =
        block_mass(q, blocks, lse, batch, seq, ratio, scale).narrow(0, skipped, count);
    const at::Tensor mask = selected_mask(selection.narrow(0, begin + skipped, count), visible);
    const at::Tensor total = mass.sum(1).clamp_min(1e-30);
    const int64_t most = std::min(selection.size(1), visible);
    result.sum = result.sum + ((mass * mask).sum(1) / total).sum();
    result.best = result.best + (std::get<0>(mass.topk(most, 1)).sum(1) / total).sum();
    result.num_queries += count;
  }
  return result;
}

}  // namespace hadal::ops
