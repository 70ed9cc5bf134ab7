// Everything that the next step of a run depends on in tensors: masters, moments and what no
// gradient moves. Named as in a checkpoint, of each tensor what this rank has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/transformer.h"
#include "train/optimizer.h"

namespace hadal::train {

/// A tensor of the state, in the order of the file.
struct NamedState {
  StateTensor tensor;       ///< its parts are the memory that steps write
  int64_t unit = 0;         ///< elements that no cut onto ranks divides; the last may be short
  bool everywhere = false;  ///< every rank of its stage has all of it
};

std::vector<NamedState> named_state(model::Transformer& model, const Optimizer& optimizer);

/// Bytes of all parts that this rank has.
int64_t state_bytes(const std::vector<NamedState>& state);

/// The state as it was: nothing in it is memory that a step writes. In plain memory, which
/// ops::tensor_bytes does not count.
class StateCopy {
 public:
  StateCopy() = default;
  explicit StateCopy(std::vector<NamedState> state);

  /// As named_state gave them, their parts flat CPU tensors in this object's memory.
  const std::vector<NamedState>& tensors() const { return tensors_; }

 private:
  std::vector<NamedState> tensors_;
  std::unique_ptr<std::byte[]> memory_;
};

/// Elements [begin, end) of a tensor that have one checksum.
struct CheckedBlock {
  int64_t begin, end;
};
/// Blocks of at most kCheckedElements that lie inside units: the same on any number of ranks.
inline constexpr int64_t kCheckedElements = int64_t{1} << 20;
std::vector<CheckedBlock> checked_blocks(int64_t elements, int64_t unit);

/// The checksum of a tensor from those of its blocks.
uint64_t joined_checksum(std::span<const uint64_t> blocks);

}  // namespace hadal::train
