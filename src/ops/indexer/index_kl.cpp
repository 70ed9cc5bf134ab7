#include "ops/indexer/index_kl.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/gemm/linear.h"
#include "ops/op.h"
#include "ops/sum_tree.h"

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

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Everything but the scores.
struct KlInputs {
  const at::Tensor& selection;
  const at::Tensor& q;
  const BlockView& blocks;
  const at::Tensor& lse;
  const Batch& batch;
  int64_t ratio;
  double scale;
};

/// Queries of one sequence that are computed together: as many wherever a pass was cut between
/// chunks, so that they have the same bits.
struct KlTile {
  int64_t seq, begin, end, visible;
};
constexpr int64_t kKlTile = 64;

/// Tiles of the queries that see a block.
std::vector<KlTile> kl_tiles(const Batch& batch, int64_t ratio) {
  std::vector<KlTile> tiles;
  for (int64_t seq = 0; seq < batch.num_seqs(); ++seq) {
    const int64_t begin = batch.begin(seq), end = batch.end(seq), start = batch.start(seq);
    for (int64_t token = begin, next = 0; token < end; token = next) {
      next = std::min(end, (token / kKlTile + 1) * kKlTile);
      const int64_t first = std::max(token, begin + ratio - 1 - start);
      if (first < next) tiles.push_back({seq, first, next, (start + next - begin) / ratio});
    }
  }
  return tiles;
}

/// block_mass() of a tile by the matrix kernel, whose rows do not know each other.
at::Tensor tile_mass(const KlTile& tile, const KlInputs& in) {
  const int64_t count = tile.end - tile.begin, heads = in.q.size(1);
  const at::Tensor keys = in.blocks.gather(tile.seq, 0, tile.visible).to(at::kFloat).contiguous();
  const at::Tensor rows = in.q.narrow(0, tile.begin, count).to(at::kFloat).flatten(0, 1);
  at::Tensor p = linear(rows.contiguous(), pack_panels(keys), GemmRole::kFp32)
                     .reshape({count, heads, tile.visible});
  p.mul_(in.scale).sub_(in.lse.narrow(0, tile.begin, count).to(at::kFloat).unsqueeze(2)).exp_();
  at::Tensor mass = p.select(1, 0).clone();
  for (int64_t head = 1; head < heads; ++head) mass.add_(p.select(1, head));
  const at::Tensor limit =
      (in.batch.pos().narrow(0, tile.begin, count) + 1).div(in.ratio, "floor").unsqueeze(1);
  return mass.masked_fill_(at::arange(tile.visible, limit.options()).unsqueeze(0) >= limit, 0.0);
}

/// The divergences of a tile's queries into kl [tokens]; their gradients at the scores into grad
/// [tokens, columns].
void kl_of_tile(const KlTile& tile,
                const KlInputs& in,
                const at::Tensor& scores,
                const at::Tensor& kl,
                const at::Tensor& grad) {
  const int64_t count = tile.end - tile.begin;
  const auto rows = [&](const at::Tensor& x) { return x.narrow(0, tile.begin, count); };
  at::Tensor mass = tile_mass(tile, in);
  at::Tensor logits = rows(scores).narrow(1, 0, tile.visible);
  if (in.selection.defined()) {
    const at::Tensor mask = selected_mask(rows(in.selection), tile.visible);
    mass = mass * mask;
    logits = logits.masked_fill(mask.logical_not(), -std::numeric_limits<double>::infinity());
  }
  const at::Tensor target = mass / mass.sum(1, /*keepdim=*/true).clamp_min(1e-30);
  const at::Tensor log_p = at::log_softmax(logits, 1);
  // Where the target is 0 the term is 0, also where log_p is -inf.
  const at::Tensor safe_log_p = log_p.masked_fill(target == 0, 0.0);
  rows(kl).copy_((at::xlogy(target, target) - target * safe_log_p).sum(1));
  rows(grad)
      .narrow(1, 0, tile.visible)
      .copy_(at::exp(log_p) * target.sum(1, /*keepdim=*/true) - target);
}

/// The sum of the divergences by the tree of their queries' places.
struct IndexKlCpu : torch::autograd::Function<IndexKlCpu> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& scores,
                            const KlInputs* in) {
    const at::Tensor kl = at::zeros({scores.size(0)}, scores.options()),
                     grad = at::zeros_like(scores);
    const std::vector<KlTile> tiles = kl_tiles(in->batch, in->ratio);
    parallel_for(std::ssize(tiles), 1, [&](int64_t from, int64_t to) {
      const at::NoGradGuard no_grad;
      for (int64_t i = from; i < to; ++i)
        kl_of_tile(tiles[static_cast<size_t>(i)], *in, scores, kl, grad);
    });
    context->save_for_backward({grad});
    context->set_materialize_grads(false);
    return at::full({}, tree_sum(kl.const_data_ptr<float>(), kl.size(0)), scores.options());
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    if (!grad_outputs[0].defined()) return variable_list(2);
    return {context->get_saved_variables()[0] * grad_outputs[0], {}};
  }
};

int64_t queries_with_blocks(const Batch& batch, int64_t ratio) {
  int64_t count = 0;
  for (const KlTile& tile : kl_tiles(batch, ratio)) count += tile.end - tile.begin;
  return count;
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
  if (use_cpu_kernel(scores) && scores.scalar_type() == at::kFloat && use_cpu_kernel(q)) {
    const KlInputs in{selection, q, blocks, lse, batch, ratio, scale};
    return {.sum = IndexKlCpu::apply(scores, &in),
            .num_queries = queries_with_blocks(batch, ratio)};
  }
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
