#include "train/recompute_plan.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/parallel.h"
#include "base/thread_time.h"
#include "train/optimizer.h"

namespace hadal::train {
namespace {

using ops::TensorLabel;
using Choice = std::set<TensorLabel>;

constexpr std::pair<RecomputePolicy, const char*> kPolicies[] = {{RecomputePolicy::kNone, "none"},
                                                                 {RecomputePolicy::kNorms, "norms"},
                                                                 {RecomputePolicy::kBlock, "block"},
                                                                 {RecomputePolicy::kAuto, "auto"}};

/// Names of what norms make, with the rounding behind it.
bool is_of_norm(const TensorLabel& label) {
  static const std::set<std::string> names{"norm", "rounded", "heads", "window", "block rows"};
  return names.contains(label.name);
}

std::function<bool(const TensorLabel&)> chosen_by(std::shared_ptr<const Choice> choice) {
  return [choice = std::move(choice)](const TensorLabel& label) { return choice->contains(label); };
}

std::string mib(int64_t bytes) {
  return concat(std::ceil(static_cast<double>(bytes) / 0x1p20), " MiB");
}

/// One pass whose gradients nobody wants.
struct Trial {
  std::shared_ptr<PassTrace> trace = std::make_shared<PassTrace>();
  double seconds = 0.0;

  Trial(const model::Transformer& model,
        const model::LayerRun& layers,
        const MicroBatch& row,
        ObjectiveParams objective,
        bool blocks) {
    objective.recompute = blocks;
    objective.tape = nullptr;
    if (!blocks) {
      objective.tape =
          std::make_shared<ops::TapeOptions>(ops::TapeOptions{.verify = true, .observer = trace});
    }
    StepCounts counts;
    counts.add(row, model.config());
    const auto start = thread_time();
    run(model, layers, row, counts, objective);
    seconds = std::chrono::duration<double>(thread_time() - start).count();
    trace->stop();
    model.visit([](const model::Parameter& parameter) {
      if (parameter.value.defined()) parameter.value.mutable_grad().reset();
    });
  }

 private:
  void run(const model::Transformer& model,
           const model::LayerRun& layers,
           const MicroBatch& row,
           const StepCounts& counts,
           const ObjectiveParams& objective) {
    const model::ModelConfig& config = model.config();
    const at::ScalarType type =
        objective.numerics == ops::Numerics::kIdeal ? at::kFloat : at::kBFloat16;
    // What other stages would send: any numbers of order one, and small gradients.
    const auto made_up = [&](bool wanted, std::vector<int64_t> shape, double scale) {
      if (!wanted) return at::Tensor();
      shape.insert(shape.begin(), row.ids.size(0));
      const int64_t elements =
          std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
      return (at::arange(elements, at::kFloat).mul_(0.7).sin_() * scale).to(type).reshape(shape);
    };
    const std::vector<int64_t> streams = {config.hc_mult, config.dim}, rows = {config.dim};
    const bool mtp = sends_mtp_rows(config, objective), back = objective.language_loss();
    StagePass pass =
        stage_forward(model, layers, row, counts, objective,
                      {.streams = made_up(!layers.first, streams, 1.0), .balance = {}, .index = {}},
                      made_up(layers.last && !layers.first && mtp, rows, 1.0));
    trace->forward_ended();
    stage_backward(pass, made_up(!layers.last && back, streams, 1e-3),
                   made_up(layers.first && !layers.last && mtp && back, rows, 1e-3));
  }
};

/// Bytes of all rows under way, of which one is at its peak.
int64_t bytes_of(const PassMemory::Prediction& pass, const PassPlace& place) {
  return (place.under_way - 1) * pass.kept_bytes + pass.peak_bytes;
}

/// A prediction may be short by some hundredths; a budget is one of bytes that are really held. So
/// the chooser counts this part of a pass more than is predicted.
constexpr int64_t kMargin = 32;

/// Chooses functions by the bytes that a second of running them again frees.
class Chooser {
 public:
  using Taken = std::vector<bool>;  ///< by candidate

  using StepPeak = std::function<int64_t(const PassMemory::Prediction&)>;

  Chooser(const PassMemory& memory, StepPeak step_peak, int64_t budget)
      : memory_(memory), step_peak_(std::move(step_peak)), budget_(budget) {
    order_.resize(memory.candidates().size());
    std::iota(order_.begin(), order_.end(), size_t{0});
    std::ranges::stable_sort(order_, std::greater<>(), [&](size_t i) {
      const PassMemory::Candidate& candidate = memory_.candidates()[i];
      return static_cast<double>(candidate.bytes) / std::max(candidate.seconds, 1e-7);
    });
  }

