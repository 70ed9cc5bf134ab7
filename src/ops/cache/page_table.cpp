#include "ops/cache/page_table.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/cache/lazy_memory.h"

namespace hadal::ops {

PageTable::PageTable(int64_t num_slots, int64_t max_pages, int64_t num_pages, at::Device device)
    : max_pages_(max_pages), num_slots_(num_slots), num_pages_(num_pages) {
  HADAL_CHECK(num_slots >= 1 && max_pages >= 1 && num_pages >= 1 && num_pages <= INT32_MAX,
              "page_table: ", num_slots, " slots of ", max_pages, " out of ", num_pages, " pages");
  host_ = lazy_zeros(num_slots, max_pages, at::kInt);
  device_ = device.is_cpu() ? host_ : at::zeros({num_slots, max_pages}, at::kInt).to(device);
}

int64_t PageTable::update(int64_t slot, std::span<const int64_t> pages) {
  const int64_t count = std::ssize(pages);
  HADAL_CHECK(slot >= 0 && slot < num_slots_ && count <= max_pages_, "page_table: ", count,
              " pages for slot ", slot, ", room is for ", max_pages_, " in each of ", num_slots_);
  int32_t* line = host_.mutable_data_ptr<int32_t>() + slot * max_pages_;
  // Nearly always everything is as it was: one look without a branch.
  int64_t different = 0;
  for (int64_t i = 0; i < count; ++i) different += line[i] != pages[static_cast<size_t>(i)];
  if (different == 0) return 0;
  for (const int64_t page : pages)
    HADAL_CHECK(page >= 0 && page < num_pages_, "page_table: page ", page, " of ", num_pages_);
  int64_t first = count, last = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto page = static_cast<int32_t>(pages[static_cast<size_t>(i)]);
    if (line[i] == page) continue;
    line[i] = page;
    first = std::min(first, i);
    last = i;
  }
  if (!device_.is_cpu()) changes_.push_back({slot, first, last - first + 1});
  return different;
}

void PageTable::upload() {
  for (const Change& change : changes_)
    device_[change.slot]
        .narrow(0, change.first, change.count)
        .copy_(host_[change.slot].narrow(0, change.first, change.count));
  changes_.clear();
}

}  // namespace hadal::ops
