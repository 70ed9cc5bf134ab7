#include "engine/model_runner.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <utility>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/gemm/linear.h"

namespace hadal::engine {
namespace {

constexpr int64_t kScoredRows = 32;  ///< of logits that exist at once: 17 MB at 129,280 tokens

}  // namespace

ModelRunner::ModelRunner(const model::Transformer& model,
                         KvCache& cache,
                         engine_core::Sampler& sampler)
    : model_(&model),
      cache_(cache),
      sampler_(sampler),
      device_sampler_(cache.options().device.is_cpu() ? nullptr
                                                      : dynamic_cast<DeviceSampler*>(&sampler)),
      numerics_(cache.options().numerics),
      drafts_(cache.options().with_mtp),
      kept_streams_(model.config().window_size + cache.options().slack) {
  seen_.resize(static_cast<size_t>(cache.num_slots()));
  // References ask the device for sizes in the middle of a step.
  if (!on_host() && numerics_ != ops::Numerics::kIdeal)
    recorded_ = std::make_unique<RecordedSteps>(cache.options().device);
  if (!drafts_by_mtp()) return;
  const model::ModelConfig& config = model.config();
  const at::ScalarType type = numerics_ == ops::Numerics::kIdeal ? at::kFloat : at::kBFloat16;
  streams_ = RowMemory(cache.num_slots() * kept_streams_, config.hc_mult * config.dim, {}, type,
                       cache.options().device, cache.options().lazy);
  followed_.resize(static_cast<size_t>(cache.num_slots()));
}

at::Tensor ModelRunner::on_device(const std::vector<int64_t>& numbers) const {
  return at::tensor(numbers, at::kLong).to(cache_.options().device);
}

engine_core::Runner::Ticket ModelRunner::launch(std::span<const engine_core::SequenceStep> steps) {
  HADAL_CHECK(!steps.empty(), "model_runner: a step without sequences");
  HADAL_CHECK(in_flight_.empty(), "model_runner: two steps at once");
  for (const engine_core::SequenceStep& step : steps) {
    const auto count = std::ssize(step.tokens);
    HADAL_CHECK(step.num_logits >= 0 && step.num_logits <= count, "model_runner: ", step.num_logits,
                " rows of ", count, " tokens");
    for (const int64_t id : step.tokens)
      HADAL_CHECK(id >= 0 && id < vocab_size(), "model_runner: token ", id, " of ", vocab_size());
    for (const engine_core::Draw& draw : step.draws)
      HADAL_CHECK(draw.row >= 0 && draw.row < step.num_logits, "model_runner: a draw from row ",
                  draw.row, " of ", step.num_logits);
    const engine_core::ScoredTokens& scored = step.scored;
    HADAL_CHECK(scored.from >= 0 && scored.from + std::ssize(scored.targets) <= count,
                "model_runner: scores of ", scored.targets.size(), " tokens behind row ",
                scored.from, " of ", count);
  }
  logits_ = at::Tensor();
  launched_.reset();
  if (!on_host()) {
    run_step(steps);
    begin_draws(steps);
  }
  in_flight_.assign(steps.begin(), steps.end());
  return ++ticket_;
}

engine_core::StepResult ModelRunner::collect(Ticket ticket) {
  HADAL_CHECK(ticket == ticket_ && !in_flight_.empty(), "model_runner: no step ", ticket);
  const c10::InferenceMode inference;  // no gradients, and no way through autograd's dispatch
  latest_ = std::exchange(in_flight_, {});
  const std::span<const engine_core::SequenceStep> steps = latest_;
  if (on_host()) {
    run_step(steps);
    begin_draws(steps);
  }
  int64_t row = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    score(steps[i].scored, output_.streams.narrow(0, row, std::ssize(steps[i].tokens)),
          result_.sequences[i]);
    row += std::ssize(steps[i].tokens);
  }
  const bool shown = std::ranges::any_of(steps, &engine_core::SequenceStep::shows_logits);
  if (shown && output_.logits.defined()) fetch_logits();
  const auto begin = std::chrono::steady_clock::now();
  finish_draws();
  result_.sampling_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (on_host()) output_ = {.streams = {}, .logits = {}, .selections = output_.selections};
  return std::move(result_);
}