  /// What fits in the least time that is found; none: `least` is the smallest peak that is.
  std::optional<Taken> choose(int64_t& least) const {
    std::optional<Taken> best;
    Taken smallest;
    least = INT64_MAX;
    for (size_t count = 0; count <= order_.size(); count += stride()) {
      Taken taken = prefix(count);
      const int64_t its = peak(taken);
      if (its <= budget_) {
        best = without_needless(std::move(taken));
        break;
      }
      if (its < least) {
        least = its;
        smallest = std::move(taken);
      }
    }
    if (smallest.empty()) return best;  // nothing has to be taken
    // A chain through all blocks that is taken whole comes back whole: a start that keeps what one
    // block hands to the next, and one that finds out.
    Taken within(order_.size());
    for (size_t i = 0; i < within.size(); ++i) within[i] = !memory_.candidates()[i].crosses;
    for (const Taken& start : std::array{std::move(within), std::move(smallest)}) {
      const Taken shrunken = shrunk(start, budget_);
      const int64_t its = peak(shrunken);
      least = std::min(least, its);
      if (its > budget_) continue;
      Taken fitting = without_needless(shrunken);
      if (!best || seconds(fitting) < seconds(*best)) best = std::move(fitting);
    }
    return best;
  }

  Choice labels_of(const Taken& taken) const {
    Choice labels;
    for (size_t i = 0; i < taken.size(); ++i) {
      const auto& own = memory_.candidates()[i].labels;
      if (taken[i]) labels.insert(own.begin(), own.end());
    }
    return labels;
  }

 private:
  static constexpr size_t kPrefixes = 200;
  static constexpr int kRounds = 6;

  size_t stride() const { return std::max<size_t>(1, order_.size() / kPrefixes); }
  Taken prefix(size_t count) const {
    Taken taken(order_.size(), false);
    for (size_t i = 0; i < count; ++i) taken[order_[i]] = true;
    return taken;
  }
  int64_t peak(const Taken& taken) const { return step_peak_(memory_.predict(taken)); }
  double seconds(const Taken& taken) const { return memory_.predict(taken).seconds; }

  /// Takes one more or one less as long as that lowers the peak, down to `enough`.
  Taken shrunk(Taken taken, int64_t enough) const {
    int64_t now = peak(taken);
    bool moved = true;
    for (int round = 0; round < kRounds && moved && now > enough; ++round) {
      moved = false;
      for (const size_t i : order_) {
        taken[i] = !taken[i];
        const int64_t then = peak(taken);
        if (then < now) {
          now = then;
          moved = true;
        } else {
          taken[i] = !taken[i];
        }
        if (now <= enough) break;
      }
    }
    return taken;
  }

  /// What was taken early may have become needless: the slowest first.
  Taken without_needless(Taken taken) const {
    double now = seconds(taken);
    std::vector<size_t> slowest = order_;
    std::ranges::stable_sort(slowest, std::greater<>(),
                             [&](size_t i) { return memory_.candidates()[i].seconds; });
    for (const size_t i : slowest) {
      if (!taken[i]) continue;
      taken[i] = false;
      const PassMemory::Prediction without = memory_.predict(taken);
      if (step_peak_(without) <= budget_ && without.seconds <= now) {
        now = without.seconds;
      } else {
        taken[i] = true;
      }
    }
    return taken;
  }

