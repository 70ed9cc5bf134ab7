#include "ops/sampling/sample.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "base/check.h"
#include "base/hash.h"
#include "base/parallel.h"
#include "base/philox.h"
#include "ops/sampling/sample_cpu.h"

namespace hadal::ops {

constinit CpuSlot<void(const ReachParams&, int64_t, int64_t, uint64_t*)> reaching_cpu;
constinit CpuSlot<void(const MassParams&, double*)> masses_cpu;
constinit CpuSlot<void(const MassParams&, double*)> step_masses_cpu;
constinit CpuSlot<void(const GatherParams&, int32_t*, float*, int64_t*)> gather_cpu;
constinit CpuSlot<void(const float*, int64_t, double, double, double*)> exp_total_cpu;
constinit CpuSlot<void(const float*, int64_t, int64_t*)> largest_cpu;

namespace {

/// The place of the largest logit that is neither NaN nor -infinity, or -1.
int64_t find_largest(std::span<const float> logits) {
  int64_t place = -1;
  largest_cpu(logits.data(), std::ssize(logits), &place);
  return place;
}

/// Orders tokens of a row by likelihood, ties to the lower id.
auto likelier_in(std::span<const float> row) {
  return [row](int64_t a, int64_t b) {
    const float x = row[static_cast<size_t>(a)], y = row[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
}

/// A list of tokens with their logits; room for what gather_cpu may write behind it.
struct TokenList {
  std::vector<int32_t> ids;
  std::vector<float> logits;
  int64_t count = 0;

  void gather(std::span<const float> row, float floor) {
    constexpr size_t kBehind = 16;
    if (ids.size() < row.size() + kBehind) {
      ids.resize(row.size() + kBehind);
      logits.resize(row.size() + kBehind);
    }
    count = 0;
    gather_cpu({.logits = row.data(), .count = std::ssize(row), .floor = floor, .first = 0},
               ids.data(), logits.data(), &count);
  }
};

/// The `count` likeliest tokens that are not NaN, or all, in any order.
std::vector<int32_t> likeliest(std::span<const float> row, int64_t count) {
  constexpr int64_t kPiece = 1024;
  std::vector<int32_t> found;
  if (count <= 0) return found;
  std::array<int32_t, kPiece + 16> ids;
  std::array<float, kPiece + 16> logits;
  float floor = -INFINITY;  // of those that may be among them
  const auto keep = [&] {
    const auto last = found.begin() + count - 1;
    std::nth_element(found.begin(), last, found.end(), likelier_in(row));
    floor = row[static_cast<size_t>(*last)];
    found.resize(static_cast<size_t>(count));
  };
  for (int64_t first = 0; first < std::ssize(row); first += kPiece) {
    int64_t more = 0;
    gather_cpu({.logits = row.data() + first,
                .count = std::min(kPiece, std::ssize(row) - first),
                .floor = floor,
                .first = static_cast<int32_t>(first)},
               ids.data(), logits.data(), &more);
    found.insert(found.end(), ids.begin(), ids.begin() + more);
    if (std::ssize(found) >= 2 * count + kPiece / 4) keep();
  }
  if (std::ssize(found) > count) keep();
  return found;
}

/// A candidate and its key: log p + Gumbel noise. The largest key wins, ties to the lower id.
struct Candidate {
  double key;
  int64_t token;
};

bool beats(const Candidate& a, const Candidate& b) {
  return a.key > b.key || (a.key == b.key && a.token < b.token);
}

/// What a thread needs to draw from a row, kept for the next one.
struct Scratch {
  std::vector<float> adjusted, kept;
  TokenList list;
};

/// One row and how it is drawn from.
///
/// Top-k, top-p and min-p each keep the likeliest tokens up to some border. So whoever lies beyond
/// a border that is surely on the far side need not be looked at, and whether the winner of the
/// others lies within is asked exactly, as if all had been.
class RowDraw {
 public:
  RowDraw(std::span<const float> logits,
          const Sampling& sampling,
          int64_t position,
          int64_t choice,
          int64_t best,
          Scratch& scratch)
      : row_(logits),
        sampling_(sampling),
        best_(best),
        highest_(logits[static_cast<size_t>(best)]),
        temperature_(sampling.temperature),
        inverse_(static_cast<float>(1.0 / sampling.temperature)),
        least_(sampling.min_p > 0.0 ? std::log(std::min(sampling.min_p, 1.0)) : -INFINITY),
        choice_(static_cast<uint32_t>(choice)),
        stream_(fnv1a64("sample") ^ static_cast<uint64_t>(position)),
        random_(sampling.seed, stream_) {
    choose_candidates(scratch);
  }

  int64_t token() const {
    // Whom a border excludes, it excludes with everybody who is less likely, so the next best is
    // looked for among the likelier ones. The most likely token is never excluded.
    Candidate chosen = largest({});
    while (chosen.token != best_ &&
           (scaled(chosen.token) < least_ || (has_top_p() && !within(chosen.token)))) {
      chosen = largest(chosen.token);
    }
    return chosen.token;
  }
  /// Of a token that can be drawn.
  double logprob(int64_t token) const { return scaled(token) - std::log(kept_mass()); }

 private:
  /// Of the mass, between what step_masses_cpu finds and what masses_cpu would.
  static constexpr double kMassSlack = 1e-5;
  static constexpr double kScaledSlack = 1e-3;  ///< far above every rounding on the way

  bool has_top_k() const { return sampling_.top_k > 0 && sampling_.top_k < std::ssize(row_); }
  bool has_top_p() const { return sampling_.top_p < 1.0; }
  float logit(int64_t token) const { return row_[static_cast<size_t>(token)]; }
  double scaled_logit(float logit) const {
    return (logit - static_cast<double>(highest_)) / temperature_;
  }
  double scaled(int64_t token) const { return scaled_logit(logit(token)); }
  static double step_bound(int step) { return -static_cast<double>(kMassStep) * (step + 1); }

  void choose_candidates(Scratch& scratch) {
    logits_ = row_.data();
    count_ = std::ssize(row_);
    if (has_top_k()) {
      take_top(scratch);
      return;
    }
    double border = least_;  // scaled logits below it cannot be kept
    if (has_top_p()) {
      step_masses_cpu(mass_params(best_), steps_.data());
      const double wanted = sampling_.top_p * steps_[0];
      for (int step = 0; step < kMassSteps; ++step) {
        const double mass = steps_[static_cast<size_t>(step) + 1];
        if (mass < wanted * (1 - kMassSlack)) surely_within_ = step_bound(step);
        if (mass <= wanted * (1 + kMassSlack)) continue;
        border = std::max(border, step_bound(step));
        break;
      }
    }
    const double floor = highest_ + border * temperature_;
    if (!std::isfinite(floor)) return;
    const double slack = 1e-5 * (std::abs(double{highest_}) + std::abs(border) * temperature_);
    scratch.list.gather(row_, static_cast<float>(floor - slack));
    take(scratch.list);
  }
  void take(const TokenList& list) {
    logits_ = list.logits.data();
    ids_ = list.ids.data();
    count_ = list.count;
  }
  void take_top(Scratch& scratch) {
    TokenList& list = scratch.list;
    list.ids = likeliest(row_, sampling_.top_k);
    list.count = std::ssize(list.ids);
    list.logits.clear();
    for (const int32_t token : list.ids) list.logits.push_back(logit(token));
    if (has_top_p()) {
      // Top-p is of what is left.
      scratch.kept.assign(row_.size(), -INFINITY);
      for (const int32_t token : list.ids) scratch.kept[static_cast<size_t>(token)] = logit(token);
      row_ = scratch.kept;
    }
    take(list);
  }

  MassParams mass_params(int64_t token) const {
    return {.logits = row_.data(),
            .vocab = std::ssize(row_),
            .highest = highest_,
            .inverse = inverse_,
            .token = token};
  }
  /// Whether the tokens likelier than `token` have less than top_p of the mass.
  bool within(int64_t token) const {
    if (scaled(token) > surely_within_ + kScaledSlack) return true;
    std::array<double, 2> masses{};
    masses_cpu(mass_params(token), masses.data());
    return masses[1] < sampling_.top_p * masses[0];
  }

  Candidate candidate(int64_t token) const {
    // Minus the logarithm of an exponential draw, which must not be 0.
    const double uniform = random_.uniform(uint64_t{choice_} << 32 | static_cast<uint64_t>(token));
    const double exponential = std::max(-std::log1p(-uniform), 1e-300);
    return {.key = scaled(token) - std::log(exponential), .token = token};
  }
  /// The largest key, of the tokens likelier than `excluded` if there is one.
  Candidate largest(std::optional<int64_t> excluded) const {
    constexpr int64_t kPiece = 256;  // tokens between two looks at the best key so far
    const auto likelier = likelier_in(row_);
    Candidate chosen = candidate(best_);
    std::mutex mutex;
    parallel_for(count_, 16'384, [&, first = chosen](int64_t begin, int64_t end) {
      Candidate local = first;
      for (int64_t piece = begin; piece < end; piece += kPiece) {
        std::array<uint64_t, kPiece / 64> words{};
        reaching_cpu(reach(local.key, excluded), piece, std::min(piece + kPiece, end),
                     words.data());
        for (size_t w = 0; w < words.size(); ++w) {
          for (uint64_t left = words[w]; left != 0; left &= left - 1) {
            const int64_t place = piece + static_cast<int64_t>(64 * w) + std::countr_zero(left);
            const int64_t token = ids_ == nullptr ? place : ids_[place];
            if (std::isnan(logit(token)) || (excluded && !likelier(token, *excluded))) continue;
            if (const Candidate other = candidate(token); beats(other, local)) local = other;
          }
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      if (beats(local, chosen)) chosen = local;
    });
    return chosen;
  }
  /// What the kernel needs to find the tokens whose keys can be as large as `bound`.
  ReachParams reach(double bound, std::optional<int64_t> excluded) const {
    return {.logits = logits_,
            .ids = ids_,
            .highest = highest_,
            .inverse = inverse_,
            .bound = static_cast<float>(bound - kScaledSlack),
            .floor = excluded ? logit(*excluded) : -INFINITY,
            .seed = sampling_.seed,
            .stream = stream_,
            .choice = choice_};
  }

  /// The sum of exp(scaled logit) of the tokens that can be drawn.
  double kept_mass() const {
    double total = 0;
    if (!has_top_p() && ids_ == nullptr) {
      exp_total_cpu(logits_, count_, highest_, 1.0 / temperature_, &total);
      return total;
    }
    std::vector<int64_t> surely, doubtful;  // top-p's border lies among these
    for (int64_t place = 0; place < count_; ++place) {
      const int64_t token = ids_ == nullptr ? place : ids_[place];
      const double value = scaled(token);
      if (!(value > -INFINITY) || (token != best_ && value < least_)) continue;
      const bool kept = !has_top_p() || value > surely_within_ + kScaledSlack;
      (kept ? surely : doubtful).push_back(token);
    }
    total = mass_of(surely);
    return doubtful.empty() ? total : total + mass_within(doubtful, total);
  }
  double mass_of(std::span<const int64_t> tokens) const {
    std::vector<float> logits(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) logits[i] = logit(tokens[i]);
    double total = 0;
    exp_total_cpu(logits.data(), std::ssize(logits), highest_, 1.0 / temperature_, &total);
    return total;
  }
  /// Of those that top-p keeps, where all that are likelier have the mass `before`. Halves them
  /// around the one in the middle until the border is found.
  double mass_within(std::span<int64_t> tokens, const double before) const {
    double all = 0, found = 0;
    exp_total_cpu(row_.data(), std::ssize(row_), highest_, 1.0 / temperature_, &all);
    const double wanted = sampling_.top_p * all;
    while (!tokens.empty()) {
      const size_t middle = tokens.size() / 2;
      const auto here = tokens.begin() + static_cast<std::ptrdiff_t>(middle);
      std::ranges::nth_element(tokens, here, likelier_in(row_));
      const double likelier = mass_of(tokens.first(middle)), mass = before + found + likelier;
      const bool near = std::abs(mass - wanted) < kMassSlack * all;
      if (*here != best_ && !(near ? within(*here) : mass < wanted)) {
        tokens = tokens.first(middle);
      } else {
        found += likelier + std::exp(scaled(*here));
        tokens = tokens.subspan(middle + 1);
      }
    }
    return found;
  }

  std::span<const float> row_;  ///< what top-k left, where top-p asks
  const Sampling& sampling_;
  int64_t best_;
  float highest_;
  double temperature_;
  float inverse_;
  double least_;  ///< min-p's border, of scaled logits
  uint32_t choice_;
  uint64_t stream_;
  Philox random_;
  /// The candidates: of a list, or the whole row.
  const float* logits_ = nullptr;
  const int32_t* ids_ = nullptr;
  int64_t count_ = 0;
  std::array<double, 1 + kMassSteps> steps_{};
  double surely_within_ = std::numeric_limits<double>::infinity();  ///< scaled logits above it
};

void draw_row(const DrawRow& row, Drawn& drawn) {
  thread_local Scratch scratch;
  std::span<const float> logits = row.logits;
  if (row.adjustment.any()) {
    scratch.adjusted.assign(logits.begin(), logits.end());
    adjust_logits(scratch.adjusted, row.adjustment);
    logits = scratch.adjusted;
  }
  drawn = {};
  const int64_t best = find_largest(logits);
  if (best < 0) return;
  const Sampling& sampling = row.adjustment.sampling;
  drawn.token = best;
  if (sampling.temperature > 0.0) {
    const RowDraw draw(logits, sampling, row.position, row.choice, best, scratch);
    drawn.token = draw.token();
    if (row.sampled_logprob) drawn.sampled_logprob = draw.logprob(drawn.token);
  }
  if (row.top_logprobs < 0) return;
  const LogSoftmax model(row.logits);
  drawn.logprob = model.of(drawn.token);
  drawn.top = model.top(row.top_logprobs);
}

}  // namespace

void draw_rows(std::span<const DrawRow> rows, std::span<Drawn> drawn) {
  HADAL_CHECK(rows.size() == drawn.size(), "sample: ", rows.size(), " rows, room for ",
              drawn.size());
  parallel_for(std::ssize(rows), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i)
      draw_row(rows[i], drawn[i]);
  });
}

int64_t sample_token(std::span<const float> logits,
                     const Sampling& sampling,
                     int64_t position,
                     int64_t choice) {
  const DrawRow row{.logits = logits,
                    .adjustment = {.sampling = sampling},
                    .position = position,
                    .choice = choice};
  Drawn drawn;
  draw_rows({&row, 1}, {&drawn, 1});
  HADAL_CHECK(drawn.token >= 0, "sample: no usable logit among ", logits.size());
  return drawn.token;
}

LogSoftmax::LogSoftmax(std::span<const float> logits) : logits_(logits) {
  const int64_t best = find_largest(logits);
  HADAL_CHECK(best >= 0, "sample: no usable logit among ", logits.size());
  highest_ = logits[static_cast<size_t>(best)];
  double total = 0;
  exp_total_cpu(logits.data(), std::ssize(logits), highest_, 1.0, &total);
  log_total_ = std::log(total);
}

double LogSoftmax::of(int64_t token) const {
  return static_cast<double>(logits_[static_cast<size_t>(token)]) - highest_ - log_total_;
}

std::vector<TokenLogprob> LogSoftmax::top(int64_t count) const {
  std::vector<int32_t> order = likeliest(logits_, count);
  std::ranges::sort(order, likelier_in(logits_));
  std::vector<TokenLogprob> top;
  for (const int32_t token : order) top.push_back({.token = token, .logprob = of(token)});
  return top;
}

}  // namespace hadal::ops
