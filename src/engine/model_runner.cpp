#include "engine/model_runner.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "base/check.h"

namespace hadal::engine {

ModelRunner::ModelRunner(const model::Transformer& model,
                         ops::Numerics numerics,
                         KvCache& cache,
                         int64_t slack)
    : model_(model), numerics_(numerics), cache_(cache), slack_(slack) {}

void ModelRunner::run(std::span<const SequenceStep> steps) {
  HADAL_CHECK(!steps.empty(), "model_runner: a step without sequences");
  const c10::InferenceMode inference;  // no gradients, and no way through autograd's dispatch
  const ops::Batch batch = cache_.begin(steps);
  std::vector<int64_t> ids, asked;
  first_logits_.assign(1, 0);
  for (const SequenceStep& step : steps) {
    ids.insert(ids.end(), step.tokens.begin(), step.tokens.end());
    const auto end = static_cast<int64_t>(ids.size());
    HADAL_CHECK(step.num_logits >= 0 && step.num_logits <= static_cast<int64_t>(step.tokens.size()),
                "model_runner: ", step.num_logits, " logits of ", step.tokens.size(), " tokens");
    for (int64_t row = end - step.num_logits; row < end; ++row) asked.push_back(row);
    first_logits_.push_back(static_cast<int64_t>(asked.size()));
  }
  for (const int64_t id : ids) {
    HADAL_CHECK(id >= 0 && id < vocab_size(), "model_runner: token ", id, " of ", vocab_size());
  }
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics_;
  context.kv = &cache_;
  const at::Tensor streams = model_.forward(at::tensor(ids, at::kLong), context);
  logits_ = at::Tensor();
  if (asked.empty()) return;
  const at::Tensor rows =
      asked.size() == ids.size() ? streams : streams.index_select(0, at::tensor(asked, at::kLong));
  logits_ = model_.logits(model_.head_input(rows, numerics_), numerics_).contiguous();
}

std::span<const float> ModelRunner::logits(int64_t sequence, int64_t token) const {
  const int64_t row = first_logits_.at(static_cast<size_t>(sequence)) + token;
  HADAL_CHECK(token >= 0 && row < first_logits_.at(static_cast<size_t>(sequence) + 1),
              "model_runner: no logits ", token, " of sequence ", sequence);
  return {logits_.const_data_ptr<float>() + row * vocab_size(), static_cast<size_t>(vocab_size())};
}

void ModelRunner::rewind(int64_t /*slot*/, int64_t /*pos*/) {}

}  // namespace hadal::engine