bool ModelRunner::recordable(std::span<const engine_core::SequenceStep> steps) const {
  if (recorded_ == nullptr) return false;
  int64_t tokens = 0;
  for (const engine_core::SequenceStep& step : steps) {
    tokens += std::ssize(step.tokens);
    if (step.num_logits != std::ssize(step.tokens)) return false;
  }
  return tokens <= RecordedSteps::kMostTokens;
}

StepOutput ModelRunner::forward(const ops::Batch& batch, const std::vector<int64_t>* asked) const {
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics_;
  context.kv = &cache_;
  context.request.selection = true;
  context.target_means = block_size() > 0;
  model::ForwardOutput output = model_->forward(batch.ids(), context);
  if (context.target_means) model_->keep_draft_context(output.target_means, context);
  auto selections = std::make_shared<std::map<int64_t, at::Tensor>>();
  for (size_t layer = 0; layer < output.aux.size(); ++layer) {
    const at::Tensor& selection = output.aux[layer].attn.selection;
    if (selection.defined()) (*selections)[static_cast<int64_t>(layer)] = selection;
  }
  StepOutput result{.streams = std::move(output.streams), .logits = {}, .selections = selections};
  if (asked != nullptr && asked->empty()) return result;
  const at::Tensor rows =
      asked == nullptr ? result.streams : result.streams.index_select(0, on_device(*asked));
  result.logits = model_->logits(model_->head_input(rows, numerics_), numerics_);
  return result;
}

void ModelRunner::run_step(std::span<const engine_core::SequenceStep> steps) {
  const c10::InferenceMode inference;
  first_logits_.assign(1, 0);
  std::vector<int64_t> asked, lengths;
  int64_t rows = 0, end = 0;
  for (const engine_core::SequenceStep& step : steps) {
    const auto count = std::ssize(step.tokens);
    rows += count;
    end = std::max(end, step.start + count);
    lengths.push_back(count);
    for (int64_t row = rows - step.num_logits; row < rows; ++row) asked.push_back(row);
    first_logits_.push_back(std::ssize(asked));
  }
  output_ = {};
  const int64_t padded_end = recordable(steps) ? RecordedSteps::padded_end(end) : 0;
  const ops::Batch batch = cache_.begin(steps, padded_end);
  if (padded_end > 0) {
    output_ = recorded_->run(lengths, padded_end, cache_.table_moves(),
                             [&] { return forward(batch, nullptr); });
  } else {
    output_ = forward(batch, std::ssize(asked) == rows ? nullptr : &asked);
  }
  note_seen(steps);
  if (drafts_by_mtp()) keep_streams(steps, batch, output_.streams);
}

void ModelRunner::note_seen(std::span<const engine_core::SequenceStep> steps) {
  // Of a prompt's many rows the last is all that anybody asks for, and each slot keeps its own.
  std::vector<int64_t> last;
  int64_t rows = 0;
  for (const engine_core::SequenceStep& step : steps) {
    rows += std::ssize(step.tokens);
    if (step.num_logits > 0) last.push_back(rows - 1);
  }
  if (last.empty()) return;
  // Narrowing waits for the device: a few rows more are kept instead.
  const bool narrows = rows > RecordedSteps::kMostTokens && std::ssize(last) < rows;
  if (narrows && !output_.selections->empty()) {
    auto narrowed = std::make_shared<std::map<int64_t, at::Tensor>>();
    const at::Tensor numbers = on_device(last);
    for (const auto& [layer, selection] : *output_.selections)
      (*narrowed)[layer] = selection.index_select(0, numbers);
    output_.selections = std::move(narrowed);
  }
  size_t i = 0;
  for (const engine_core::SequenceStep& step : steps) {
    if (step.num_logits == 0) continue;
    seen_[static_cast<size_t>(step.slot)] = {.tokens = step.start + std::ssize(step.tokens),
                                             .row = narrows ? static_cast<int64_t>(i) : last[i],
                                             .selections = output_.selections};
    ++i;
  }
}

void ModelRunner::fetch_logits() {
  if (!logits_.defined()) logits_ = output_.logits.cpu().contiguous();
}

