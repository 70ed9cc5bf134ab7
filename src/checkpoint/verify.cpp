#include "checkpoint/verify.h"

#include <cmath>
#include <map>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "checkpoint/load_model.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/verify_drafter.h"
#include "model/contiguous_kv.h"
#include "model/init.h"
#include "ops/indexer/index_topk.h"

namespace hadal::checkpoint {
namespace {

using ops::Numerics;

/// Bars of `released` (mean absolute logit error, agreement): rows all hashed, or with learned
/// routing. Measured on 18 random checkpoints with a margin; the official code with another order
/// of its sums meets them, too.
struct ReleasedBars {
  double prefill_mean, mtp_mean, decode_mean, max, prefill_argmax, mtp_argmax, overlap;
};
constexpr ReleasedBars kSmooth{0.029, 0.030, 0.034, 0.26, 0.945, 0.94, 0.0};
/// The same on a Hopper card, whose chains of FP8 products cut off what a CPU's FP32 keeps: means
/// of 0.0342, 0.0340 and 0.0324 were measured, with the bits of the twin.
constexpr ReleasedBars kSmoothOnCard{0.037, 0.037, 0.037, 0.26, 0.945, 0.94, 0.0};
constexpr ReleasedBars kLearned{0.052, 0.052, 0.07, INFINITY, 0.93, 0.93, 0.935};
/// Means hardly see a small rounding mistake, because any flip grows to the same noise. Whole rows
/// do: until the first flip the streams after a window layer 0 are the recorded bits. Correct
/// builds have 26 to 37 of 38, wrong roundings of the query or the probabilities 0 to 10.
constexpr double kIdenticalFirstRows = 20.0 / 38.0;

class Verifier {
 public:
  Verifier(OfficialCheckpoint checkpoint,
           TensorReader expected,
           const VerifyOptions& options,
           const std::function<void(const VerifyLine&)>& report,
           const CacheFactory& make_cache)
      : options_(options),
        report_(report),
        make_cache_(make_cache),
        checkpoint_(std::move(checkpoint)),
        expected_(std::move(expected)),
        numerics_(options.numerics.value_or(default_numerics(checkpoint_))),
        model_(load_model(checkpoint_, numerics_, serving_target(options.device))),
        config_(checkpoint_.config()) {
    const bool all_hashed = config_.n_hash_layers >= config_.n_blocks();
    bars_ = !all_hashed ? kLearned : options.device.is_cpu() ? kSmooth : kSmoothOnCard;
    if (options.max_abs) {
      max_abs_ = *options.max_abs;
    } else if (numerics_ == Numerics::kIdeal) {
      max_abs_ = options.device.is_cpu() ? 2e-5 : 1e-4;
    }
    ids_ = expected_.tensor("input_ids").to(at::kLong);
    HADAL_INPUT_CHECK(ids_.dim() == 2 && ids_.size(0) >= 1, expected_.path(), ": input_ids is ",
                      ids_.sizes(), ", expected [batch, tokens]");
    HADAL_INPUT_CHECK(
        (ids_ >= 0).all().item<bool>() && (ids_ < config_.vocab_size).all().item<bool>(),
        expected_.path(), ": input_ids name tokens outside the vocabulary of ", config_.vocab_size);
    batch_ = ids_.size(0);
    decode_ = expected_.has("decode.logits") ? expected_.info("decode.logits").shape.at(1) : 0;
    prompt_ = ids_.size(1) - decode_;
    HADAL_INPUT_CHECK(prompt_ >= 1, expected_.path(), ": ", ids_.size(1),
                      " tokens leave no prompt before ", decode_, " decoded ones");
    if (expected_.has("positions")) positions_ = expected_.tensor("positions").to(at::kLong);
  }

  void run() {
    const at::NoGradGuard no_grad;
    const std::unique_ptr<model::ContiguousKv> kv =
        make_cache_(config_, batch_, ids_.size(1),
                    numerics_ == Numerics::kIdeal ? at::kFloat : at::kBFloat16, options_.device);
    prefill(*kv);
    if (decode_ > 0) decode(*kv);
    if (config_.n_mtp_layers > 0 && (expected_.has("mtp.logits") || expected_.has("mtp.argmax")))
      mtp();
    for (const std::string& name : expected_.names()) {
      if (name != "input_ids" && name != "positions" && !seen_.contains(name))
        skip(name, "not a key hadal computes");
    }
  }

