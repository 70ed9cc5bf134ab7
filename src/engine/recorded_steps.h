// Steps of few tokens on a GPU as recorded graphs (ops/recorded_graph.h): a graph for each list of
// lengths and each end that steps are padded to (ops::StepPlaces::padded_end).
//
// The first step of a kind runs as it is, the second is recorded: a step of 43 layers is some
// thousand launches, which take longer than what they launch. Bits are those of the step run by
// itself.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/recorded_graph.h"

namespace hadal::engine {

/// What a step gives its runner.
struct StepOutput {
  at::Tensor streams;  ///< [tokens, hc_mult, dim]
  at::Tensor logits;   ///< [rows, vocab] FP32; undefined without rows
  /// By layer: the blocks [rows or tokens, k] I32 that its indexer chose.
  std::shared_ptr<const std::map<int64_t, at::Tensor>> selections;
};

class RecordedSteps {
 public:
  /// Tokens of a step that is worth recording, at most.
  static constexpr int64_t kMostTokens = 256;
  /// Graphs that are kept: those used last, so many and with results of so many bytes.
  static constexpr size_t kMostGraphs = 96;
  static constexpr int64_t kMostBytes = int64_t{512} << 20;

  explicit RecordedSteps(at::Device device) : memory_(device) {}

  /// What a step that ends at position `end` is padded to: at most 1,024 positions or an eighth
  /// more.
  static int64_t padded_end(int64_t end);

  /// Runs `step` or its graph. `moves`: KvCache::table_moves() of the step, which makes all that
  /// was recorded before useless when it changes. The output is valid until the next call.
  StepOutput run(const std::vector<int64_t>& lengths,
                 int64_t padded_end,
                 int64_t moves,
                 const std::function<StepOutput()>& step);
  /// Forgets all: other weights.
  void clear();
  int64_t num_graphs() const;

 private:
  using Key = std::pair<int64_t, std::vector<int64_t>>;
  struct Kept {
    std::unique_ptr<ops::RecordedGraph> graph;  ///< null: this kind of step was seen once
    StepOutput output;
    uint64_t used = 0;
    int64_t bytes = 0;     ///< of the output, once recorded
    bool refused = false;  ///< it cannot be recorded
  };
  void forget_oldest();

  ops::GraphMemory memory_;
  std::map<Key, Kept> kept_;
  int64_t bytes_ = 0;  // of all outputs
  int64_t moves_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace hadal::engine
