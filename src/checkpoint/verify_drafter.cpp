#include "checkpoint/verify_drafter.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "checkpoint/load_model.h"
#include "checkpoint/safetensors.h"

namespace hadal::checkpoint {
namespace {

using model::RingKind;
using ops::Numerics;

/// Bars of `released`, mean absolute errors. The official code with other sums has 0.0010 in the
/// logits of the drafter, an independent implementation 0.0037.
constexpr double kDraftMean = 0.01;
/// Of the main model's, measured 0.038 to 0.049: every flip of its prompt stays in the caches.
constexpr double kMainMean = 0.06;

at::Tensor numbers(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

/// Drafts of one block, or of several: greedy.
struct Greedy {
  at::Tensor drafts, confidence, logits;  ///< [sequences, block_size], of logits also [vocab]
};

class DrafterVerifier {
 public:
  DrafterVerifier(const OfficialCheckpoint& checkpoint,
                  const TensorReader& expected,
                  const VerifyOptions& options,
                  const std::function<void(const VerifyLine&)>& report,
                  const CacheFactory& make_cache)
      : expected_(expected),
        report_(report),
        make_cache_(make_cache),
        numerics_(options.numerics.value_or(default_numerics(checkpoint))),
        model_(load_model(checkpoint, numerics_)),
        config_(checkpoint.config()),
        block_(config_.drafter.block_size) {
    if (options.max_abs) {
      max_abs_ = *options.max_abs;
    } else if (numerics_ == Numerics::kIdeal) {
      max_abs_ = 2e-5;
    }
  }

  void run() {
    const at::NoGradGuard no_grad;
    const at::Tensor lengths = expected_.tensor("prompt_lengths").to(at::kLong);
    for (int64_t prompt = 0; prompt < lengths.numel(); ++prompt) {
      prefix_ = concat("prompt.", prompt, ".");
      prompt_ = lengths[prompt].item<int64_t>();
      ids_ = expected_.tensor(prefix_ + "input_ids").to(at::kLong);
      answer_ = ids_.size(0) - prompt_;
      HADAL_INPUT_CHECK(prompt_ >= 1 && answer_ >= 1, expected_.path(), ": ", prefix_,
                        "input_ids has ", ids_.size(0), " tokens, the prompt ", prompt_);
      means();
      drafter_alone();
      speculate(main_model());
    }
  }

 private:
  at::Tensor golden(const std::string& key, at::IntArrayRef shape) {
    at::Tensor tensor = expected_.tensor(prefix_ + key);
    HADAL_INPUT_CHECK(tensor.sizes() == shape, expected_.path(), ": ", prefix_, key, " is ",
                      tensor.sizes(), ", expected ", shape);
    return tensor;
  }

  /// |ours - recorded|: max_abs where there is one, else `mean_bar`; `exact`: the same bits in
  /// `released`. Returns the largest error.
  double compare(const std::string& key,
                 const at::Tensor& ours,
                 double mean_bar,
                 bool exact = false) {
    const at::Tensor wanted = golden(key, ours.sizes());
    const at::Tensor difference = (ours.to(at::kDouble) - wanted.to(at::kDouble)).abs();
    VerifyLine line{.key = prefix_ + key, .count = difference.numel(), .agreement = {}, .note = {}};
    line.max = difference.max().item<double>();
    line.mean = difference.mean().item<double>();
    line.pass = std::isfinite(line.max) && line.mean <= mean_bar;
    if (max_abs_) line.pass = line.pass && line.max <= *max_abs_;
    if (exact && numerics_ == Numerics::kReleased) {
      line.pass = line.pass && line.max == 0.0;
      line.note = "the recorded bits";
    }
    report_(line);
    return line.max;
  }

  void compare_numbers(const std::string& key, const at::Tensor& ours) {
    const at::Tensor wanted = expected_.tensor(prefix_ + key).to(at::kLong);
    VerifyLine line{.key = prefix_ + key, .count = ours.numel(), .agreement = {}, .note = {}};
    line.pass = ours.sizes() == wanted.sizes() && at::equal(ours, wanted);
    line.agreement = line.pass ? 1.0 : 0.0;
    report_(line);
  }
  void skip(const std::string& key, const std::string& why) {
    report_({.key = prefix_ + key, .agreement = {}, .note = "skipped: " + why, .skipped = true});
  }

  void means() {
    const auto targets = std::ssize(config_.drafter.target_layers);
    const at::Tensor streams = golden("target_streams", {targets, config_.hc_mult, config_.dim});
    const at::Tensor row = expected_.tensor(prefix_ + "main_hidden")[prompt_ - 1];
    VerifyLine line{
        .key = prefix_ + "target_streams", .count = row.numel(), .agreement = {}, .note = "means"};
    const at::Tensor difference =
        (model::stream_mean(streams).flatten().to(at::kDouble) - row.to(at::kDouble)).abs();
    line.max = difference.max().item<double>();
    line.mean = difference.mean().item<double>();
    line.pass = line.max <= max_abs_.value_or(0.0);
    report_(line);
  }

  /// Blocks behind the last `contexts` rows of each stage before `starts`.
  Greedy draft(const std::vector<int64_t>& anchors,
               const std::vector<int64_t>& starts,
               const std::vector<at::Tensor>& contexts,
               model::DraftedBlocks& drafted,
               model::DraftTrace* trace) {
    drafted =
        model_.draft({.anchors = anchors, .starts = starts, .context = contexts}, numerics_, trace);
    const auto seqs = std::ssize(anchors);
    std::vector<at::Tensor> drafts, confidence, logits;
    at::Tensor previous = numbers(anchors);
    for (int64_t i = 0; i < block_; ++i) {
      const model::DraftScores scores =
          model_.draft_scores(drafted, at::arange(seqs) * block_ + i, previous, numerics_);
      previous = scores.logits.argmax(-1);
      drafts.push_back(previous);
      confidence.push_back(scores.confidence);
      logits.push_back(scores.logits);
    }
    return {.drafts = at::stack(drafts, 1),
            .confidence = at::stack(confidence, 1),
            .logits = at::stack(logits, 1)};
  }

  void drafter_alone() {
    const at::Tensor means = expected_.tensor(prefix_ + "main_hidden");
    const ops::ProductInput input = model::draft_input(model_.drafter(), config_, means, numerics_);
    const ops::RopeTable rope(config_.rope_head_dim, config_.rope_theta, nullptr);
    const at::Tensor cos_sin = rope.cos_sin(at::arange(means.size(0)), means.size(0));
    std::vector<at::Tensor> rows;  // by stage, of all positions
    for (const model::DrafterStage& stage : model_.drafter().stages) {
      const model::Attention& attn = stage.block.attn;
      rows.push_back(model::window_latents(attn, config_, model::apply_linear(attn.wkv, input),
                                           cos_sin, numerics_));
    }
    // Every step of the text at once.
    std::vector<int64_t> anchors, starts;
    std::vector<std::vector<at::Tensor>> parts(rows.size());
    for (int64_t step = 0; step < answer_; ++step) {
      const int64_t start = prompt_ + step, count = std::min(config_.window_size, start);
      anchors.push_back(ids_[start].item<int64_t>());
      starts.push_back(start);
      for (size_t stage = 0; stage < rows.size(); ++stage)
        parts[stage].push_back(rows[stage].narrow(0, start - count, count));
    }
    std::vector<at::Tensor> contexts;
    for (const auto& part : parts) contexts.push_back(at::cat(part));
    model::DraftedBlocks drafted;
    model::DraftTrace trace;
    const Greedy greedy = draft(anchors, starts, contexts, drafted, &trace);
    const double error = records(input.x(), rows, greedy, drafted, trace);
    compare("confidence", greedy.confidence, INFINITY);
    compare_drafts(greedy.drafts, error);
  }

  /// The steps that are recorded in full; returns the largest error of a logit.
  double records(const at::Tensor& main_x,
                 const std::vector<at::Tensor>& rows,
                 const Greedy& greedy,
                 const model::DraftedBlocks& drafted,
                 const model::DraftTrace& trace) {
    const at::Tensor steps = expected_.tensor(prefix_ + "record_steps").to(at::kLong);
    const at::Tensor pos = steps + (prompt_ - 1);
    const auto of_steps = [&](const at::Tensor& x) {
      std::vector<int64_t> shape = {answer_, block_};
      for (int64_t d = 1; d < x.dim(); ++d) shape.push_back(x.size(d));
      return x.reshape(shape).index_select(0, steps);
    };
    compare("record.main_x", main_x.index_select(0, pos).unsqueeze(1), INFINITY, true);
    for (size_t stage = 0; stage < rows.size(); ++stage) {
      const std::string key = concat("record.stage.", stage, ".");
      compare(key + "main_kv", rows[stage].index_select(0, pos), INFINITY, true);
      compare(key + "block_kv", of_steps(trace.block_kv[stage]), INFINITY, stage == 0);
      compare(key + "attn_out", of_steps(trace.attn_out[stage]), INFINITY);
      compare(key + "out", of_steps(trace.out[stage]), INFINITY);
    }
    compare("record.head_hidden", of_steps(drafted.hidden), INFINITY);
    compare("record.base_logits", of_steps(drafted.logits), kDraftMean);
    compare("record.confidence", greedy.confidence.index_select(0, steps), INFINITY);
    // Bigram scores of another draft are those of another token.
    const at::Tensor same =
        golden("record.draft", {steps.numel(), block_}).eq(greedy.drafts.index_select(0, steps));
    if (same.all().item<bool>())
      return compare("record.logits", greedy.logits.index_select(0, steps), kDraftMean);
    skip("record.logits", "of other drafts");
    return max_abs_.value_or(0.0);
  }

  /// Where the recorded choice was wider than the error of both its logits; behind another draft
  /// all of its block may differ.
  void compare_drafts(const at::Tensor& ours, double error) {
    const at::Tensor wanted = golden("draft", ours.sizes()).to(at::kLong);
    const at::Tensor margin = golden("draft_margin", ours.sizes());
    VerifyLine line{.key = prefix_ + "draft", .count = ours.numel(), .agreement = {}, .note = {}};
    line.agreement = ours.eq(wanted).to(at::kDouble).mean().item<double>();
    for (int64_t step = 0; step < ours.size(0); ++step) {
      for (int64_t i = 0; i < block_; ++i) {
        if (ours[step][i].item<int64_t>() == wanted[step][i].item<int64_t>()) continue;
        const double gap = margin[step][i].item<double>();
        line.max = std::max(line.max, gap);
        line.pass = line.pass && gap <= 2 * error;
        break;
      }
    }
    line.note = "max: recorded margin of another draft";
    report_(line);
  }

  struct Pass {
    at::Tensor logits, means;
  };
  /// Tokens into the cache behind what it holds, rows of the drafter's context with them.
  Pass pass(model::ContiguousKv& kv, const at::Tensor& ids) {
    const ops::Batch batch = kv.begin({0}, {ids.size(0)});
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics_;
    context.kv = &kv;
    context.target_means = true;
    const model::ForwardOutput output = model_.forward(ids, context);
    model_.keep_draft_context(output.target_means, context);
    kv.advance();
    return {.logits = model_.logits(model_.head_input(output.streams, numerics_), numerics_),
            .means = output.target_means};
  }
  std::unique_ptr<model::ContiguousKv> cache() const {
    return make_cache_(config_, 1, ids_.size(0) + block_,
                       numerics_ == Numerics::kIdeal ? at::kFloat : at::kBFloat16, at::kCPU);
  }

  /// The prompt at once, its answer token by token; returns the largest error of a logit.
  double main_model() {
    const std::unique_ptr<model::ContiguousKv> kv = cache();
    std::vector<at::Tensor> means, logits;
    const int64_t end = ids_.size(0) - 1;
    for (int64_t pos = 0; pos < end;) {
      const int64_t count = pos == 0 ? prompt_ : 1;
      const Pass step = pass(*kv, ids_.narrow(0, pos, count));
      means.push_back(step.means);
      logits.push_back(step.logits[-1]);
      pos += count;
    }
    const bool ideal = numerics_ == Numerics::kIdeal;
    compare("main_hidden", at::cat(means), INFINITY);
    const at::Tensor all = at::stack(logits);
    return compare("main_logits", all.slice(0, 0, all.size(0), 8), ideal ? INFINITY : kMainMean);
  }

  struct Text {
    std::vector<int64_t> tokens, rounds;
  };
  /// Greedy, with drafts, until `answer_` tokens or `end`.
  Text write(int64_t end) {
    const std::unique_ptr<model::ContiguousKv> kv = cache();
    Text text;
    at::Tensor choices = pass(*kv, ids_.narrow(0, 0, prompt_)).logits.argmax(-1);
    const auto take = [&](int64_t token) {
      text.tokens.push_back(token);
      return token == end || std::ssize(text.tokens) == answer_;
    };
    if (take(choices[-1].item<int64_t>())) return text;
    for (;;) {
      const int64_t start = kv->length(0), count = std::min(config_.window_size, start);
      std::vector<at::Tensor> contexts;
      for (int64_t stage = 0; stage < config_.drafter.n_stages; ++stage)
        contexts.push_back(
            kv->ring(config_.n_layers + stage, RingKind::kWindow).gather(0, start - count, start));
      model::DraftedBlocks drafted;
      const Greedy greedy = draft({text.tokens.back()}, {start}, contexts, drafted, nullptr);
      const int64_t most = std::min(block_, answer_ - std::ssize(text.tokens) - 1);
      std::vector<int64_t> step = {text.tokens.back()};
      for (int64_t i = 0; i < most; ++i) step.push_back(greedy.drafts[0][i].item<int64_t>());
      choices = pass(*kv, numbers(step)).logits.argmax(-1);
      int64_t accepted = 0;
      bool ends = false;
      for (;; ++accepted) {
        const int64_t token = choices[accepted].item<int64_t>();
        ends = take(token);
        if (ends || accepted == most || token != step[static_cast<size_t>(accepted) + 1]) break;
      }
      text.rounds.insert(text.rounds.end(), {start - 1, accepted});
      if (ends) return text;
      kv->rollback(0, start + 1 + accepted);
    }
  }

  /// A token may be another where the recorded choice was not wider than the error of both its
  /// logits; the text behind it is another then.
  void speculate(double error) {
    const Text text = write(-1);
    const at::Tensor wanted = golden("spec_text", {answer_}).to(at::kLong);
    const at::Tensor margin = golden("main_margin", {answer_});
    int64_t same = 0;
    while (same < answer_ && text.tokens[static_cast<size_t>(same)] == wanted[same].item<int64_t>())
      ++same;
    VerifyLine line{.key = prefix_ + "spec_text", .count = answer_, .agreement = {}, .note = {}};
    line.agreement = static_cast<double>(same) / static_cast<double>(answer_);
    if (same < answer_) {
      line.max = margin[same].item<double>();
      line.pass = line.max <= 2 * error;
      line.note = "max: recorded margin of another token";
    }
    report_(line);
    if (same < answer_) {
      skip("spec_rounds", "of another text");
      return skip("eos", "of another text");
    }
    compare_numbers("spec_rounds", numbers(text.rounds).reshape({-1, 2}));
    const at::Tensor eos = golden("eos", {2});
    const std::vector<int64_t> ended = write(eos[0].item<int64_t>()).tokens;
    compare_numbers("eos", numbers({ended.back(), std::ssize(ended)}));
  }

  const TensorReader& expected_;
  const std::function<void(const VerifyLine&)>& report_;
  const CacheFactory& make_cache_;
  Numerics numerics_;
  model::Transformer model_;
  model::ModelConfig config_;
  int64_t block_;
  std::optional<double> max_abs_;
  std::string prefix_;
  at::Tensor ids_;
  int64_t prompt_ = 0, answer_ = 0;
};

}  // namespace

bool records_drafter(const OfficialCheckpoint& checkpoint, const TensorReader& expected) {
  return checkpoint.config().drafter.exists() && expected.has("prompt_lengths");
}

void verify_drafter(const OfficialCheckpoint& checkpoint,
                    const TensorReader& expected,
                    const VerifyOptions& options,
                    const std::function<void(const VerifyLine&)>& report,
                    const CacheFactory& make_cache) {
  DrafterVerifier(checkpoint, expected, options, report, make_cache).run();
}

}  // namespace hadal::checkpoint
