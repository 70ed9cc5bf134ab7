// Who holds which page and which state slot: numbers and reference counts, no bytes.
//
// PagePool counts the references of each logical page: one for every sequence that has it in its
// page table and one for the prefix tree. A page the tree alone holds is "cached": it can be had by
// evicting. SlotPool hands out state slots, one to a sequence. What was freed last is handed out
// first. One thread. Errors: Error for a page or slot that is not in use.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace hadal::engine_core {

class PagePool {
 public:
  explicit PagePool(int64_t num_pages);

  /// A page with one reference, or nothing when none is free.
  std::optional<int64_t> allocate();
  /// One more reference.
  void share(int64_t page);
  /// One reference less; the last one frees the page.
  void release(int64_t page);
  /// The tree takes (or gives up) one reference of its own.
  void share_with_tree(int64_t page);
  void release_from_tree(int64_t page);

  int64_t references(int64_t page) const;
  bool in_tree(int64_t page) const;
  int64_t num_pages() const { return static_cast<int64_t>(references_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_in_use() const { return num_pages() - num_free(); }
  /// Held by the tree alone.
  int64_t num_cached() const { return num_cached_; }

  /// `expected[page]` references, tree included, and a free list of exactly the pages without any.
  /// Errors: Error naming the first page that differs.
  void check_integrity(std::span<const int64_t> expected) const;

 private:
  bool cached(int64_t page) const;

  std::vector<int64_t> references_;  ///< [num_pages]
  std::vector<uint8_t> in_tree_;     ///< [num_pages]
  std::vector<int64_t> free_;
  int64_t num_cached_ = 0;
};

class SlotPool {
 public:
  explicit SlotPool(int64_t num_slots);

  std::optional<int64_t> allocate();
  void release(int64_t slot);

  int64_t num_slots() const { return static_cast<int64_t>(used_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }

  /// The slots in use are exactly `held`. Errors: Error naming the first that differs.
  void check_integrity(std::span<const int64_t> held) const;

 private:
  std::vector<uint8_t> used_;  ///< [num_slots]
  std::vector<int64_t> free_;
};

}  // namespace hadal::engine_core
