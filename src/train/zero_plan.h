// Who owns what of a model's masters and moments on many ranks: hybrid ZeRO for Muon
// (docs/decisions/0026-owners.md). A function of shapes and numbers alone; nothing is allocated.
//
//   dense matrices  by a knapsack: the largest first, each to the rank that holds least. Whole as
//                   they are stored; only where that leaves more padding than kMostPadding, cut at
//                   the matrices that Muon takes (wo_a at its groups). At most `cap` ranks share
//                   them; more ranks form groups, each with all of them
//   experts         all down matrices of all layers, then up, then gate, as one line that is cut
//                   into equal runs at the borders of matrices
//   AdamW           all elements as one line, cut at multiples of kElementBlock in a parameter
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace hadal::train {

/// How a parameter is shared out; the lines of experts follow one another in this order.
enum class Share { kDense, kDown, kUp, kGate, kElements };

/// Elements of an AdamW parameter that stay together. A multiple of every vector width, so that an
/// element's place in a loop over its piece is the same wherever the piece begins.
inline constexpr int64_t kElementBlock = 1024;

/// Share of padding from which on stored matrices are cut at their units.
inline constexpr double kMostPadding = 0.1;

struct PlanItem {
  Share share;
  int64_t elements;
  int64_t unit;  ///< elements that are never cut: a matrix, or a block, which may end short
};

/// Elements [begin, end) of an item.
struct PlanPiece {
  size_t item;
  int64_t begin, end;
  int64_t owner;  ///< of the first group
  int64_t size() const { return end - begin; }
  bool operator==(const PlanPiece&) const = default;
};

/// What is shared out together.
enum class Pool { kDense, kExperts, kElements };
inline constexpr size_t kNumPools = 3;
Pool pool_of(Share share);

struct ZeroPlan {
  int64_t ranks = 1;
  int64_t cap = 1;                ///< ranks that may share the dense matrices
  int64_t groups = 1;             ///< of at most `cap` ranks; sizes differ by one at most
  std::vector<PlanPiece> pieces;  ///< by item, then by place; each element once
  /// Elements, and stored dense matrices of which there is something, on each rank of all groups.
  std::array<std::vector<int64_t>, kNumPools> loads;
  std::vector<int64_t> dense_matrices;

  /// What equal buckets, all as large as the fullest, would hold beyond their contents, as a share
  /// of these; of dense matrices the worst group's.
  double padding(Pool pool) const;
  double mean_dense_matrices() const;
  int64_t most_dense_matrices() const;
  bool operator==(const ZeroPlan&) const = default;
};

/// The most ranks that can share dense matrices evenly: a bucket holds the largest at least.
int64_t dense_cap(std::span<const PlanItem> items);

/// Ranks of group `group`: [begin, end).
std::array<int64_t, 2> group_ranks(int64_t ranks, int64_t groups, int64_t group);

/// Errors: HADAL_CHECK for ranks or cap below 1.
ZeroPlan plan_zero(std::span<const PlanItem> items, int64_t ranks, int64_t cap);

/// The bucket of each item of these sizes, the largest first, each to the least load, the lowest of
/// equals (longest processing time); `loads` becomes the buckets' sums.
std::vector<int64_t> fill_buckets(const std::vector<int64_t>& sizes,
                                  int64_t ranks,
                                  std::vector<int64_t>& loads);

}  // namespace hadal::train