void ModelRunner::begin_draws(std::span<const engine_core::SequenceStep> steps) {
  result_ = {};
  result_.sequences.resize(steps.size());
  masked_draws_.clear();
  host_draws_.clear();
  std::vector<DeviceDraw> draws;
  for (size_t i = 0; i < steps.size(); ++i) {
    std::vector<engine_core::Sampled>& drawn = result_.sequences[i].drawn;
    drawn.resize(steps[i].draws.size());
    for (size_t j = 0; j < drawn.size(); ++j) {
      const engine_core::Draw& draw = steps[i].draws[j];
      const bool there = device_sampler_ != nullptr && device_sampler_->serves(draw, vocab_size());
      std::vector<DeviceDraw>& where = !there              ? host_draws_
                                       : draw.masked_later ? masked_draws_
                                                           : draws;
      where.push_back({.draw = &draw, .row = first_logits_[i] + draw.row, .sampled = &drawn[j]});
    }
  }
  if (!draws.empty()) launched_ = device_sampler_->launch(output_.logits, draws);
}

void ModelRunner::finish_draws() {
  std::unique_ptr<DeviceSampler::Launched> masked;
  if (!masked_draws_.empty()) masked = device_sampler_->launch(output_.logits, masked_draws_);
  if (launched_ != nullptr) std::exchange(launched_, nullptr)->finish();
  if (masked != nullptr) masked->finish();
  if (host_draws_.empty()) return;
  fetch_logits();
  std::vector<engine_core::DrawInput> inputs;
  const auto vocab = static_cast<size_t>(vocab_size());
  for (const DeviceDraw& draw : host_draws_)
    inputs.push_back(
        {.draw = *draw.draw,
         .logits = {logits_.const_data_ptr<float>() + draw.row * vocab_size(), vocab}});
  std::vector<engine_core::Sampled> sampled(inputs.size());
  sampler_.sample(inputs, sampled);
  for (size_t i = 0; i < host_draws_.size(); ++i) *host_draws_[i].sampled = std::move(sampled[i]);
}

void ModelRunner::score(const engine_core::ScoredTokens& scored,
                        const at::Tensor& streams,
                        engine_core::SequenceResult& result) const {
  const int64_t count = std::ssize(scored.targets);
  result.scores.resize(scored.targets.size());
  for (int64_t first = 0; first < count; first += kScoredRows) {
    const int64_t piece = std::min(kScoredRows, count - first);
    const at::Tensor head =
        model_->head_input(streams.narrow(0, scored.from + first, piece), numerics_);
    const at::Tensor logits = model_->logits(head, numerics_).cpu().contiguous();
    const auto vocab = static_cast<size_t>(vocab_size());
    const std::span rows(logits.const_data_ptr<float>(), static_cast<size_t>(logits.numel()));
    parallel_for(piece, 4, [&](int64_t from, int64_t to) {
      for (auto i = static_cast<size_t>(from); i < static_cast<size_t>(to); ++i) {
        const size_t target = static_cast<size_t>(first) + i;
        result.scores[target] =
            sampler_.score(rows.subspan(i * vocab, vocab), scored.targets[target], scored.top);
      }
    });
  }
}

void ModelRunner::set_model(const model::Transformer& model) {
  HADAL_CHECK(in_flight_.empty(), "model_runner: another model while a step runs");
  HADAL_CHECK(model.config() == model_->config(), "model_runner: another configuration");
  model_ = &model;
  if (recorded_ != nullptr) recorded_->clear();
  output_ = {};
  rest();
  seen_.assign(seen_.size(), {});
  followed_.assign(followed_.size(), {});
}

void ModelRunner::rest() {
  logits_ = at::Tensor();
  ops::release_packed_rows();
}

int64_t ModelRunner::rebuild_start(int64_t pos) const {
  return std::max<int64_t>(0, pos - cache_.rebuild_tokens());
}

