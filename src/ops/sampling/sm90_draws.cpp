#include "ops/sampling/sm90_draws.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_set>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/math.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

constexpr int64_t kMostVocab = 400'000, kMostAvoided = 512, kMostLogprobs = 32;

int32_t checked(int64_t token, int64_t vocab, const char* what) {
  HADAL_CHECK(token >= 0 && token < vocab, "sample: ", what, " token ", token, " of ", vocab);
  return static_cast<int32_t>(token);
}

/// One change a token: its bias, then the penalties of how often it stands in the text.
void add_changes(const Adjustment& adjustment,
                 int64_t vocab,
                 std::vector<LogitChangeSm90>& changes) {
  if (adjustment.sampling.logit_bias.empty() && !has_penalties(adjustment.sampling)) return;
  std::unordered_map<int32_t, LogitChangeSm90> by_token;
  const auto change = [&](int64_t token, const char* what) -> LogitChangeSm90& {
    const int32_t id = checked(token, vocab, what);
    return by_token.try_emplace(id, LogitChangeSm90{.token = id, .in_answer = -1, .bias = -0.0})
        .first->second;
  };
  for (const auto& [token, bias] : adjustment.sampling.logit_bias)
    change(token, "logit bias of").bias = bias;
  if (has_penalties(adjustment.sampling)) {
    if (adjustment.history != nullptr)
      for (const auto& [token, count] : adjustment.history->counts())
        change(token, "penalised").in_answer = static_cast<int32_t>(count.in_answer);
    for (const int64_t token : adjustment.ahead) {
      int32_t& count = change(token, "penalised").in_answer;
      count = std::max(count, 0) + 1;
    }
  }
  for (const auto& [token, one] : by_token) changes.push_back(one);
}

/// Parts of one buffer, so that all of them travel in one copy.
class Layout {
 public:
  template <typename T>
  int64_t add(size_t count) {
    const int64_t at = align_up(bytes_, int64_t{16});
    bytes_ = at + static_cast<int64_t>(count * sizeof(T));
    return at;
  }
  int64_t bytes() const { return std::max<int64_t>(bytes_, 1); }

 private:
  int64_t bytes_ = 0;
};

at::Tensor pinned(int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions(at::kByte).pinned_memory(true));
}

/// Until all that was launched on x's device is done.
void wait_for(const at::Tensor& x) {
  c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).synchronize();
}

template <typename T>
T* at_offset(const at::Tensor& bytes, int64_t offset) {
  return reinterpret_cast<T*>(bytes.mutable_data_ptr<uint8_t>() + offset);
}

/// The tables on the card.
struct SentTables {
  at::Tensor host, device;
  int64_t rows, changes, masks, avoided;

  SentTables(const DrawTables& tables, at::Device to) {
    Layout layout;
    rows = layout.add<SamplingRowSm90>(tables.rows.size());
    changes = layout.add<LogitChangeSm90>(tables.changes.size());
    masks = layout.add<uint32_t>(tables.masks.size());
    avoided = layout.add<int32_t>(tables.avoided.size());
    host = pinned(layout.bytes());
    const auto put = [&]<typename T>(const std::vector<T>& values, int64_t offset) {
      if (!values.empty())
        std::memcpy(at_offset<T>(host, offset), values.data(), values.size() * sizeof(T));
    };
    put(tables.rows, rows);
    put(tables.changes, changes);
    put(tables.masks, masks);
    put(tables.avoided, avoided);
    device = host.to(to, /*non_blocking=*/true);
  }
};

}  // namespace

bool serves_draw_sm90(const DrawShape& shape) {
  const Sampling& sampling = shape.sampling;
  // The likelihood of a draw behind truncation has no kernel; at temperature 0 it is 0.
  if (shape.sampled_logprob && sampling.temperature > 0.0) return false;
  if (sampling.logit_bias.size() > 1) {
    std::unordered_set<int64_t> biased;
    for (const auto& [token, bias] : sampling.logit_bias)
      if (!biased.insert(token).second) return false;
  }
  return shape.vocab <= kMostVocab && shape.stride % 4 == 0 && shape.num_avoided <= kMostAvoided &&
         shape.top_logprobs <= kMostLogprobs;
}

