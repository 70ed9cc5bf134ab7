#include "ops/indexer/index_scores_backward.h"

#include <algorithm>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/parallel.h"
#include "ops/gemm/trained_product.h"
#include "ops/indexer/visible_blocks.h"
#include "ops/sum_tree.h"

namespace hadal::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Tokens of one query tile and keys of one key tile.
constexpr int64_t kTile = 64;
constexpr int64_t kLanes = 16;

/// sum over i of g[i] max(dot[i], 0), on kLanes running sums.
float weight_term(const float* g, const float* dot, int64_t count) {
  float sums[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float term = dot[i] > 0.0f ? g[i] * dot[i] : 0.0f;
    sums[i % kLanes] += term;
  }
  float sum = 0.0f;
  for (const float lane : sums) sum += lane;
  return sum;
}

class Backward {
 public:
  Backward(const at::Tensor& q,
           const at::Tensor& w,
           const at::Tensor& keys,
           const at::Tensor& grad,
           const std::vector<int64_t>& first_rows,
           const Batch& batch,
           int64_t ratio)
      : batch_(batch),
        first_rows_(first_rows),
        ratio_(ratio),
        heads_(q.size(1)),
        dim_(q.size(2)),
        q_(wide(q)),
        w_(wide(w)),
        keys_(wide(keys)),
        grad_(wide(grad)),
        grad_q_(at::zeros_like(q_)),
        grad_w_(at::zeros_like(w_)),
        grad_keys_(at::zeros_like(keys_)) {}

  variable_list run() {
    std::vector<Tile> queries, keys;
    for (int64_t seq = 0; seq < batch_.num_seqs(); ++seq) {
      const int64_t begin = batch_.begin(seq), end = batch_.end(seq);
      // A tile is the same wherever a pass was cut between chunks.
      for (int64_t token = begin, next = 0; token < end; token = next) {
        next = std::min(end, (token / kTile + 1) * kTile);
        if (seen(seq, next - 1) > 0) queries.push_back({seq, token, next});
      }
      const int64_t blocks = visible_blocks(batch_, seq, ratio_);
      for (int64_t block = 0; block < blocks; block += kTile)
        keys.push_back({seq, block, std::min(blocks, block + kTile)});
    }
    const auto each = [](const std::vector<Tile>& tiles, const auto& body) {
      parallel_for(std::ssize(tiles), 1, [&](int64_t from, int64_t to) {
        const at::NoGradGuard no_grad;
        for (int64_t i = from; i < to; ++i) body(tiles[static_cast<size_t>(i)]);
      });
    };
    each(queries, [&](const Tile& tile) { query_tile(tile); });
    each(keys, [&](const Tile& tile) { key_tile(tile); });
    // A chunk whose queries see nothing of a key is no leaf of its sum or a zero: +0 in any case.
    return {grad_q_, grad_w_, grad_keys_.add_(0.0)};
  }

 private:
  struct Tile {
    int64_t seq, begin, end;  ///< tokens of the pass, or blocks of the sequence
  };

  static at::Tensor wide(const at::Tensor& x) { return x.detach().to(at::kFloat).contiguous(); }

  int64_t seen(int64_t seq, int64_t token) const {
    return (batch_.start(seq) + token + 1 - batch_.begin(seq)) / ratio_;
  }
  at::Tensor queries(int64_t begin, int64_t end) const {
    return q_.narrow(0, begin, end - begin).reshape({(end - begin) * heads_, dim_});
  }
  at::Tensor keys(int64_t seq, int64_t first, int64_t count) const {
    return keys_.narrow(0, first_rows_[static_cast<size_t>(seq)] + first, count);
  }

