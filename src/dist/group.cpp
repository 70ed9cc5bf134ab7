#include "dist/group.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace hadal::dist {
namespace {

/// Below the axis; so many messages of one axis are never under way between two ranks.
constexpr int kCountBits = 24;

}  // namespace

Group::Group(Ranks& ranks, std::vector<int64_t> members, Axis axis)
    : ranks_(&ranks), members_(std::move(members)), axis_(axis) {
  const auto own = std::find(members_.begin(), members_.end(), ranks.rank());
  HADAL_CHECK(own != members_.end(), "group: rank ", ranks.rank(), " is no member");
  index_ = own - members_.begin();
  sent_.assign(members_.size(), 0);
  received_.assign(members_.size(), 0);
}

int Group::tag(int64_t& count) const {
  const int64_t low = count++ & ((int64_t{1} << kCountBits) - 1);
  return static_cast<int>(static_cast<int64_t>(axis_) << kCountBits | low);
}

Transfer Group::send(const at::Tensor& tensor, int64_t to) {
  if (tensor.numel() == 0) return {};
  return ranks_->send(tensor, rank_of(to), tag(sent_[static_cast<size_t>(to)]));
}

Transfer Group::receive(const at::Tensor& tensor, int64_t from) {
  if (tensor.numel() == 0) return {};
  return ranks_->receive(tensor, rank_of(from), tag(received_[static_cast<size_t>(from)]));
}

}  // namespace hadal::dist
