#include "ops/cache/batch.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::ops {
namespace {

at::Tensor upload(const std::vector<int64_t>& values, at::Device device) {
  at::Tensor host = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), host.data_ptr<int64_t>());
  return host.to(device);
}

}  // namespace

Batch::Batch(std::vector<int64_t> lengths, std::vector<int64_t> starts, at::Device device)
    : starts_(std::move(starts)) {
  HADAL_CHECK(!lengths.empty() && lengths.size() == starts_.size(), "batch: ", lengths.size(),
              " lengths for ", starts_.size(), " starts");
  cu_seqlens_.push_back(0);
  std::vector<int64_t> seq;
  for (size_t s = 0; s < lengths.size(); ++s) {
    HADAL_CHECK(lengths[s] >= 1 && starts_[s] >= 0, "batch: sequence ", s, " has length ",
                lengths[s], " from position ", starts_[s]);
    cu_seqlens_.push_back(cu_seqlens_.back() + lengths[s]);
    max_end_pos_ = std::max(max_end_pos_, starts_[s] + lengths[s]);
    for (int64_t t = 0; t < lengths[s]; ++t) {
      host_pos_.push_back(starts_[s] + t);
      seq.push_back(static_cast<int64_t>(s));
    }
  }
  pos_ = upload(host_pos_, device);
  seq_ = upload(seq, device);
}

const BlockPlan& Batch::blocks(int64_t ratio) const {
  HADAL_CHECK(ratio > 0, "batch: blocks of ratio ", ratio);
  auto found = plans_.find(ratio);
  if (found != plans_.end()) return found->second;
  BlockPlan plan;
  plan.ratio = ratio;
  plan.cu_blocks.push_back(0);
  std::vector<int64_t> block_pos, previous;
  bool inside = true;
  for (int64_t s = 0; s < num_seqs(); ++s) {
    const int64_t first = start(s) / ratio, last = (start(s) + length(s)) / ratio;
    plan.first_block.push_back(first);
    plan.cu_blocks.push_back(plan.cu_blocks.back() + last - first);
    for (int64_t block = first; block < last; ++block) {
      previous.push_back(block == first ? s
                                        : num_seqs() + static_cast<int64_t>(block_pos.size()) - 1);
      block_pos.push_back(block * ratio);
      for (int64_t pos = block * ratio; pos < (block + 1) * ratio; ++pos) {
        plan.rows.push_back(pos >= start(s) ? begin(s) + pos - start(s) : -1 - pos);
        inside &= pos >= start(s);
      }
    }
    if (last > first) plan.max_pos = std::max(plan.max_pos, (last - 1) * ratio);
  }
  plan.pos = upload(block_pos, pos_.device());
  plan.previous = upload(previous, pos_.device());
  plan.device_cu_blocks = upload(plan.cu_blocks, pos_.device()).to(at::kInt);
  if (inside) plan.device_rows = upload(plan.rows, pos_.device());
  return plans_.emplace(ratio, std::move(plan)).first->second;
}

bool Batch::whole() const {
  return std::all_of(starts_.begin(), starts_.end(), [](int64_t start) { return start == 0; });
}

const at::Tensor& Batch::device_cu_seqlens() const {
  if (!device_cu_seqlens_.defined()) {
    device_cu_seqlens_ = upload(cu_seqlens_, pos_.device()).to(at::kInt);
  }
  return device_cu_seqlens_;
}

const at::Tensor& Batch::token_tiles(int64_t size) const {
  at::Tensor& tiles = token_tiles_[size];
  if (!tiles.defined()) {
    std::vector<int64_t> flat;
    for (int64_t seq = 0; seq < num_seqs(); ++seq) {
      for (int64_t token = 0; token < length(seq); token += size) {
        flat.insert(flat.end(), {begin(seq) + token, std::min(size, length(seq) - token),
                                 start(seq) + token, seq});
      }
    }
    tiles = upload(flat, pos_.device()).to(at::kInt).reshape({-1, 4});
  }
  return tiles;
}

const at::Tensor& Batch::key_tiles(int64_t size, int64_t ratio) const {
  at::Tensor& tiles = key_tiles_[{size, ratio}];
  if (!tiles.defined()) {
    std::vector<int64_t> flat;
    if (ratio > 0) {
      // Blocks first: the early ones are seen by the most queries, so the longest work starts
      // first.
      const BlockPlan& plan = blocks(ratio);
      for (int64_t seq = 0; seq < num_seqs(); ++seq) {
        const int64_t first = plan.cu_blocks[static_cast<size_t>(seq)];
        const int64_t count = plan.cu_blocks[static_cast<size_t>(seq) + 1] - first;
        for (int64_t block = 0; block < count; block += size) {
          flat.insert(flat.end(), {1, block, first + block, seq});
        }
      }
    }
    for (int64_t seq = 0; seq < num_seqs(); ++seq) {
      for (int64_t token = 0; token < length(seq); token += size) {
        flat.insert(flat.end(), {0, token, begin(seq) + token, seq});
      }
    }
    tiles = upload(flat, pos_.device()).to(at::kInt).reshape({-1, 4});
  }
  return tiles;
}

at::Tensor BlockView::gather(int64_t seq, int64_t from, int64_t to) const {
  if (from / page_blocks == (to - 1) / page_blocks)
    return dense_rows(rows.narrow(0, row(seq, from), to - from), format);
  std::vector<int64_t> numbers;
  for (int64_t block = from; block < to; ++block) numbers.push_back(row(seq, block));
  return dense_rows(rows.index_select(0, upload(numbers, rows.device())), format);
}

}  // namespace hadal::ops
