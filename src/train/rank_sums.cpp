#include "train/rank_sums.h"

#include <bit>
#include <deque>
#include <map>
#include <span>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "base/hash.h"
#include "train/slots.h"
#include "train/stochastic_rounding.h"

namespace hadal::train {
namespace {

/// Messages under way from this rank at most; the next one waits for the oldest.
constexpr size_t kUnderWay = 32;

template <typename Bits, typename Value>
bool finite(const Value* values, int64_t count, Bits exponent) {
  Bits worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits bits = std::bit_cast<Bits>(values[i]) & exponent;
    worst = worst < bits ? bits : worst;
  }
  return worst != exponent;
}

bool is_finite(const at::Tensor& gradient) {
  const at::Tensor dense = gradient.contiguous();
  if (!dense.is_cpu()) return at::isfinite(dense).all().item<bool>();
  if (dense.scalar_type() == at::kDouble)
    return finite<uint64_t>(dense.const_data_ptr<double>(), dense.numel(), 0x7ff0000000000000u);
  return finite<uint32_t>(dense.const_data_ptr<float>(), dense.numel(), 0x7f800000u);
}

/// Reads and writes measures as integers, which ranks may add: all but one write zeros.
class Words {
 public:
  explicit Words(std::span<int64_t> words) : words_(words) {}

  int64_t& next() { return words_[at_++]; }

  void put(const at::Tensor& scalar) {
    next() = !scalar.defined() ? 0 : scalar.scalar_type() == at::kDouble ? 2 : 1;
    next() = scalar.defined() ? std::bit_cast<int64_t>(scalar.item<double>()) : 0;
  }
  at::Tensor scalar() {
    const int64_t type = next();
    const auto value = std::bit_cast<double>(next());
    if (type == 0) return {};
    return at::full({}, value, type == 2 ? at::kDouble : at::kFloat);
  }
  void put(const at::Tensor& counts, int64_t size) {
    next() = counts.defined() ? 1 : 0;
    const at::Tensor own = counts.defined() ? counts.to(at::kLong).cpu().contiguous() : counts;
    for (int64_t i = 0; i < size; ++i) next() = own.defined() ? own[i].item<int64_t>() : 0;
  }
  at::Tensor counts(int64_t size) {
    const bool defined = next() != 0;
    const at::Tensor result = at::empty({size}, at::kLong);
    for (int64_t i = 0; i < size; ++i) result[i] = next();
    return defined ? result : at::Tensor();
  }

 private:
  std::span<int64_t> words_;
  size_t at_ = 0;
};

constexpr int64_t kClampCounts = 4;

int64_t measure_words(const model::ModelConfig& config) {
  return 4 * 2 + 1 + kClampCounts + config.n_blocks() * (1 + config.n_routed_experts);
}

void put_measures(const StepMeasures& measures, const model::ModelConfig& config, Words& words) {
  words.put(measures.main_loss);
  words.put(measures.mtp_loss);
  words.put(measures.balance_loss);
  words.put(measures.index_loss);
  words.put(measures.clamped, kClampCounts);
  for (int64_t block = 0; block < config.n_blocks(); ++block) {
    const auto index = static_cast<size_t>(block);
    const bool has = index < measures.expert_load.size();
    words.put(has ? measures.expert_load[index] : at::Tensor(), config.n_routed_experts);
  }
}

StepMeasures measures_of(const model::ModelConfig& config, Words& words) {
  StepMeasures measures;
  measures.main_loss = words.scalar();
  measures.mtp_loss = words.scalar();
  measures.balance_loss = words.scalar();
  measures.index_loss = words.scalar();
  measures.clamped = words.counts(kClampCounts);
  for (int64_t block = 0; block < config.n_blocks(); ++block)
    measures.expert_load.push_back(words.counts(config.n_routed_experts));
  return measures;
}

/// What all ranks know of a step's nodes: who has which, with which gradients and measures.
class NodeTable {
 public:
  struct Entry {
    Span span;
    int64_t data = 0;  ///< whose rows they are
    int64_t own = -1;  ///< number among those of this rank's rows
  };

