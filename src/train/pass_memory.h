// What a pass with some of its annotated tensors recomputed needs at its peak: measured once with
// all of them recomputed, then predicted for any choice
// (docs/decisions/0025-recomputed-tensors.md).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <vector>

#include "ops/tape.h"
#include "ops/tensor_memory.h"

namespace hadal::train {

/// What happened while a pass ran: allocations of the CPU's tensors, and what its tape told.
/// Watches from its construction to stop().
class PassTrace final : public ops::TapeObserver, public ops::TensorMemoryWatcher {
 public:
  enum class Kind {
    kAllocated,
    kFreed,
    kRan,
    kNeeded,
    kReleased,
    kRunsAgain,
    kRanAgain,
    kForwardEnded
  };
  struct Event {
    Kind kind;
    int64_t number = 0;  ///< of the function or result; bytes of allocations
    const void* data = nullptr;
  };
  struct Function {
    std::vector<int64_t> inputs, results;
    double seconds = 0.0;  ///< of its second run
  };
  struct Slot {
    ops::TensorLabel label;
    int64_t bytes = 0, function = 0;
    const void* data = nullptr;
    bool annotated = false;
  };

  PassTrace();
  ~PassTrace() override;
  void stop();
  /// What follows is the backward pass.
  void forward_ended();

  const std::vector<Event>& events() const { return events_; }
  const std::vector<Function>& functions() const { return functions_; }
  const std::vector<Slot>& slots() const { return slots_; }

  void allocated(const void* data, int64_t bytes) override;
  void freed(const void* data, int64_t bytes) override;
  void ran(int64_t function,
           const std::vector<int64_t>& inputs,
           const std::vector<Result>& results) override;
  void annotated(int64_t slot) override;
  void needed(int64_t slot) override;
  void released(int64_t slot) override;
  void runs_again(int64_t function) override;
  void ran_again(int64_t function, double seconds) override;

 private:
  std::vector<Event> events_;
  std::vector<Function> functions_;
  std::vector<Slot> slots_;
  bool watching_ = true;
};

/// The same pass under any choice of what is recomputed.
class PassMemory {
 public:
  /// Of a pass all of whose annotated tensors were recomputed.
  explicit PassMemory(const PassTrace& trace);

  /// What can be chosen: a function whose results are recomputed.
  struct Candidate {
    int64_t function = 0;
    std::vector<ops::TensorLabel> labels;  ///< of its annotated results
    int64_t bytes = 0;                     ///< that the graph keeps else
    double seconds = 0.0;                  ///< of running it again
    bool crosses = false;                  ///< another block reads a result
  };
  const std::vector<Candidate>& candidates() const { return candidates_; }

  struct Prediction {
    int64_t peak_bytes = 0;  ///< above what was there before the pass
    int64_t kept_bytes = 0;  ///< likewise, between its forward and its backward pass
    double seconds = 0.0;    ///< of all that runs again
  };
  Prediction predict(const std::function<bool(const ops::TensorLabel&)>& drops) const;
  /// Of the candidates that are taken, in the order of candidates().
  Prediction predict(const std::vector<bool>& taken) const;

 private:
  enum class Kind { kBytes, kBorn, kDied, kNeeded, kReleased, kForwardEnded };
  struct Event {
    Kind kind;
    int64_t slot = 0;
    int64_t rise = 0, net = 0;  ///< of bytes that belong to no slot
  };
  struct Slot {
    ops::TensorLabel label;
    int64_t bytes = 0, function = 0;
    bool annotated = false;
    bool saved = false;    ///< by a node of the graph
    bool can_die = false;  ///< nobody else held it when the backward pass asked for it
    int64_t candidate = -1;
  };
  struct Function {
    std::vector<int64_t> inputs, results;
    double seconds = 0.0;
    int64_t rise = 0;  ///< bytes at its peak above those before it
  };
  void find_candidates();
  struct Reader;
  struct Simulation;

  std::vector<Event> events_;
  std::vector<Slot> slots_;
  std::vector<Function> functions_;
  std::vector<Candidate> candidates_;
};

}  // namespace hadal::train