  void run_gradients() {
    const std::string path = options_.folder + "/grad.safetensors";
    const TensorReader golden = TensorReader::open(path);
    HADAL_INPUT_CHECK(numerics_ == Numerics::kIdeal,
                      "--gradients compares `ideal` numerics; found ",
                      ops::numerics_name(numerics_));
    model::require_gradients(model_);
    const ops::Batch batch(std::vector<int64_t>(static_cast<size_t>(batch_), prompt_),
                           std::vector<int64_t>(static_cast<size_t>(batch_), 0), at::kCPU);
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics_;
    const at::Tensor streams =
        model_.forward(ids_.narrow(1, 0, prompt_).flatten(), context).streams;
    const at::Tensor log_p =
        at::log_softmax(by_row(logits_of(streams), prompt_).narrow(1, 0, prompt_ - 1), -1);
    const at::Tensor loss = -log_p.gather(2, ids_.narrow(1, 1, prompt_ - 1).unsqueeze(-1)).mean();
    loss.backward();
    const double difference =
        std::abs(loss.item<double>() - golden.tensor("loss").to(at::kDouble).item<double>());
    report_({.key = "loss",
             .count = 1,
             .max = difference,
             .mean = difference,
             .agreement = {},
             .note = {},
             .pass = difference <= 1e-5});
    model_.visit([&](model::Parameter& parameter) {
      const size_t star = parameter.name.find('*');
      const at::Tensor& grad = parameter.value.grad();
      if (star == std::string::npos) return compare_gradient(golden, parameter.name, grad);
      for (int64_t expert = 0; expert < parameter.shape[0]; ++expert) {
        std::string name = parameter.name;
        name.replace(star, 1, std::to_string(expert));
        compare_gradient(golden, name, grad.defined() ? grad[expert] : grad);
      }
    });
  }

 private:
  at::Tensor by_row(const at::Tensor& x, int64_t length) const {
    std::vector<int64_t> shape = {batch_, length};
    for (int64_t d = 1; d < x.dim(); ++d) shape.push_back(x.size(d));
    return x.reshape(shape);
  }
  /// On the CPU.
  at::Tensor logits_of(const at::Tensor& streams) const {
    return model_.logits(model_.head_input(streams, numerics_), numerics_).cpu();
  }
  at::Tensor on_device(const at::Tensor& ids) const { return ids.contiguous().to(options_.device); }
  model::ForwardContext context_for(const ops::Batch& batch, model::KvAccess* kv) const {
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics_;
    context.kv = kv;
    return context;
  }
  std::vector<int64_t> all_slots() const {
    std::vector<int64_t> slots(static_cast<size_t>(batch_));
    for (int64_t i = 0; i < batch_; ++i) slots[static_cast<size_t>(i)] = i;
    return slots;
  }

  void skip(const std::string& key, const std::string& why) {
    seen_[key] = true;
    report_({.key = key, .agreement = {}, .note = "skipped: " + why, .skipped = true});
  }

  /// Fetches an expected tensor of the shape that was computed; false when the key is absent.
  bool fetch(const std::string& key, at::IntArrayRef shape, at::Tensor& golden) {
    if (!expected_.has(key)) {
      skip(key, "absent");
      return false;
    }
    seen_[key] = true;
    golden = expected_.tensor(key);
    HADAL_INPUT_CHECK(golden.sizes() == shape, expected_.path(), ": ", key, " is ", golden.sizes(),
                      ", expected ", shape);
    return true;
  }

  /// |ours - golden| with the bars of `released` where they exist, max_abs elsewhere. `rows_bar`:
  /// the share of rows that must be the recorded bits.
  void compare(const std::string& key,
               const at::Tensor& ours,
               double mean_bar,
               double max_bar,
               double rows_bar = 0.0) {
    at::Tensor golden;
    if (!fetch(key, ours.sizes(), golden)) return;
    const at::Tensor difference = (ours.to(at::kDouble) - golden.to(at::kDouble)).abs();
    VerifyLine line{.key = key, .count = difference.numel(), .agreement = {}, .note = {}};
    line.max = difference.max().item<double>();
    line.mean = difference.mean().item<double>();
    const at::Tensor rows = (difference.flatten(2).amax(2) == 0);
    const auto identical = rows.sum().item<int64_t>();
    const auto needed =
        static_cast<int64_t>(std::ceil(rows_bar * static_cast<double>(rows.numel())));
    line.note = concat("identical rows ", identical, "/", rows.numel());
    if (needed > 0) line.note += concat(", at least ", needed);
    if (max_abs_) max_bar = std::min(max_bar, *max_abs_);
    line.pass = std::isfinite(line.max) && line.max <= max_bar && line.mean <= mean_bar &&
                identical >= needed;
    report_(line);
  }