  /// dots [(end - begin) heads, blocks of [first, ...)] of tokens [begin, end) become their
  /// gradients.
  void differentiate(const Tile& tokens, int64_t first, const at::Tensor& dots, bool weights) {
    const int64_t count = dots.size(1), columns = grad_.size(1);
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      const int64_t limit = std::clamp<int64_t>(seen(tokens.seq, token) - first, 0, count);
      const float* g = grad_.const_data_ptr<float>() + token * columns + first;
      for (int64_t head = 0; head < heads_; ++head) {
        float* dot =
            dots.mutable_data_ptr<float>() + ((token - tokens.begin) * heads_ + head) * count;
        const int64_t at = token * heads_ + head;
        const float factor = w_.const_data_ptr<float>()[at];
        if (weights) grad_w_.mutable_data_ptr<float>()[at] = weight_term(g, dot, limit);
        for (int64_t i = 0; i < limit; ++i) dot[i] = dot[i] > 0.0f ? g[i] * factor : 0.0f;
        std::fill(dot + limit, dot + count, 0.0f);
      }
    }
  }

  void query_tile(const Tile& tile) {
    const at::Tensor rows = keys(tile.seq, 0, seen(tile.seq, tile.end - 1));
    const at::Tensor dots =
        linear(queries(tile.begin, tile.end), pack_panels(rows), GemmRole::kFp32);
    differentiate(tile, 0, dots, /*weights=*/true);
    grad_q_.narrow(0, tile.begin, tile.end - tile.begin)
        .copy_(input_gradient(dots, rows).reshape({tile.end - tile.begin, heads_, dim_}));
  }

  void key_tile(const Tile& tile) {
    const int64_t begin = batch_.begin(tile.seq);
    const Tile tokens{
        tile.seq, std::max(begin, begin - batch_.start(tile.seq) + (tile.begin + 1) * ratio_ - 1),
        batch_.end(tile.seq)};
    const at::Tensor rows = keys(tile.seq, tile.begin, tile.end - tile.begin);
    const at::Tensor q = queries(tokens.begin, tokens.end);
    const at::Tensor dots = linear(q, pack_panels(rows), GemmRole::kFp32);
    differentiate(tokens, tile.begin, dots, /*weights=*/false);
    const at::Tensor places =
        at::arange(tokens.begin, tokens.end, at::kLong).repeat_interleave(heads_);
    grad_keys_.narrow(0, first_rows_[static_cast<size_t>(tile.seq)] + tile.begin, rows.size(0))
        .copy_(weight_gradient(dots, q, places));
  }

  const Batch& batch_;
  const std::vector<int64_t>& first_rows_;
  int64_t ratio_, heads_, dim_;
  at::Tensor q_, w_, keys_, grad_, grad_q_, grad_w_, grad_keys_;
};

struct Held : torch::CustomClassHolder {
  Held(Batch b, std::vector<int64_t> first) : batch(std::move(b)), first_rows(std::move(first)) {}
  Batch batch;
  std::vector<int64_t> first_rows;
};

struct IndexScoresCpu : torch::autograd::Function<IndexScoresCpu> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& q,
                            const at::Tensor& w,
                            const at::Tensor& keys,
                            const TensorFunction& kernel,
                            const c10::intrusive_ptr<Held>& held,
                            int64_t ratio) {
    context->save_for_backward({q, w, keys});
    context->set_materialize_grads(false);
    context->saved_data["held"] = c10::IValue::make_capsule(held);
    context->saved_data["ratio"] = ratio;
    return kernel({q, w, keys})[0];
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    variable_list grads(6);
    if (!grad_outputs[0].defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    const auto held =
        c10::static_intrusive_pointer_cast<Held>(context->saved_data["held"].toCapsule());
    const variable_list computed =
        Backward(saved[0], saved[1], saved[2], grad_outputs[0], held->first_rows, held->batch,
                 context->saved_data["ratio"].toInt())
            .run();
    for (size_t i = 0; i < 3; ++i) grads[i] = computed[i].to(saved[i].scalar_type());
    return grads;
  }
};

}  // namespace

at::Tensor with_score_gradient(const TensorFunction& forward,
                               const std::vector<at::Tensor>& inputs,
                               const BlockView& keys,
                               const Batch& batch,
                               int64_t ratio) {
  bool wanted = false;
  for (const at::Tensor& input : inputs) wanted |= input.requires_grad();
  if (!wanted || !at::GradMode::is_enabled()) return forward(inputs)[0];
  return IndexScoresCpu::apply(inputs[0], inputs[1], inputs[2], forward,
                               c10::make_intrusive<Held>(batch, keys.first_rows()), ratio);
}

}  // namespace hadal::ops
