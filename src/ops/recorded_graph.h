// Work on a GPU that is recorded once and then launched as a whole: a CUDA graph, for steps whose
// kernels are too short to be launched one by one.
//
// What is recorded reads and writes the addresses that it had then, whatever lies there when it is
// replayed. A build without CUDA has no such work to record.
#pragma once

#include <functional>
#include <memory>

#include <ATen/core/Tensor.h>

namespace hadal::ops {

/// Memory that graphs share of which no two run at once: what one needs between its kernels lies
/// where another has it. Results stay what they are until their own graph is replayed.
class GraphMemory {
 public:
  explicit GraphMemory(at::Device device);
  ~GraphMemory();
  GraphMemory(const GraphMemory&) = delete;
  GraphMemory& operator=(const GraphMemory&) = delete;

  /// Other memory for the graphs to come: for when none is left that has this one, whose results
  /// somebody may still hold. Memory that the last graph has left takes no others.
  void renew();

 private:
  friend class RecordedGraph;
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

class RecordedGraph {
 public:
  /// Runs `work`, whose launches on the current stream are recorded and not executed. It must have
  /// run before, so that nothing in it happens for the first time, and it may not wait for the
  /// device. `memory` must outlive the graph. Errors: Error for work that cannot be recorded.
  RecordedGraph(GraphMemory& memory, const std::function<void()>& work);
  ~RecordedGraph();
  RecordedGraph(const RecordedGraph&) = delete;
  RecordedGraph& operator=(const RecordedGraph&) = delete;

  /// Launches it on the current stream.
  void replay();

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

/// A part of a step that what follows it does not need at once: while a graph is recorded, a branch
/// that runs beside the rest; elsewhere the same work where it stands. Bits do not depend on it.
class SideBranch {
 public:
  /// Parts of one number, below kBranches, follow each other.
  static constexpr int kBranches = 3;
  explicit SideBranch(int number);
  /// Joins, where that was not done.
  ~SideBranch();
  SideBranch(const SideBranch&) = delete;
  SideBranch& operator=(const SideBranch&) = delete;

  /// Does `work` after all that was launched before this call. Tensors that it reads and did not
  /// make must live until `join`, because what is freed may be reused by the rest of the step.
  void run(const std::function<void()>& work);
  /// What is launched from here on begins after all of the branch.
  void join();

 private:
  int number_;
  bool forked_ = false;
};

}  // namespace hadal::ops
