#include "engine/model_runner.h"

#include <algorithm>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "base/check.h"

namespace hadal::engine {

ModelRunner::ModelRunner(const model::Transformer& model, KvCache& cache)
    : model_(model),
      cache_(cache),
      numerics_(cache.options().numerics),
      drafts_(cache.options().with_mtp),
      kept_streams_(cache.options().slack + 2) {
  seen_.resize(static_cast<size_t>(cache.num_slots()));
  cache.set_rerun([this](const SequenceStep& step) { run({&step, 1}); });
  if (!drafts_) return;
  const model::ModelConfig& config = model.config();
  const at::ScalarType type = numerics_ == ops::Numerics::kIdeal ? at::kFloat : at::kBFloat16;
  streams_ = at::zeros({cache.num_slots() * kept_streams_, config.hc_mult, config.dim},
                       at::TensorOptions(cache.options().device).dtype(type));
  followed_.resize(static_cast<size_t>(cache.num_slots()));
}

at::Tensor ModelRunner::on_device(const std::vector<int64_t>& numbers) const {
  return at::tensor(numbers, at::kLong).to(cache_.options().device);
}

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
  auto selections = std::make_shared<std::map<int64_t, at::Tensor>>();
  context.on_choice = [&](int64_t block, const at::Tensor& selection) {
    (*selections)[block] = selection;
  };
  const at::Tensor streams = model_.forward(on_device(ids), context);
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].num_logits == 0) continue;
    const int64_t row = batch.end(static_cast<int64_t>(i)) - 1;
    seen_[static_cast<size_t>(steps[i].slot)] = {
        .tokens = steps[i].start + static_cast<int64_t>(steps[i].tokens.size()),
        .row = row,
        .selections = selections};
  }
  if (drafts_) follow(steps, streams);
  logits_ = at::Tensor();
  if (asked.empty()) return;
  const at::Tensor rows =
      asked.size() == ids.size() ? streams : streams.index_select(0, on_device(asked));
  logits_ = model_.logits(model_.head_input(rows, numerics_), numerics_).cpu().contiguous();
}

std::span<const float> ModelRunner::logits(int64_t sequence, int64_t token) const {
  const int64_t row = first_logits_.at(static_cast<size_t>(sequence)) + token;
  HADAL_CHECK(token >= 0 && row < first_logits_.at(static_cast<size_t>(sequence) + 1),
              "model_runner: no logits ", token, " of sequence ", sequence);
  return {logits_.const_data_ptr<float>() + row * vocab_size(), static_cast<size_t>(vocab_size())};
}

std::shared_ptr<const ContextView> ModelRunner::context_view(int64_t slot) const {
  const Seen& seen = seen_.at(static_cast<size_t>(slot));
  if (seen.tokens == 0) return nullptr;
  const model::ModelConfig& config = model_.config();
  auto view = std::make_shared<ContextView>();
  view->tokens = seen.tokens;
  view->window = config.window_size;
  view->index_topk = config.index_topk;
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    const int64_t ratio = config.ratio(layer);
    ContextView::Layer entry{.layer = layer,
                             .ratio = ratio,
                             .selects = config.kind(layer) == model::LayerKind::kCsa,
                             .blocks = ratio > 0 ? seen.tokens / ratio : 0,
                             .selected = {}};
    if (entry.selects) {
      const auto found = seen.selections->find(layer);
      if (found == seen.selections->end()) {
        for (int64_t block = 0; block < entry.blocks; ++block) entry.selected.push_back(block);
      } else {
        const at::Tensor row = found->second[seen.row].cpu().contiguous();
        for (int64_t i = 0; i < row.size(0); ++i) {
          const int32_t block = row.const_data_ptr<int32_t>()[i];
          if (block >= 0) entry.selected.push_back(block);
        }
      }
    }
    view->layers.push_back(std::move(entry));
  }
  return view;
}