  const PassMemory& memory_;
  StepPeak step_peak_;
  int64_t budget_;
  std::vector<size_t> order_;
};

}  // namespace

RecomputePolicy parse_recompute_policy(const std::string& name, const std::string& where) {
  for (const auto& [policy, known] : kPolicies) {
    if (name == known) return policy;
  }
  throw InputError(concat(where, ": expected none, norms, block or auto, found \"", name, "\""));
}

const char* recompute_policy_name(RecomputePolicy policy) {
  for (const auto& [known, name] : kPolicies) {
    if (policy == known) return name;
  }
  return "unset";
}

int64_t StepMemory::peak(int64_t pass) const {
  return std::max(during_pass(pass), during_update());
}

int64_t waiting_sets(int64_t begin, int64_t end) {
  // Before pass i the sums of rows [begin, i) are nodes that have not met: those of the whole tree
  // that lie within.
  int64_t most = 0;
  for (int64_t row = begin; row < end; ++row) {
    int64_t nodes = 0;
    for (int64_t at = begin; at < row; ++nodes) {
      int64_t size = at == 0 ? int64_t{1} << 62 : at & -at;
      while (size > row - at) size /= 2;
      at += size;
    }
    most = std::max(most, nodes);
  }
  return most;
}

int64_t update_bytes(const model::Transformer& model) {
  // Muon: the momentum ahead of every matrix, the matrices of one shape at a time and their
  // directions, and two copies of each that a thread moves. AdamW: three of each.
  struct Group {
    int64_t all = 0, largest = 0;
  };
  std::map<std::pair<int64_t, int64_t>, Group> by_shape;
  const int64_t threads = num_threads();
  int64_t ahead = 0, most = 0;
  model.visit([&](const model::Parameter& parameter) {
    if (!parameter.value.defined() || !parameter.trainable()) return;
    const auto bytes = static_cast<int64_t>(parameter.value.nbytes());
    if (update_rule(parameter) != UpdateRule::kMuon) {
      most = std::max(most, 3 * bytes);
      return;
    }
    ahead += bytes;
    const int64_t units = parameter.local_units(), cols = parameter.value.size(-1);
    const int64_t rows = parameter.value.numel() / (units * cols);
    Group& group = by_shape[{rows, cols}];
    group.all += bytes;
    group.largest = std::max(group.largest, bytes);
  });
  for (const auto& [shape, group] : by_shape)
    most = std::max(most, 2 * group.all + 2 * std::min(group.all, threads * group.largest));
  return ahead + most;
}

void RecomputePlan::apply(ObjectiveParams& params) const {
  params.recompute = blocks;
  params.tape = tape;
}

RecomputePlan plan_recompute(const model::Transformer& model,
                             const PassPlace& place,
                             const MicroBatch& row,
                             const ObjectiveParams& objective,
                             const RecomputeSpec& spec,
                             const StepMemory& memory,
                             const std::string& where) {
  RecomputePlan plan;
  plan.policy = spec.policy;
  plan.blocks = spec.policy == RecomputePolicy::kBlock;
  const Trial trial(model, place.layers, row, objective, plan.blocks);
  const PassMemory pass(*trial.trace);
  const auto nothing = [](const TensorLabel&) { return false; };
  const auto everything = [](const TensorLabel&) { return true; };
  auto predicted = pass.predict(nothing);
  plan.seconds_plain = trial.seconds - pass.predict(everything).seconds;
  plan.candidates = std::ssize(pass.candidates());
  if (!plan.blocks) plan.plain_pass_bytes = bytes_of(predicted, place);
  if (spec.policy == RecomputePolicy::kNorms) {
    predicted = pass.predict(is_of_norm);
    plan.tape = std::make_shared<ops::TapeOptions>(ops::TapeOptions{.drops = is_of_norm});
    plan.chosen = std::ranges::count_if(pass.candidates(), [](const auto& candidate) {
      return std::ranges::any_of(candidate.labels, is_of_norm);
    });
  } else if (spec.policy == RecomputePolicy::kAuto) {
    const Chooser chooser(
        pass,
        [&](const auto& each) {
          const int64_t bytes = bytes_of(each, place);
          return memory.peak(bytes + bytes / kMargin);
        },
        spec.budget_bytes);
    int64_t least = 0;
    const auto taken = chooser.choose(least);
    HADAL_INPUT_CHECK(taken.has_value(), where, ": ", mib(spec.budget_bytes),
                      " do not hold a step: the least that does is ", mib(least), " (", least,
                      " bytes); nothing recomputed takes ", mib(memory.peak(plan.plain_pass_bytes)),
                      ", weights, moments and gradients alone ", mib(memory.peak(0)));
    predicted = pass.predict(*taken);
    plan.chosen = std::ranges::count(*taken, true);
    if (plan.chosen > 0) {
      plan.tape = std::make_shared<ops::TapeOptions>(ops::TapeOptions{
          .drops = chosen_by(std::make_shared<Choice>(chooser.labels_of(*taken)))});
    }
  }
  plan.pass_bytes = bytes_of(predicted, place);
  plan.seconds_again = predicted.seconds;
  return plan;
}

std::string describe(const RecomputePlan& plan, const StepMemory& memory) {
  std::string text = concat("recompute ", recompute_policy_name(plan.policy));
  if (plan.candidates > 0)
    text += concat(": ", plan.chosen, " of ", plan.candidates, " functions run again");
  if (plan.seconds_again > 0.0) {
    text += concat(", ", std::round(1e3 * plan.seconds_again / plan.seconds_plain) / 10.0,
                   " % more time in a pass");
  }
  text += concat("; tensors of a step are to hold ", mib(memory.peak(plan.pass_bytes)),
                 " at most, ", mib(plan.pass_bytes), " of them in a pass");
  if (plan.plain_pass_bytes > plan.pass_bytes) {
    text += concat(" (", mib(memory.peak(plan.plain_pass_bytes)), " and ",
                   mib(plan.plain_pass_bytes), " with nothing recomputed)");
  }
  return text;
}

}  // namespace hadal::train