  /// Equal entries; in `ideal` a difference counts only where our own logits separate the two by
  /// more than the bar.
  void compare_argmax(const std::string& key, const at::Tensor& logits, double bar) {
    const at::Tensor ours = logits.argmax(-1);
    at::Tensor golden;
    if (!fetch(key, ours.sizes(), golden)) return;
    const at::Tensor target = golden.to(at::kLong);
    const at::Tensor gap =
        (logits.gather(-1, ours.unsqueeze(-1)) - logits.gather(-1, target.unsqueeze(-1)))
            .squeeze(-1);
    VerifyLine line{.key = key, .count = ours.numel(), .agreement = {}, .note = {}};
    line.agreement = (ours == target).to(at::kDouble).mean().item<double>();
    line.max = gap.max().item<double>();
    line.mean = gap.mean().item<double>();
    line.note = "max and mean: our logit gap";
    line.pass = numerics_ == Numerics::kIdeal ? line.max <= 2.0 * max_abs_.value_or(2e-5)
                                              : *line.agreement >= bar;
    report_(line);
  }

  void prefill(model::ContiguousKv& kv) {
    std::map<int64_t, at::Tensor> outputs, selections, scores;
    const ops::Batch batch =
        kv.begin(all_slots(), std::vector<int64_t>(static_cast<size_t>(batch_), prompt_));
    model::ForwardContext context = context_for(batch, &kv);
    const auto recorded = [&](const at::Tensor& x) {
      const at::Tensor rows = by_row(x.cpu(), prompt_);
      return positions_.defined() ? rows.index_select(1, positions_) : rows;
    };
    context.request = {.selection = true, .index_scores = true};
    const at::Tensor ids = on_device(ids_.narrow(1, 0, prompt_).flatten());
    at::Tensor streams = model_.embed(ids, numerics_);
    for (int64_t block = 0; block < config_.n_layers; ++block) {
      model::BlockOutput output = model_.run_layer(block, std::move(streams), ids, context);
      streams = std::move(output.streams);
      outputs[block] = recorded(streams);
      const model::AttentionAux& attn = output.aux.attn;
      if (!attn.index_scores.defined()) continue;
      // Where every visible block is taken, the model does not ask which.
      selections[block] = recorded(
          attn.selection.defined() ? attn.selection
                                   : ops::select_topk(attn.index_scores, batch,
                                                      config_.ratio(block), config_.index_topk));
      scores[block] = recorded(attn.index_scores);
    }
    kv.advance();
    const bool released = numerics_ != Numerics::kIdeal;
    const at::Tensor logits = by_row(logits_of(streams), prompt_);
    const at::Tensor picked = positions_.defined() ? logits.index_select(1, positions_) : logits;
    compare("prefill.logits", picked, released ? bars_.prefill_mean : INFINITY,
            released ? bars_.max : INFINITY);
    compare_argmax("prefill.argmax", logits, bars_.prefill_argmax);
    compare_logprob(logits);
    for (int64_t block = 0; block < config_.n_layers; ++block) {
      const std::string key = concat("prefill.layers.", block);
      const bool first_window = block == 0 && config_.kind(0) == model::LayerKind::kWindow;
      compare(key + ".out", outputs.at(block), INFINITY, INFINITY,
              numerics_ == Numerics::kReleased && first_window && options_.device.is_cpu()
                  ? kIdenticalFirstRows
                  : 0.0);
      if (config_.kind(block) == model::LayerKind::kCsa) {
        compare_selection(key + ".topk", selections.at(block), scores.at(block));
      }
    }
  }

  void compare_logprob(const at::Tensor& logits) {
    const at::Tensor log_p = at::log_softmax(logits.narrow(1, 0, prompt_ - 1), -1)
                                 .gather(2, ids_.narrow(1, 1, prompt_ - 1).unsqueeze(-1))
                                 .squeeze(-1);
    at::Tensor golden;
    if (!fetch("prefill.logprob", log_p.sizes(), golden)) return;
    const at::Tensor difference = (log_p.to(at::kDouble) - golden.to(at::kDouble)).abs();
    VerifyLine line{
        .key = "prefill.logprob", .count = difference.numel(), .agreement = {}, .note = {}};
    line.max = difference.max().item<double>();
    line.mean = difference.mean().item<double>();
    // A log-probability moves by at most twice the largest logit error.
    line.pass = std::isfinite(line.max) && (!max_abs_ || line.max <= 2.0 * *max_abs_);
    report_(line);
  }