void ModelRunner::rewind(int64_t slot, int64_t pos) {
  if (!drafts_) return;
  Followed& done = followed_.at(static_cast<size_t>(slot));
  done.end = std::min(done.end, pos);
  // The position before `pos` saw a token that is no longer there.
  done.next = std::min(done.next, std::max<int64_t>(0, pos - 1));
}

bool ModelRunner::can_draft(int64_t slot, int64_t pos) const {
  if (!drafts_) return false;
  const Followed& done = followed_.at(static_cast<size_t>(slot));
  return done.end == pos && done.first < pos;
}

int64_t ModelRunner::stream_row(int64_t slot, int64_t pos) const {
  return slot * kept_streams_ + pos % kept_streams_;
}

void ModelRunner::follow(std::span<const SequenceStep> steps, const at::Tensor& streams) {
  std::vector<SequenceStep> parts;
  std::vector<at::Tensor> rows;
  int64_t row = 0;
  for (const SequenceStep& step : steps) {
    const auto count = static_cast<int64_t>(step.tokens.size()), begin = step.start,
               end = begin + count;
    Followed& done = followed_[static_cast<size_t>(step.slot)];
    if (begin == 0) done = {};
    // Position p needs the token at p + 1. The one before this step has its streams kept, unless
    // the sequence came from elsewhere; those a later query cannot see are left out.
    const bool before = begin > 0 && done.end == begin && done.first < begin && done.next < begin;
    const int64_t from =
        std::max(before ? begin - 1 : begin, end - 1 - model_.config().window_size);
    if (from < end - 1) {
      if (from < begin) {
        rows.push_back(streams_.narrow(0, stream_row(step.slot, from), 1));
        if (count > 1) rows.push_back(streams.narrow(0, row, count - 1));
      } else {
        rows.push_back(streams.narrow(0, row + from - begin, end - 1 - from));
      }
      parts.push_back({.slot = step.slot,
                       .start = from,
                       .tokens = step.tokens.subspan(static_cast<size_t>(from + 1 - begin)),
                       .pages = step.pages,
                       .num_logits = 0});
    }
    done.next = end - 1;
    const int64_t kept = std::min(count, kept_streams_);
    done.first = count >= kept_streams_ || done.end != begin
                     ? end - kept
                     : std::max(done.first, end - kept_streams_);
    done.end = end;
    for (int64_t p = end - kept; p < end; ++p)
      streams_[stream_row(step.slot, p)].copy_(streams[row + p - begin]);
    row += count;
  }
  if (parts.empty()) return;
  static_cast<void>(run_mtp(parts, at::cat(rows)));
}

at::Tensor ModelRunner::run_mtp(std::span<const SequenceStep> parts, const at::Tensor& streams) {
  std::vector<int64_t> ids;
  for (const SequenceStep& part : parts)
    ids.insert(ids.end(), part.tokens.begin(), part.tokens.end());
  const ops::Batch batch = cache_.begin(parts);
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics_;
  context.kv = &cache_;
  return model_.mtp_head_input(streams, on_device(ids), context);
}

at::Tensor ModelRunner::draft(std::span<const DraftStep> steps) {
  HADAL_CHECK(drafts_, "model_runner: no room for the MTP block");
  const c10::InferenceMode inference;
  std::vector<SequenceStep> parts;
  std::vector<int64_t> rows;
  for (const DraftStep& step : steps) {
    Followed& done = followed_.at(static_cast<size_t>(step.slot));
    HADAL_CHECK(step.pos >= 1 && done.end == step.pos, "model_runner: a draft of slot ", step.slot,
                " at position ", step.pos, ", its state is at ", done.end);
    rows.push_back(stream_row(step.slot, step.pos - 1));
    parts.push_back({.slot = step.slot,
                     .start = step.pos - 1,
                     .tokens = {&step.token, 1},
                     .pages = step.pages,
                     .num_logits = 0});
    done.next = step.pos;
  }
  const at::Tensor head = run_mtp(parts, streams_.index_select(0, on_device(rows)));
  return model_.logits(head, numerics_).cpu().contiguous();
}

}  // namespace hadal::engine
