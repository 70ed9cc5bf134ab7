#include "model/choices.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"
#include "model/aux.h"
#include "ops/indexer/index_topk.h"
#include "ops/op.h"

namespace hadal::model {
namespace {

void check_experts(const at::Tensor& experts,
                   const ModelConfig& config,
                   int64_t block,
                   int64_t tokens) {
  const int64_t topk = config.n_activated_experts;
  ops::check_shape(experts, {tokens, topk}, "forced experts");
  HADAL_CHECK(experts.scalar_type() == at::kLong, "forced experts of block ", block,
              ": expected I64, found ", experts.scalar_type());
  const at::Tensor host = experts.cpu().contiguous();
  const int64_t* row = host.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < tokens; ++token, row += topk) {
    for (int64_t k = 0; k < topk; ++k) {
      HADAL_CHECK(row[k] >= 0 && row[k] < config.n_routed_experts, "forced experts of block ",
                  block, ", token ", token, ": expert ", row[k], " of ", config.n_routed_experts);
      HADAL_CHECK(std::find(row, row + k, row[k]) == row + k, "forced experts of block ", block,
                  ", token ", token, ": expert ", row[k], " twice");
    }
  }
}

void check_selection(const at::Tensor& selection,
                     const ModelConfig& config,
                     int64_t block,
                     const ops::Batch& batch) {
  const int64_t tokens = batch.num_tokens(), topk = config.index_topk;
  ops::check_shape(selection, {tokens, topk}, "forced selection");
  HADAL_CHECK(selection.scalar_type() == at::kInt, "forced selection of block ", block,
              ": expected I32, found ", selection.scalar_type());
  const at::Tensor host = selection.cpu().contiguous();
  const int32_t* row = host.const_data_ptr<int32_t>();
  for (int64_t token = 0; token < tokens; ++token, row += topk) {
    const int64_t visible =
        (batch.host_pos()[static_cast<size_t>(token)] + 1) / config.ratio(block);
    int64_t count = 0;
    while (count < topk && row[count] != -1) ++count;
    for (int64_t k = 0; k < count; ++k) {
      HADAL_CHECK(row[k] >= 0 && row[k] < visible, "forced selection of block ", block, ", token ",
                  token, ": compressed block ", row[k], " of ", visible, " visible ones");
      HADAL_CHECK(k == 0 || row[k - 1] < row[k], "forced selection of block ", block, ", token ",
                  token, ": ", row[k], " behind ", row[k - 1], ", expected ascending");
    }
    HADAL_CHECK(std::all_of(row + count, row + topk, [](int32_t c) { return c == -1; }),
                "forced selection of block ", block, ", token ", token, ": blocks behind a -1");
    // The indexer's loss has no meaning over no blocks.
    HADAL_CHECK(count > 0 || visible == 0, "forced selection of block ", block, ", token ", token,
                ": none of ", visible, " visible blocks");
  }
}

}  // namespace

BlockChoices choices_of(const BlockAux& aux,
                        const ModelConfig& config,
                        int64_t block,
                        const ops::Batch& batch) {
  BlockChoices choices{.experts = aux.moe.routing.experts, .selection = aux.attn.selection};
  HADAL_CHECK(choices.experts.defined(), "choices: block ", block, " reports no experts");
  if (config.kind(block) != LayerKind::kCsa || choices.selection.defined()) return choices;
  // Equal scores, of which the lowest are chosen: all that a token sees, as no token sees more.
  const int64_t ratio = config.ratio(block), columns = batch.max_end_pos() / ratio;
  HADAL_CHECK(columns <= config.index_topk, "choices: block ", block, " reports no selection of ",
              columns, " blocks");
  choices.selection = ops::select_topk(
      at::zeros({batch.num_tokens(), columns}, choices.experts.options().dtype(at::kFloat)), batch,
      ratio, config.index_topk);
  return choices;
}

void check_choices(const BlockChoices& choices,
                   const ModelConfig& config,
                   int64_t block,
                   const ops::Batch& batch,
                   bool sparse) {
  if (choices.experts.defined()) check_experts(choices.experts, config, block, batch.num_tokens());
  if (!choices.selection.defined()) return;
  HADAL_CHECK(config.kind(block) == LayerKind::kCsa, "forced selection: block ", block,
              " is no CSA layer");
  HADAL_CHECK(sparse, "forced selection of block ", block, ": this pass attends to every block");
  check_selection(choices.selection, config, block, batch);
}

}  // namespace hadal::model