  /// Rows as sets. In `ideal` members may differ only where their scores are closer than 1e-6 to
  /// the other side's.
  void compare_selection(const std::string& key, const at::Tensor& ours, const at::Tensor& scores) {
    if (!expected_.has(key)) return skip(key, "absent");
    seen_[key] = true;
    const at::Tensor golden = expected_.tensor(key).to(at::kLong);
    HADAL_INPUT_CHECK(
        golden.dim() == 3 && golden.size(0) == ours.size(0) && golden.size(1) == ours.size(1),
        expected_.path(), ": ", key, " is ", golden.sizes(), ", expected [", ours.size(0), ", ",
        ours.size(1), ", k]");
    VerifyLine line{.key = key, .agreement = {}, .note = {}};
    int64_t rows = 0, equal_rows = 0;
    double overlap = 0.0;
    for (int64_t b = 0; b < ours.size(0); ++b) {
      for (int64_t s = 0; s < ours.size(1); ++s) {
        const std::vector<int64_t> a = members(ours[b][s]), g = members(golden[b][s]);
        ++line.count;
        const std::vector<int64_t> extra = minus(a, g), missing = minus(g, a);
        if (!g.empty()) {
          ++rows;
          overlap += static_cast<double>(g.size() - missing.size()) / static_cast<double>(g.size());
        }
        if (extra.empty() && missing.empty()) {
          ++equal_rows;
          continue;
        }
        line.max = std::max(line.max, score_gap(scores[b][s], extra, missing));
      }
    }
    const double mean_overlap = rows > 0 ? overlap / static_cast<double>(rows) : 1.0;
    line.agreement = mean_overlap;
    line.note =
        concat("equal rows ", equal_rows, "/", line.count, "; max: score gap of unequal members");
    line.pass = numerics_ == Numerics::kIdeal ? line.max < 1e-6 : mean_overlap >= bars_.overlap;
    report_(line);
  }

  static std::vector<int64_t> members(const at::Tensor& row) {
    const at::Tensor r = std::get<0>(row.to(at::kLong).contiguous().sort());
    std::vector<int64_t> result;
    for (int64_t i = 0; i < r.size(0); ++i) {
      if (r[i].item<int64_t>() >= 0) result.push_back(r[i].item<int64_t>());
    }
    return result;
  }
  static std::vector<int64_t> minus(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
    std::vector<int64_t> result;
    std::set_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(result));
    return result;
  }
  /// Largest distance between the scores of what only we chose and what only the recording did;
  /// infinite when the sizes differ or a block does not exist.
  static double score_gap(const at::Tensor& scores,
                          const std::vector<int64_t>& extra,
                          const std::vector<int64_t>& missing) {
    if (extra.size() != missing.size()) return INFINITY;
    double gap = 0.0;
    for (const int64_t e : extra) {
      for (const int64_t m : missing) {
        if (m >= scores.size(0)) return INFINITY;
        gap = std::max(gap, std::abs(scores[e].item<double>() - scores[m].item<double>()));
      }
    }
    return gap;
  }

  void decode(model::ContiguousKv& kv) {
    std::vector<at::Tensor> rows;
    for (int64_t pos = prompt_; pos < prompt_ + decode_; ++pos) {
      const ops::Batch batch =
          kv.begin(all_slots(), std::vector<int64_t>(static_cast<size_t>(batch_), 1));
      model::ForwardContext context = context_for(batch, &kv);
      rows.push_back(
          logits_of(model_.forward(on_device(ids_.select(1, pos)), context).streams).unsqueeze(1));
      kv.advance();
    }
    const bool released = numerics_ != Numerics::kIdeal;
    compare("decode.logits", at::cat(rows, 1), released ? bars_.decode_mean : INFINITY,
            released ? bars_.max : INFINITY);
  }

  void mtp() {
    const int64_t length = prompt_ - 1;
    const ops::Batch batch(std::vector<int64_t>(static_cast<size_t>(batch_), length),
                           std::vector<int64_t>(static_cast<size_t>(batch_), 0), options_.device);
    model::ForwardContext context = context_for(batch, nullptr);
    const at::Tensor streams =
        model_.forward(on_device(ids_.narrow(1, 0, length).flatten()), context).streams;
    const at::Tensor hidden =
        model_.mtp(streams, on_device(ids_.narrow(1, 1, length).flatten()), context).head_input;
    const at::Tensor logits = by_row(model_.logits(hidden, numerics_).cpu(), length);
    const bool released = numerics_ != Numerics::kIdeal;
    const at::Tensor inside =
        positions_.defined() ? positions_.index({positions_ < length}) : positions_;
    compare("mtp.logits", inside.defined() ? logits.index_select(1, inside) : logits,
            released ? bars_.mtp_mean : INFINITY, released ? bars_.max : INFINITY);
    compare_argmax("mtp.argmax", logits, bars_.mtp_argmax);
  }

