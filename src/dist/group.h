// Some of a run's ranks, as one axis of its mesh sees them.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "dist/ranks.h"

namespace hadal::dist {

/// Which traffic between two ranks belongs together: each axis counts its messages for itself.
enum class Axis { kPipeline = 1, kData, kContext, kExpert };

/// Members are numbered 0 to size() - 1. The k-th send to a member meets its k-th receive from this
/// one, on the same axis, whatever the other members do. Not to be used by two threads at a time.
class Group {
 public:
  /// A group of one.
  Group() = default;
  /// `members`: ranks in order, this one among them. `ranks` must outlive the group.
  Group(Ranks& ranks, std::vector<int64_t> members, Axis axis);

  int64_t size() const { return static_cast<int64_t>(members_.size()); }
  int64_t index() const { return index_; }
  int64_t rank_of(int64_t index) const { return members_[static_cast<size_t>(index)]; }

  /// Contiguous tensors, of one shape and type on both sides. Those without elements are not sent.
  Transfer send(const at::Tensor& tensor, int64_t to);
  Transfer receive(const at::Tensor& tensor, int64_t from);

 private:
  int tag(int64_t& count) const;

  Ranks* ranks_ = nullptr;
  std::vector<int64_t> members_ = {0};
  int64_t index_ = 0;
  Axis axis_ = Axis::kData;
  std::vector<int64_t> sent_ = {0}, received_ = {0};  ///< messages so far, by member
};

}  // namespace hadal::dist