  NodeTable(const std::vector<StepNode>& nodes,
            size_t num_parameters,
            const StepShare& share,
            const model::ModelConfig& config,
            const dist::Mesh& mesh,
            dist::Ranks& ranks)
      : config_(config),
        mask_words_((num_parameters + 63) / 64),
        measures_(mask_words_ * (1 + static_cast<size_t>(mesh.shape().context))),
        row_(measures_ + static_cast<size_t>(measure_words(config))),
        context_(mesh.place(ranks.rank()).context) {
    const int64_t here = mesh.place(ranks.rank()).data;
    for (int64_t data = 0; data < mesh.data(); ++data) {
      int64_t own = 0;
      for (const Span& span : nodes_of(row_share(share.total, mesh.data(), data), share.total))
        entries_.push_back({span, data, data == here ? own++ : -1});
    }
    // Stages that pass the same rows write different words of an entry, or add counts. Of the
    // members that share rows the first one alone writes what all of them know.
    words_.assign(entries_.size() * row_, 0);
    for (size_t e = 0; e < entries_.size(); ++e)
      if (entries_[e].own >= 0) fill(e, nodes.at(static_cast<size_t>(entries_[e].own)));
    ranks.sum(words_);
  }

  const std::vector<Entry>& entries() const { return entries_; }
  bool has_gradient(size_t entry, size_t parameter) const { return bit(entry, 0, parameter); }
  bool not_finite(size_t entry, int64_t context, size_t parameter) const {
    return bit(entry, mask_words_ * (1 + static_cast<size_t>(context)), parameter);
  }
  StepMeasures measures(size_t entry) {
    Words words{std::span<int64_t>(words_).subspan(entry * row_ + measures_)};
    return measures_of(config_, words);
  }

 private:
  bool bit(size_t entry, size_t mask, size_t parameter) const {
    const auto word = static_cast<uint64_t>(words_[entry * row_ + mask + parameter / 64]);
    return (word >> (parameter % 64) & 1) != 0;
  }

  void fill(size_t entry, const StepNode& node) {
    HADAL_CHECK(node.span == entries_[entry].span, "rank sums: rows ", node.span.begin, " to ",
                node.span.end, " where ", entries_[entry].span.begin, " to ",
                entries_[entry].span.end, " were expected");
    std::vector<uint8_t> bad(node.gradients.size(), 0);
    for_each_slot(bad.size(), true, [&](size_t i) {
      bad[i] = node.gradients[i].defined() && !is_finite(node.gradients[i]) ? 1 : 0;
    });
    const auto set = [&](size_t mask, size_t i) {
      int64_t& word = words_[entry * row_ + mask + i / 64];
      word = static_cast<int64_t>(static_cast<uint64_t>(word) | uint64_t{1} << (i % 64));
    };
    for (size_t i = 0; i < bad.size(); ++i) {
      if (node.gradients[i].defined() && context_ == 0) set(0, i);
      if (bad[i] != 0) set(mask_words_ * (1 + static_cast<size_t>(context_)), i);
    }
    if (context_ != 0) return;
    Words words{std::span<int64_t>(words_).subspan(entry * row_ + measures_)};
    put_measures(node.measures, config_, words);
  }

  const model::ModelConfig& config_;
  size_t mask_words_, measures_, row_;  ///< words of a mask, in front of the measures, of all
  int64_t context_;
  std::vector<Entry> entries_;
  std::vector<int64_t> words_;
};

/// One piece's sum, on its owner: what has arrived and what is here, by the tree.
at::Tensor join_gradients(const NodeTable& table,
                          int64_t leaves,
                          std::vector<at::Tensor>& gradients) {
  struct Part {
    Span span;
    at::Tensor gradient;
  };
  std::vector<Part> parts;
  for (size_t e = 0; e < table.entries().size(); ++e) {
    parts.push_back({table.entries()[e].span, std::move(gradients[e])});
    join_meeting(parts, leaves, [](Part& left, Part& right) {
      add_in_place(left.gradient, std::move(right.gradient));
    });
  }
  HADAL_CHECK(parts.size() == 1, "rank sums: ", parts.size(), " nodes are left of a gradient");
  return std::move(parts[0].gradient);
}

/// Every piece of a gradient goes to its owner, bundle after bundle in one order on all ranks, so
/// that nobody waits for somebody who waits for him.
class Exchange {
 public:
  Exchange(const NodeTable& table,
           std::vector<StepNode>& nodes,
           Optimizer& optimizer,
           dist::Ranks& ranks)
      : table_(table),
        nodes_(nodes),
        optimizer_(optimizer),
        pieces_(optimizer.ownership().pieces()),
        ranks_(ranks),
        left_(optimizer.slots().size(), 0) {}