void ModelRunner::rebuild(int64_t slot,
                          std::span<const int64_t> tokens,
                          std::span<const int64_t> pages,
                          int64_t start,
                          int64_t count) {
  HADAL_CHECK(in_flight_.empty(), "model_runner: a state is rebuilt while a step runs");
  const int64_t pos = std::ssize(tokens);
  HADAL_CHECK(pos % cache_.page_tokens() == 0,
              "model_runner: a state is rebuilt at page borders, not at ", pos);
  struct Given {
    KvCache& cache;
    explicit Given(KvCache& c) : cache(c) { cache.give_pages(true); }
    ~Given() { cache.give_pages(false); }
  } given(cache_);
  engine_core::SequenceStep step{
      .slot = slot,
      .start = start,
      .tokens = tokens.subspan(static_cast<size_t>(start), static_cast<size_t>(count)),
      .pages = pages};
  const c10::InferenceMode inference;
  at::Tensor ids = on_device({step.tokens.begin(), step.tokens.end()});
  at::Tensor streams = model_->embed(ids, numerics_);
  // Drops tokens before what layer `layer` must see; false if none are left.
  const auto narrow = [&](int64_t layer) {
    const int64_t dropped = std::max<int64_t>(0, pos - cache_.rebuild_tokens(layer) - step.start);
    const int64_t left = std::ssize(step.tokens) - dropped;
    if (left <= 0) return false;
    if (dropped == 0) return true;
    step.start += dropped;
    step.tokens = step.tokens.last(static_cast<size_t>(left));
    ids = ids.narrow(0, dropped, left);
    streams = streams.narrow(0, dropped, left);
    return true;
  };
  std::vector<at::Tensor> means;  // of target layers, each of the tokens that it saw
  for (int64_t layer = 0; layer < model_->config().n_layers; ++layer) {
    if (!narrow(layer)) return;
    const ops::Batch batch = cache_.begin({&step, 1});
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics_;
    context.kv = &cache_;
    streams = model_->run_layer(layer, streams, ids, context).streams;
    if (block_size() > 0 && model_->is_target(layer)) means.push_back(model::stream_mean(streams));
  }
  if (!drafts_ || !narrow(model_->config().n_layers)) return;
  const ops::Batch batch = cache_.begin({&step, 1});
  if (drafts_by_mtp()) return keep_streams({&step, 1}, batch, streams);
  for (at::Tensor& mean : means)
    mean = mean.narrow(0, mean.size(0) - batch.num_tokens(), batch.num_tokens());
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics_;
  context.kv = &cache_;
  model_->keep_draft_context(at::cat(means, 1), context);
}

std::span<const float> ModelRunner::row(size_t sequence, int64_t token) const {
  const int64_t row = first_logits_.at(sequence) + token;
  return {logits_.const_data_ptr<float>() + row * vocab_size(), static_cast<size_t>(vocab_size())};
}

std::span<const float> ModelRunner::logits(int64_t sequence, int64_t token) const {
  const engine_core::SequenceStep& step = latest_.at(static_cast<size_t>(sequence));
  HADAL_CHECK(step.shows_logits && logits_.defined() && token >= 0 && token < step.num_logits,
              "model_runner: no logits ", token, " of sequence ", sequence);
  return row(static_cast<size_t>(sequence), token);
}

