#include "train/zero_plan.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "base/check.h"

namespace hadal::train {
namespace {

size_t index(Pool pool) { return static_cast<size_t>(pool); }

double padding_of(std::span<const int64_t> loads) {
  const int64_t total = std::accumulate(loads.begin(), loads.end(), int64_t{0});
  if (total == 0) return 0.0;
  const int64_t most = *std::max_element(loads.begin(), loads.end());
  return static_cast<double>(most * std::ssize(loads) - total) / static_cast<double>(total);
}

class Planner {
 public:
  Planner(std::span<const PlanItem> items, int64_t ranks, int64_t cap) : items_(items) {
    plan_.ranks = ranks;
    plan_.cap = cap;
    plan_.groups = (ranks + cap - 1) / cap;
    for (auto& loads : plan_.loads) loads.assign(static_cast<size_t>(ranks), 0);
    plan_.dense_matrices.assign(static_cast<size_t>(ranks), 0);
  }

  ZeroPlan plan() {
    dense();
    lines({Share::kDown, Share::kUp, Share::kGate});
    lines({Share::kElements});
    std::stable_sort(plan_.pieces.begin(), plan_.pieces.end(),
                     [](const PlanPiece& a, const PlanPiece& b) { return a.item < b.item; });
    return std::move(plan_);
  }

 private:
  struct Buckets {
    std::vector<PlanPiece> pieces;  ///< by item, then by place; owners count from the group's first
    std::vector<int64_t> loads;
  };

  /// Dense matrices on `ranks` ranks, whole or in units.
  Buckets fill(int64_t ranks, bool whole) const {
    Buckets result;
    std::vector<PlanPiece> parts;
    std::vector<int64_t> sizes;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (items_[i].share != Share::kDense) continue;
      const int64_t step = whole ? items_[i].elements : items_[i].unit;
      for (int64_t begin = 0; begin < items_[i].elements; begin += step) {
        parts.push_back({i, begin, std::min(begin + step, items_[i].elements), 0});
        sizes.push_back(parts.back().size());
      }
    }
    const std::vector<int64_t> buckets = fill_buckets(sizes, ranks, result.loads);
    for (size_t p = 0; p < parts.size(); ++p) {
      const PlanPiece& part = parts[p];
      if (!result.pieces.empty() && result.pieces.back().item == part.item &&
          result.pieces.back().owner == buckets[p]) {
        result.pieces.back().end = part.end;
      } else {
        result.pieces.push_back({part.item, part.begin, part.end, buckets[p]});
      }
    }
    return result;
  }

  void dense() {
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const auto [begin, end] = group_ranks(plan_.ranks, plan_.groups, group);
      Buckets buckets = fill(end - begin, true);
      if (padding_of(buckets.loads) > kMostPadding) {
        Buckets cut = fill(end - begin, false);
        if (padding_of(cut.loads) < padding_of(buckets.loads)) buckets = std::move(cut);
      }
      std::copy(buckets.loads.begin(), buckets.loads.end(),
                plan_.loads[index(Pool::kDense)].begin() + begin);
      std::set<std::pair<int64_t, size_t>> stored;  // on which rank is something of which matrix
      for (const PlanPiece& piece : buckets.pieces) stored.emplace(piece.owner, piece.item);
      for (const auto& [owner, item] : stored)
        ++plan_.dense_matrices[static_cast<size_t>(begin + owner)];
      if (group == 0) plan_.pieces = std::move(buckets.pieces);
    }
  }

  /// Units of these shares as one line: each goes to the rank in whose equal run its middle lies.
  void lines(std::initializer_list<Share> shares) {
    int64_t total = 0;
    for (const PlanItem& item : items_)
      if (std::ranges::find(shares, item.share) != shares.end()) total += item.elements;
    std::vector<int64_t>& loads = plan_.loads[index(pool_of(*shares.begin()))];
    int64_t place = 0;
    for (const Share share : shares) {
      for (size_t i = 0; i < items_.size(); ++i) {
        if (items_[i].share != share) continue;
        const size_t first = plan_.pieces.size();
        for (int64_t begin = 0; begin < items_[i].elements; begin += items_[i].unit) {
          const int64_t size = std::min(items_[i].unit, items_[i].elements - begin);
          const auto middle = static_cast<__int128>(2 * place + size) * plan_.ranks;
          const auto owner = static_cast<int64_t>(middle / (2 * static_cast<__int128>(total)));
          place += size;
          loads[static_cast<size_t>(owner)] += size;
          if (plan_.pieces.size() > first && plan_.pieces.back().owner == owner) {
            plan_.pieces.back().end = begin + size;
          } else {
            plan_.pieces.push_back({i, begin, begin + size, owner});
          }
        }
      }
    }
  }

  std::span<const PlanItem> items_;
  ZeroPlan plan_;
};

}  // namespace

Pool pool_of(Share share) {
  switch (share) {
    case Share::kDense:
      return Pool::kDense;
    case Share::kDown:
    case Share::kUp:
    case Share::kGate:
      return Pool::kExperts;
    case Share::kElements:
      return Pool::kElements;
  }
  throw Error("pool_of: no such share");
}

double ZeroPlan::padding(Pool pool) const {
  const std::vector<int64_t>& all = loads[index(pool)];
  if (pool != Pool::kDense) return padding_of(all);
  double worst = 0.0;
  for (int64_t group = 0; group < groups; ++group) {
    const auto [begin, end] = group_ranks(ranks, groups, group);
    worst = std::max(worst, padding_of(std::span(all).subspan(static_cast<size_t>(begin),
                                                              static_cast<size_t>(end - begin))));
  }
  return worst;
}

double ZeroPlan::mean_dense_matrices() const {
  const int64_t all = std::accumulate(dense_matrices.begin(), dense_matrices.end(), int64_t{0});
  return static_cast<double>(all) / static_cast<double>(ranks);
}

int64_t ZeroPlan::most_dense_matrices() const {
  return *std::max_element(dense_matrices.begin(), dense_matrices.end());
}

int64_t dense_cap(std::span<const PlanItem> items) {
  int64_t total = 0, largest = 0;
  for (const PlanItem& item : items) {
    if (item.share != Share::kDense) continue;
    total += item.elements;
    largest = std::max(largest, item.elements);
  }
  return largest == 0 ? 1 : std::max<int64_t>(1, total / largest);
}

std::array<int64_t, 2> group_ranks(int64_t ranks, int64_t groups, int64_t group) {
  return {ranks * group / groups, ranks * (group + 1) / groups};
}

ZeroPlan plan_zero(std::span<const PlanItem> items, int64_t ranks, int64_t cap) {
  HADAL_CHECK(ranks >= 1 && cap >= 1, "plan_zero: ", ranks, " ranks, at most ", cap,
              " for dense matrices");
  return Planner(items, ranks, cap).plan();
}

std::vector<int64_t> fill_buckets(const std::vector<int64_t>& sizes,
                                  int64_t ranks,
                                  std::vector<int64_t>& loads) {
  HADAL_CHECK(ranks >= 1, "fill_buckets: ", ranks, " buckets");
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return sizes[a] > sizes[b]; });
  loads.assign(static_cast<size_t>(ranks), 0);
  std::vector<int64_t> buckets(sizes.size(), 0);
  for (const size_t item : order) {
    const auto least = std::min_element(loads.begin(), loads.end());
    *least += sizes[item];
    buckets[item] = least - loads.begin();
  }
  return buckets;
}

}  // namespace hadal::train