  void compare_gradient(const TensorReader& golden,
                        const std::string& name,
                        const at::Tensor& grad) {
    const std::string prefix = "grad." + name;
    if (!golden.has(prefix + ".norm")) {
      if (!grad.defined()) return;
      const double largest = grad.abs().max().item<double>();
      report_({.key = prefix,
               .count = grad.numel(),
               .max = largest,
               .agreement = {},
               .note = "no gradient expected",
               .pass = largest == 0.0});
      return;
    }
    const double norm = golden.tensor(prefix + ".norm").to(at::kDouble).item<double>();
    if (!grad.defined()) {
      report_({.key = prefix,
               .max = norm,
               .agreement = {},
               .note = "no gradient computed",
               .pass = norm < 1e-6});
      return;
    }
    const double ours = grad.to(at::kDouble).norm().item<double>();
    VerifyLine line{.key = prefix, .count = 1, .agreement = {}, .note = {}};
    // Gradients that are mathematically zero appear as noise far below any other: both sides must
    // be that small.
    const bool zero = norm < 1e-7;
    line.max = zero ? ours : std::abs(ours - norm) / norm;
    line.pass = zero ? ours < 1e-6 : line.max <= 1e-4;
    line.note = zero ? "norm, expected 0" : "max: norm, relative; mean: worst entry / RMS";
    if (!zero && golden.has(prefix + ".index")) {
      const at::Tensor index = golden.tensor(prefix + ".index").to(at::kLong).flatten();
      const at::Tensor value = golden.tensor(prefix + ".value").to(at::kDouble).flatten();
      HADAL_INPUT_CHECK(
          (index >= 0).all().item<bool>() && (index < grad.numel()).all().item<bool>(),
          golden.path(), ": ", prefix, ".index leaves the tensor");
      const double rms = norm / std::sqrt(static_cast<double>(grad.numel()));
      const at::Tensor entries = grad.flatten().index_select(0, index).to(at::kDouble);
      line.count += index.size(0);
      line.mean = (entries - value).abs().max().item<double>() / rms;
      line.pass = line.pass && line.mean <= 1e-3;
    }
    report_(line);
  }

  const VerifyOptions& options_;
  const std::function<void(const VerifyLine&)>& report_;
  const CacheFactory& make_cache_;
  OfficialCheckpoint checkpoint_;
  TensorReader expected_;
  Numerics numerics_;
  model::Transformer model_;
  model::ModelConfig config_;
  ReleasedBars bars_{};
  std::optional<double> max_abs_;
  at::Tensor ids_, positions_;
  int64_t batch_ = 0, prompt_ = 0, decode_ = 0;
  std::map<std::string, bool> seen_;
};

}  // namespace

std::unique_ptr<model::ContiguousKv> make_reference_cache(const model::ModelConfig& config,
                                                          int64_t slots,
                                                          int64_t max_tokens,
                                                          at::ScalarType dtype,
                                                          at::Device device) {
  return std::make_unique<model::ContiguousKv>(config, slots, max_tokens, dtype, device);
}

void verify(const VerifyOptions& options,
            const std::function<void(const VerifyLine&)>& report,
            const CacheFactory& make_cache) {
  OfficialCheckpoint checkpoint = OfficialCheckpoint::open(options.folder);
  TensorReader expected = TensorReader::open(
      options.expected.empty() ? options.folder + "/expected.safetensors" : options.expected);
  HADAL_INPUT_CHECK(options.device.is_cpu() || !options.gradients,
                    "--gradients: compared on the CPU, not on ", options.device.str());
  if (records_drafter(checkpoint, expected)) {
    HADAL_INPUT_CHECK(options.device.is_cpu(), expected.path(),
                      ": a drafter's recording is compared on the CPU, not on ",
                      options.device.str());
    HADAL_INPUT_CHECK(!options.gradients, expected.path(),
                      ": --gradients: no gradients of a drafter are recorded");
    return verify_drafter(checkpoint, expected, options, report, make_cache);
  }
  Verifier verifier(std::move(checkpoint), std::move(expected), options, report, make_cache);
  verifier.run();
  if (options.gradients) verifier.run_gradients();
}

}  // namespace hadal::checkpoint