std::shared_ptr<const engine_core::ContextView> ModelRunner::context_view(int64_t slot) const {
  const Seen& seen = seen_.at(static_cast<size_t>(slot));
  if (seen.tokens == 0) return nullptr;
  const model::ModelConfig& config = model_->config();
  auto view = std::make_shared<engine_core::ContextView>();
  view->tokens = seen.tokens;
  view->window = config.window_size;
  view->index_topk = config.index_topk;
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    const int64_t ratio = config.ratio(layer);
    engine_core::ContextView::Layer entry{.layer = layer,
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
  if (!drafts_by_mtp()) return;
  Followed& done = followed_.at(static_cast<size_t>(slot));
  done.end = std::min(done.end, pos);
  // The position before `pos` saw a token that is no longer there.
  done.next = std::min(done.next, std::max<int64_t>(0, pos - 1));
}

bool ModelRunner::can_draft(int64_t slot, int64_t pos) const {
  if (!drafts_by_mtp()) return drafts_ && pos >= 1;
  const Followed& done = followed_.at(static_cast<size_t>(slot));
  return done.end == pos && done.first < pos;
}

int64_t ModelRunner::stream_row(int64_t slot, int64_t pos) const {
  return slot * kept_streams_ + pos % kept_streams_;
}

void ModelRunner::keep_streams(std::span<const engine_core::SequenceStep> steps,
                               const ops::Batch& batch,
                               const at::Tensor& streams) {
  for (const engine_core::SequenceStep& step : steps) {
    const auto count = static_cast<int64_t>(step.tokens.size()), end = step.start + count;
    Followed& done = followed_[static_cast<size_t>(step.slot)];
    // A new sequence, or one that comes from elsewhere.
    if (step.start == 0 || done.end != step.start)
      done = {.next = step.start, .first = step.start, .end = step.start};
    done.end = end;
    done.first = std::max(done.first, end - kept_streams_);
  }
  const ops::RingWrites& writes = batch.ring_writes(kept_streams_);
  streams_.store(streams.flatten(1), writes.from, writes.to);
}

at::Tensor ModelRunner::draft(std::span<const DraftStep> steps) {
  HADAL_CHECK(drafts_by_mtp(), "model_runner: no room for the MTP block");
  const c10::InferenceMode inference;
  std::vector<engine_core::SequenceStep> parts;
  std::vector<int64_t> rows, ids, last;
  for (const DraftStep& step : steps) {
    const int64_t pos = std::ssize(step.tokens) - 1;
    HADAL_CHECK(can_draft(step.slot, pos), "model_runner: no draft of slot ", step.slot,
                " at position ", pos);
    Followed& done = followed_[static_cast<size_t>(step.slot)];
    // A key depends on its own position alone: the last query's window is all that matters.
    const int64_t from =
        std::max({std::min(done.next, pos - 1), done.first, pos - model_->config().window_size});
    const auto next =
        step.tokens.subspan(static_cast<size_t>(from + 1), static_cast<size_t>(pos - from));
    for (int64_t p = from; p < pos; ++p) rows.push_back(stream_row(step.slot, p));
    ids.insert(ids.end(), next.begin(), next.end());
    last.push_back(std::ssize(ids) - 1);
    parts.push_back(
        {.slot = step.slot, .start = from, .tokens = next, .pages = step.pages, .num_logits = 0});
    done.next = pos;
  }
  const ops::Batch batch = cache_.begin(parts);
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics_;
  context.kv = &cache_;
  const at::Tensor streams = streams_.rows()
                                 .index_select(0, on_device(rows))
                                 .reshape({std::ssize(rows), model_->config().hc_mult, -1});
  at::Tensor head = model_->mtp(streams, on_device(ids), context).head_input;
  if (last.size() < ids.size()) head = head.index_select(0, on_device(last));
  return model_->logits(head, numerics_).cpu().contiguous();
}

model::DraftedBlocks ModelRunner::draft_blocks(std::span<const DraftStep> steps) {
  HADAL_CHECK(block_size() > 0, "model_runner: no room for the drafter's context");
  const c10::InferenceMode inference;
  const model::ModelConfig& config = model_->config();
  model::DraftBlocks blocks;
  std::vector<int64_t> slots, pos;
  for (const DraftStep& step : steps) {
    const int64_t start = std::ssize(step.tokens) - 1;
    blocks.anchors.push_back(step.tokens.back());
    blocks.starts.push_back(start);
    for (int64_t p = std::max<int64_t>(0, start - config.window_size); p < start; ++p) {
      slots.push_back(step.slot);
      pos.push_back(p);
    }
  }
  const at::Tensor of_slots = on_device(slots), at_pos = on_device(pos);
  for (int64_t stage = 0; stage < config.drafter.n_stages; ++stage)
    blocks.context.push_back(cache_.read_window(config.n_layers + stage, of_slots, at_pos));
  return model_->draft(blocks, numerics_);
}

model::DraftScores ModelRunner::draft_scores(const model::DraftedBlocks& blocks,
                                             const std::vector<int64_t>& rows,
                                             const std::vector<int64_t>& previous) const {
  const c10::InferenceMode inference;
  const model::DraftScores scores =
      model_->draft_scores(blocks, on_device(rows), on_device(previous), numerics_);
  return {.logits = scores.logits.cpu().contiguous(),
          .confidence = scores.confidence.cpu().contiguous()};
}

}  // namespace hadal::engine