DrawTables draw_tables(int64_t vocab, std::span<const DeviceDrawRow> rows) {
  DrawTables tables;
  for (const DeviceDrawRow& row : rows)
    tables.mask_words = std::max(tables.mask_words, std::ssize(row.adjustment.mask));
  int32_t num_masks = 0;
  for (const DeviceDrawRow& row : rows) {
    const Adjustment& adjustment = row.adjustment;
    const Sampling& s = adjustment.sampling;
    HADAL_CHECK(s.repetition_penalty > 0.0, "sample: repetition penalty ", s.repetition_penalty,
                ", expected > 0");
    SamplingRowSm90 entry{.temperature = s.temperature,
                          .top_p = s.top_p,
                          .repetition_penalty = s.repetition_penalty,
                          .presence_penalty = s.presence_penalty,
                          .frequency_penalty = s.frequency_penalty,
                          .seed = s.seed,
                          .stream = fnv1a64("sample") ^ static_cast<uint64_t>(row.position),
                          .choice = static_cast<uint32_t>(row.choice),
                          .top_k = static_cast<int32_t>(std::min<int64_t>(s.top_k, vocab)),
                          .changes = static_cast<int32_t>(tables.changes.size()),
                          .avoided = static_cast<int32_t>(tables.avoided.size())};
    if (s.min_p > 0.0) entry.least = std::log(s.min_p);
    add_changes(adjustment, vocab, tables.changes);
    entry.num_changes = static_cast<int32_t>(tables.changes.size()) - entry.changes;
    if (!adjustment.mask.empty()) {
      entry.mask = num_masks++;
      tables.masks.insert(tables.masks.end(), adjustment.mask.begin(), adjustment.mask.end());
      tables.masks.resize(static_cast<size_t>(num_masks * tables.mask_words), 0);
    }
    std::vector<int32_t> avoided;
    for (const int64_t token : adjustment.avoided)
      avoided.push_back(checked(token, vocab, "avoided"));
    std::ranges::sort(avoided);
    const auto doubled = std::ranges::unique(avoided);
    avoided.erase(doubled.begin(), doubled.end());
    entry.num_avoided = static_cast<int32_t>(avoided.size());
    tables.avoided.insert(tables.avoided.end(), avoided.begin(), avoided.end());
    tables.rows.push_back(entry);
  }
  return tables;
}

LaunchedDraws::LaunchedDraws(const at::Tensor& logits_any,
                             int64_t vocab,
                             std::span<const DeviceDrawRow> rows) {
  HADAL_CHECK(
      logits_any.is_cuda() && logits_any.scalar_type() == at::kFloat && logits_any.dim() == 2,
      "sample: logits ", logits_any.scalar_type(), " on ", logits_any.device());
  if (rows.empty()) return;
  // The kernels take one row of logits for each draw.
  bool in_order = std::ssize(rows) == logits_any.size(0);
  std::vector<int64_t> numbers;
  for (const DeviceDrawRow& row : rows) {
    in_order = in_order && row.row == std::ssize(numbers);
    numbers.push_back(row.row);
    top_logprobs_.push_back(row.top_logprobs);
    most_ = std::max(most_, row.top_logprobs);
  }
  logits_ = kernel_input(in_order ? logits_any
                                  : logits_any.index_select(
                                        0, at::tensor(numbers, at::kLong).to(logits_any.device())));
  const DrawTables tables = draw_tables(vocab, rows);
  const SentTables sent(tables, logits_.device());
  sent_ = sent.device;

  const size_t n = rows.size(), top = n * static_cast<size_t>(std::max<int64_t>(most_, 0));
  Layout layout;
  tokens_ = layout.add<int32_t>(n);
  top_tokens_ = layout.add<int32_t>(top);
  logprob_ = layout.add<double>(n);
  top_logprob_ = layout.add<double>(top);
  result_ = at::empty({layout.bytes()}, sent_.options());
  const Stream stream = current_stream(logits_);
  sample_sm90(
      {.logits = logits_.const_data_ptr<float>(),
       .rows = at_offset<SamplingRowSm90>(sent_, sent.rows),
       .changes = at_offset<LogitChangeSm90>(sent_, sent.changes),
       .masks = tables.masks.empty() ? nullptr : at_offset<uint32_t>(sent_, sent.masks),
       .avoided = tables.avoided.empty() ? nullptr : at_offset<int32_t>(sent_, sent.avoided),
       .tokens = at_offset<int32_t>(result_, tokens_),
       .num_rows = static_cast<int64_t>(n),
       .vocab = vocab,
       .stride = logits_.size(1),
       .mask_words = tables.mask_words},
      stream);
  if (most_ >= 0) {
    log_probs_sm90({.logits = logits_.const_data_ptr<float>(),
                    .picked = at_offset<int32_t>(result_, tokens_),
                    .picked_logprob = at_offset<double>(result_, logprob_),
                    .tokens = at_offset<int32_t>(result_, top_tokens_),
                    .logprobs = at_offset<double>(result_, top_logprob_),
                    .log_sum_exp = nullptr,
                    .num_rows = static_cast<int64_t>(n),
                    .vocab = vocab,
                    .stride = logits_.size(1),
                    .count = most_},
                   stream);
  }
  host_ = pinned(layout.bytes());
  host_.copy_(result_, /*non_blocking=*/true);
}

std::vector<Drawn> LaunchedDraws::read() {
  std::vector<Drawn> drawn(top_logprobs_.size());
  if (drawn.empty()) return drawn;
  wait_for(logits_);
  for (size_t i = 0; i < drawn.size(); ++i) {
    drawn[i].token = at_offset<int32_t>(host_, tokens_)[i];
    if (drawn[i].token < 0 || top_logprobs_[i] < 0) continue;
    drawn[i].logprob = at_offset<double>(host_, logprob_)[i];
    for (size_t k = 0; k < static_cast<size_t>(top_logprobs_[i]); ++k) {
      const size_t place = i * static_cast<size_t>(most_) + k;
      const int32_t token = at_offset<int32_t>(host_, top_tokens_)[place];
      if (token < 0) break;
      drawn[i].top.push_back(
          {.token = token, .logprob = at_offset<double>(host_, top_logprob_)[place]});
    }
  }
  return drawn;
}

}  // namespace hadal::ops
