#include "apps/perplexity.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/sampling/sample.h"
#include "text/utf8.h"

namespace hadal::apps {
namespace {

constexpr int64_t kLogitRows = 512;  // rows of logits that exist at once

/// -log p of the targets, in order; `rows` are the positions of the step that predict them.
double sum_nats(const LoadedModel& loaded,
                const at::Tensor& streams,
                const std::vector<int64_t>& rows,
                const std::vector<int64_t>& targets) {
  const auto device = streams.device();
  double sum = 0.0;
  const auto count = static_cast<int64_t>(rows.size());
  for (int64_t begin = 0; begin < count; begin += kLogitRows) {
    const int64_t end = std::min(begin + kLogitRows, count);
    const at::Tensor index =
        at::tensor(std::vector<int64_t>(rows.begin() + begin, rows.begin() + end), at::kLong);
    const at::Tensor input =
        loaded.model.head_input(streams.index_select(0, index.to(device)), loaded.numerics);
    const at::Tensor logits =
        loaded.model.logits(input, loaded.numerics).to(at::kCPU).contiguous();  // [rows, vocab]
    const auto* values = logits.const_data_ptr<float>();
    const int64_t vocab = logits.size(1);
    std::vector<double> log_p(static_cast<size_t>(end - begin));
    parallel_for(end - begin, 8, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        log_p[static_cast<size_t>(row)] =
            ops::LogSoftmax(std::span(values + row * vocab, static_cast<size_t>(vocab)))
                .of(targets[static_cast<size_t>(begin + row)]);
      }
    });
    for (const double value : log_p) sum -= value;
  }
  return sum;
}

/// One forward pass over several windows.
double score_windows(const LoadedModel& loaded,
                     const std::vector<int64_t>& ids,
                     std::span<const Window> windows,
                     at::Device device) {
  std::vector<int64_t> step, lengths, rows, targets;
  for (const Window& window : windows) {
    const auto first = static_cast<int64_t>(step.size());
    // The last token predicts nothing that is scored.
    step.insert(step.end(), ids.begin() + window.begin, ids.begin() + window.end - 1);
    lengths.push_back(window.end - 1 - window.begin);
    for (int64_t token = window.scored; token < window.end; ++token) {
      rows.push_back(first + token - 1 - window.begin);
      targets.push_back(ids[static_cast<size_t>(token)]);
    }
  }
  const at::NoGradGuard no_grad;
  const ops::Batch batch(lengths, std::vector<int64_t>(lengths.size(), 0), device);
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = loaded.numerics;
  const at::Tensor streams =
      loaded.model.forward(at::tensor(step, at::kLong).to(device), context).streams;
  return sum_nats(loaded, streams, rows, targets);
}

}  // namespace

double TextScore::bits_per_byte() const {
  return nats / std::numbers::ln2 / static_cast<double>(bytes);
}

std::vector<Window> windows_of(int64_t num_tokens, int64_t context) {
  HADAL_CHECK(context >= 2, "windows_of: a context of ", context);
  std::vector<Window> windows;
  for (int64_t scored = 1; scored < num_tokens;) {
    const int64_t begin =
        windows.empty() ? 0 : windows.back().begin + std::max<int64_t>(1, context / 2);
    const int64_t end = std::min(begin + context, num_tokens);
    windows.push_back({begin, scored, end});
    scored = end;
  }
  return windows;
}

void check_text(const std::string& text, const std::string& name) {
  HADAL_INPUT_CHECK(!text.empty(), name, ": holds no text");
  const size_t valid = text::valid_utf8_prefix(text);
  HADAL_INPUT_CHECK(valid == text.size(), name, ": is no UTF-8 at byte ", valid);
}

TextScore score_text(const LoadedModel& loaded,
                     const std::string& text,
                     const PerplexityOptions& options,
                     const std::function<void(int64_t bytes)>& progress) {
  std::vector<int64_t> ids = {loaded.config().bos_token_id};
  for (const int32_t id : loaded.tokenizer.encode(text, text::SpecialTokens::kAsText))
    ids.push_back(id);
  const auto num_tokens = static_cast<int64_t>(ids.size());
  TextScore score{.tokens = num_tokens - 1, .bytes = static_cast<int64_t>(text.size())};
  const std::vector<Window> windows = windows_of(num_tokens, options.context);
  const at::Device device(options.cuda ? at::kCUDA : at::kCPU);
  for (size_t begin = 0; begin < windows.size();) {
    size_t end = begin;
    int64_t total = 0;
    do {
      total += windows[end].end - windows[end].begin;
      ++end;
    } while (end < windows.size() &&
             total + windows[end].end - windows[end].begin <= options.step_tokens);
    score.nats +=
        score_windows(loaded, ids, std::span(windows).subspan(begin, end - begin), device);
    if (progress) progress(score.bytes * windows[end - 1].end / num_tokens);
    begin = end;
  }
  return score;
}

}  // namespace hadal::apps
