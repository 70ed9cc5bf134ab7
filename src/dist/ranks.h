// The processes of one run, and what they say to each other (docs/parallelism.md).
//
// Ranks add nothing but integers: whatever is summed in floating point is sent as it is and added
// where it arrives, in an order of the receiver's (docs/decisions/0023-ranks.md). All ranks make
// the same calls in the same order.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/check.h"
#include "dist/placement.h"

namespace hadal::dist {

/// Another rank is gone, or did not come within the time allowed. what() names it where that can be
/// told. The program's exit code for it is 4.
class RankLost : public Error {
 public:
  explicit RankLost(const std::string& message) : Error(Verbatim{}, message) {}
};

/// A transfer under way; its tensor must stay until wait().
class Transfer {
 public:
  struct State;
  Transfer() = default;
  explicit Transfer(std::shared_ptr<State> state) : state_(std::move(state)) {}
  /// Errors: RankLost.
  void wait();

 private:
  std::shared_ptr<State> state_;
};

class Ranks {
 public:
  struct Impl;
  /// The only rank: it hears itself at once.
  Ranks();
  /// Waits for all others to join. `timeout` holds for this and for every later call. Errors:
  /// RankLost naming who has not come, InputError where rank 0 cannot listen.
  Ranks(const Placement& placement, std::chrono::milliseconds timeout);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int64_t rank() const { return placement_.rank; }
  int64_t size() const { return placement_.size; }
  bool first() const { return placement_.rank == 0; }

  /// What this rank does from here on: those who wait for it in vain name it.
  void enter(const std::string& what);
  void barrier(const std::string& what);
  /// Every entry becomes its sum over the ranks.
  void sum(std::span<int64_t> values);
  /// Whether it is so on any rank.
  bool any(bool here);
  /// The first rank's text.
  std::string broadcast(const std::string& text);

  /// Tensors are contiguous, of one shape and type on both sides; `tag` tells transfers between two
  /// ranks apart that are under way at the same time.
  Transfer broadcast(const at::Tensor& tensor, int64_t from);
  Transfer send(const at::Tensor& tensor, int64_t to, int64_t tag);
  Transfer receive(const at::Tensor& tensor, int64_t from, int64_t tag);

 private:
  Placement placement_;
  std::shared_ptr<Impl> impl_;  ///< none where this rank is the only one
};

}  // namespace hadal::dist