  /// Leaves in the optimizer the sum of each gradient of this rank's pieces.
  void run(int64_t leaves) {
    std::vector<Ownership::Message> messages;
    for (size_t p = 0; p < pieces_.size(); ++p) {
      ++left_[pieces_[p].item];
      messages.push_back({p, pieces_[p].size(), is_halved(p) ? 2 : 4});
    }
    for (const std::vector<size_t>& bundle : optimizer_.ownership().bundles(messages)) {
      if (optimizer_.ownership().here(pieces_[bundle[0]])) {
        collect(bundle, leaves);
      } else if (optimizer_.ownership().collects(pieces_[bundle[0]])) {
        send(bundle);
      }
      for (const size_t p : bundle) done_with(pieces_[p]);
    }
    for (dist::Transfer& transfer : sent_) transfer.wait();
  }

 private:
  /// Of a bundle, what a node has a gradient of.
  std::vector<size_t> present(const std::vector<size_t>& bundle, size_t entry) const {
    std::vector<size_t> result;
    for (const size_t p : bundle)
      if (table_.has_gradient(entry, pieces_[p].item)) result.push_back(p);
    return result;
  }
  const model::Parameter& parameter(size_t piece) const {
    return *optimizer_.slots()[pieces_[piece].item].parameter;
  }
  /// Whether its gradients travel in BF16; one bundle has pieces of one kind.
  bool is_halved(size_t piece) const {
    return optimizer_.params().bf16_expert_gradients &&
           parameter(piece).kind == model::ParamKind::kExperts;
  }
  at::Tensor outgoing(size_t entry, size_t piece) {
    at::Tensor gradient = own(entry, piece);
    if (!is_halved(piece)) return gradient;
    return stochastic_bf16(gradient,
                           {.seed = optimizer_.params().seed ^ fnv1a64(parameter(piece).name),
                            .step = optimizer_.num_steps(),
                            .node = table_.entries()[entry].span.begin,
                            .element = pieces_[piece].begin});
  }
  /// Tells a bundle of one node from all others.
  int64_t tag(const std::vector<size_t>& bundle, size_t entry) const {
    return static_cast<int64_t>(bundle[0] * table_.entries().size() + entry);
  }
  /// This rank's addend of a piece, in the node's memory.
  at::Tensor own(size_t entry, size_t piece) {
    StepNode& node = nodes_[static_cast<size_t>(table_.entries()[entry].own)];
    at::Tensor& whole = node.gradients[pieces_[piece].item];
    HADAL_CHECK(whole.scalar_type() == at::kFloat, "rank sums: a gradient is ", whole.scalar_type(),
                ", expected FP32");
    if (!whole.is_contiguous()) whole = whole.contiguous();
    return piece_of(whole, pieces_[piece]);
  }
  /// A gradient is freed when the last of its pieces is on its way.
  void done_with(const PlanPiece& piece) {
    if (--left_[piece.item] > 0) return;
    for (StepNode& node : nodes_) node.gradients[piece.item].reset();
  }

  void send(const std::vector<size_t>& bundle) {
    for (size_t e = 0; e < table_.entries().size(); ++e) {
      if (table_.entries()[e].own < 0) continue;
      std::vector<at::Tensor> gradients;
      for (const size_t p : present(bundle, e)) gradients.push_back(outgoing(e, p));
      if (gradients.empty()) continue;
      sent_.push_back(ranks_.send(bundled(gradients), pieces_[bundle[0]].owner, tag(bundle, e)));
    }
    for (; sent_.size() > kUnderWay; sent_.pop_front()) sent_.front().wait();
  }

