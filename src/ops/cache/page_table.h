// Which pages of the cache hold the sequence in each slot, at one address from step to step. Only
// entries that changed are written: a context of a million tokens is thousands of pages, of which a
// step adds one at most.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hadal::ops {

class PageTable {
 public:
  PageTable() = default;
  /// Lines of `max_pages` entries for `num_slots` slots, whose pages are below `num_pages`. Memory
  /// is taken where it is first written.
  PageTable(int64_t num_slots, int64_t max_pages, int64_t num_pages, at::Device device);

  /// The line of a slot begins with `pages`; what stands behind them stays. Returns how many
  /// entries changed. Errors: Error for a page or slot that is not there, or too many pages; the
  /// line is then as before.
  int64_t update(int64_t slot, std::span<const int64_t> pages);
  /// What update() changed reaches the device; nothing where the table is the host's own.
  void upload();

  int64_t max_pages() const { return max_pages_; }
  int64_t num_pages() const { return num_pages_; }
  /// Page number `index` of a slot.
  int64_t page(int64_t slot, int64_t index) const {
    return host_.const_data_ptr<int32_t>()[slot * max_pages_ + index];
  }
  /// [num_slots, max_pages] I32 on the device.
  const at::Tensor& table() const { return device_; }

 private:
  struct Change {
    int64_t slot, first, count;
  };
  int64_t max_pages_ = 0, num_slots_ = 0, num_pages_ = 0;
  at::Tensor host_, device_;  // the same on the CPU
  std::vector<Change> changes_;
};

}  // namespace hadal::ops
