#include "model/row_part.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "ops/sum_tree.h"
#include "ops/tensor_sums.h"

namespace hadal::model {
namespace {

bool is_part_length(int64_t length) {
  return length > 0 && length % ops::kSumChunk == 0 &&
         std::has_single_bit(static_cast<uint64_t>(length / ops::kSumChunk));
}

/// The runs of samples within [begin, end) of a row.
ops::Batch runs_of(const std::vector<int64_t>& sample_lengths, int64_t begin, int64_t end) {
  std::vector<int64_t> lengths, starts;
  int64_t first = 0;
  for (const int64_t length : sample_lengths) {
    const int64_t from = std::max(begin, first), to = std::min(end, first + length);
    if (from < to) {
      lengths.push_back(to - from);
      starts.push_back(from - first);
    }
    first += length;
  }
  return {std::move(lengths), std::move(starts), at::kCPU};
}

}  // namespace

void check_context(const ModelConfig& config, int64_t row_length, int64_t members) {
  if (members == 1) return;
  const std::string where = concat("context ", members, ": ");
  HADAL_INPUT_CHECK(members > 1, where, "expected at least 1");
  HADAL_INPUT_CHECK(row_length % members == 0 && is_part_length(row_length / members), where,
                    "row_length must be ", members, " parts of ", ops::kSumChunk,
                    " tokens times a power of two, found ", row_length);
  HADAL_INPUT_CHECK(config.hc_mult == 4, where, "hc_mult must be 4, found ", config.hc_mult);
  HADAL_INPUT_CHECK(config.window_size <= kHaloRows + 1, where, "sliding_window must be at most ",
                    kHaloRows + 1, ", found ", config.window_size);
  for (const int64_t ratio : config.compress_ratios) {
    if (ratio == 0) continue;
    HADAL_INPUT_CHECK(kHaloRows % ratio == 0 && ModelConfig::overlap(ratio) * ratio <= kHaloRows,
                      where, "compress_ratios must divide ", kHaloRows, ", found ", ratio);
  }
}

RowPart::RowPart(std::vector<int64_t> sample_lengths, dist::Group& group)
    : group_(&group),
      row_length_(std::accumulate(sample_lengths.begin(), sample_lengths.end(), int64_t{0})),
      length_(row_length_ / group.size()) {
  HADAL_CHECK(
      length_ * group.size() == row_length_ && (group.size() == 1 || is_part_length(length_)),
      "row part: ", row_length_, " tokens on ", group.size(), " members");
  for (int64_t member = 0; member < group.size(); ++member)
    batches_.push_back(runs_of(sample_lengths, member * length_, (member + 1) * length_));
}

int64_t RowPart::halo(int64_t member) const { return std::min(start(member), kHaloRows); }

int64_t RowPart::shared_blocks(int64_t ratio, int64_t from, int64_t to) const {
  // The sample of `to` began `start` tokens before its part.
  const int64_t sample = to * length_ - start(to);
  const int64_t begin = std::max(from * length_, sample), end = (from + 1) * length_;
  return begin < end ? (end - sample) / ratio - (begin - sample) / ratio : 0;
}

at::Tensor RowPart::sum(const at::Tensor& own) const {
  const at::NoGradGuard no_grad;
  const at::Tensor mine = own.detach().contiguous();
  std::vector<at::Tensor> parts(static_cast<size_t>(members()));
  std::vector<dist::Transfer> transfers;
  for (int64_t member = 0; member < members(); ++member)
    if (member != index()) transfers.push_back(group_->send(mine, member));
  for (int64_t member = 0; member < members(); ++member) {
    at::Tensor& part = parts[static_cast<size_t>(member)];
    part = member == index() ? mine.clone() : at::empty_like(mine);
    if (member != index()) transfers.push_back(group_->receive(part, member));
  }
  for (dist::Transfer& transfer : transfers) transfer.wait();
  std::vector<uint64_t> numbers(parts.size());
  std::iota(numbers.begin(), numbers.end(), uint64_t{0});
  return ops::sum_by_number(numbers, std::move(parts));
}

}  // namespace hadal::model