  void collect(const std::vector<size_t>& bundle, int64_t leaves) {
    const size_t count = table_.entries().size();
    std::map<size_t, std::vector<at::Tensor>> gradients;  // by piece, each by entry
    for (const size_t p : bundle) gradients[p].resize(count);
    struct Arriving {
      size_t entry;
      at::Tensor bundle;
      dist::Transfer transfer;
    };
    std::vector<Arriving> arriving;
    for (size_t e = 0; e < count; ++e) {
      const std::vector<size_t> some = present(bundle, e);
      if (some.empty()) continue;
      if (table_.entries()[e].own >= 0) {
        // The sum must not keep the rest of a gradient alive.
        for (const size_t p : some) gradients[p][e] = is_whole(p) ? own(e, p) : own(e, p).clone();
        continue;
      }
      int64_t elements = 0;
      for (const size_t p : some) elements += pieces_[p].size();
      const at::Tensor room =
          at::empty({elements}, is_halved(some[0]) ? at::kBFloat16 : at::kFloat);
      const int64_t from =
          optimizer_.ownership().holder(pieces_[bundle[0]], table_.entries()[e].data);
      arriving.push_back({e, room, ranks_.receive(room, from, tag(bundle, e))});
    }
    for (Arriving& message : arriving) {
      message.transfer.wait();
      const std::vector<size_t> some = present(bundle, message.entry);
      std::vector<int64_t> sizes;
      for (const size_t p : some) sizes.push_back(pieces_[p].size());
      const std::vector<at::Tensor> parts = unbundled(message.bundle.to(at::kFloat), sizes);
      for (size_t i = 0; i < some.size(); ++i) gradients[some[i]][message.entry] = parts[i];
    }
    std::vector<at::Tensor> sums(bundle.size());
    for_each_slot(bundle.size(), true, [&](size_t i) {
      sums[i] = join_gradients(table_, leaves, gradients.at(bundle[i]));
    });
    for (size_t i = 0; i < bundle.size(); ++i)
      if (sums[i].defined()) optimizer_.set_gradient(bundle[i], std::move(sums[i]));
  }
  bool is_whole(size_t piece) const {
    return pieces_[piece].size() == parameter(piece).value.numel();
  }

  const NodeTable& table_;
  std::vector<StepNode>& nodes_;
  Optimizer& optimizer_;
  const std::vector<PlanPiece>& pieces_;
  dist::Ranks& ranks_;
  std::vector<int64_t> left_;  ///< pieces of each parameter that are still here
  std::deque<dist::Transfer> sent_;
};

}  // namespace

void sum_counts(StepCounts& counts, const model::ModelConfig& config, dist::Ranks& ranks) {
  counts.index_queries.resize(static_cast<size_t>(config.n_blocks()), 0);
  std::vector<int64_t> values = {counts.targets, counts.mtp_targets, counts.rows};
  values.insert(values.end(), counts.index_queries.begin(), counts.index_queries.end());
  ranks.sum(values);
  counts.targets = values[0];
  counts.mtp_targets = values[1];
  counts.rows = values[2];
  counts.index_queries.assign(values.begin() + 3, values.end());
}

size_t first_not_finite(const std::vector<at::Tensor>& gradients) {
  for (size_t i = 0; i < gradients.size(); ++i)
    if (gradients[i].defined() && !is_finite(gradients[i])) return i;
  return gradients.size();
}

StepMeasures sum_over_ranks(StepSums& sums,
                            const StepShare& share,
                            const model::ModelConfig& config,
                            Optimizer& optimizer,
                            dist::Ranks& ranks,
                            std::vector<NotFinite>& not_finite) {
  const at::NoGradGuard no_grad;
  HADAL_CHECK(sums.on_cpu(), "rank sums: gradients are not on the CPU");
  std::vector<StepNode> nodes = sums.take(share.total);
  const std::vector<at::Tensor>& parameters = sums.parameters();
  const Ownership& ownership = optimizer.ownership();
  NodeTable table(nodes, parameters.size(), share, config, ownership.mesh(), ranks);
  const size_t count = table.entries().size();
  for (int64_t rank = 0; rank < ranks.size(); ++rank) {
    const dist::MeshPlace place = ownership.mesh().place(rank);
    const auto bad = [&](size_t p) {
      if (ownership.stage_of(p) != place.pipeline) return false;
      for (size_t e = 0; e < count; ++e)
        if (table.entries()[e].data == place.data && table.not_finite(e, place.context, p))
          return true;
      return false;
    };
    for (size_t p = 0; p < parameters.size(); ++p) {
      if (!bad(p)) continue;
      not_finite.push_back({rank, p});
      break;
    }
  }
  Exchange(table, nodes, optimizer, ranks).run(share.total);

  struct Part {
    Span span;
    StepMeasures measures;
  };
  std::vector<Part> parts;
  for (size_t e = 0; e < count; ++e) {
    parts.push_back({table.entries()[e].span, table.measures(e)});
    join_meeting(parts, share.total,
                 [](Part& left, const Part& right) { left.measures.add(right.measures); });
  }
  HADAL_CHECK(parts.size() == 1, "rank sums: ", parts.size(), " nodes are left of the measures");
  return std::move(parts[0].measures);
}

}  // namespace hadal::train
