#include "engine_core/prefix/page_pool.h"

#include <algorithm>

#include "base/check.h"

namespace hadal::engine_core {
namespace {

// Descending, so that the first pages handed out are the lowest numbers.
std::vector<int64_t> descending(int64_t count) {
  HADAL_CHECK(count >= 0, "page_pool: negative size ", count);
  std::vector<int64_t> numbers(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) numbers[static_cast<size_t>(i)] = count - 1 - i;
  return numbers;
}

}  // namespace

PagePool::PagePool(int64_t num_pages)
    : references_(static_cast<size_t>(num_pages)),
      in_tree_(static_cast<size_t>(num_pages)),
      free_(descending(num_pages)) {}

bool PagePool::cached(int64_t page) const {
  const auto at = static_cast<size_t>(page);
  return in_tree_[at] != 0 && references_[at] == 1;
}

std::optional<int64_t> PagePool::allocate() {
  if (free_.empty()) return std::nullopt;
  const int64_t page = free_.back();
  free_.pop_back();
  references_[static_cast<size_t>(page)] = 1;
  return page;
}

int64_t PagePool::references(int64_t page) const {
  HADAL_CHECK(page >= 0 && page < num_pages(), "page_pool: no page ", page);
  return references_[static_cast<size_t>(page)];
}

bool PagePool::in_tree(int64_t page) const {
  return references(page) > 0 && in_tree_[static_cast<size_t>(page)] != 0;
}

void PagePool::share(int64_t page) {
  HADAL_CHECK(references(page) > 0, "page_pool: page ", page, " is free");
  if (cached(page)) --num_cached_;
  ++references_[static_cast<size_t>(page)];
}

void PagePool::release(int64_t page) {
  HADAL_CHECK(references(page) > 0, "page_pool: page ", page, " is free");
  HADAL_CHECK(!cached(page), "page_pool: page ", page, " is the tree's");
  const int64_t left = --references_[static_cast<size_t>(page)];
  if (left == 0) free_.push_back(page);
  if (cached(page)) ++num_cached_;
}

void PagePool::share_with_tree(int64_t page) {
  HADAL_CHECK(references(page) > 0 && !in_tree(page), "page_pool: page ", page,
              " is free or the tree's");
  in_tree_[static_cast<size_t>(page)] = 1;
  ++references_[static_cast<size_t>(page)];
}

void PagePool::release_from_tree(int64_t page) {
  HADAL_CHECK(in_tree(page), "page_pool: page ", page, " is not the tree's");
  if (cached(page)) --num_cached_;
  in_tree_[static_cast<size_t>(page)] = 0;
  if (--references_[static_cast<size_t>(page)] == 0) free_.push_back(page);
}

void PagePool::check_integrity(std::span<const int64_t> expected) const {
  HADAL_CHECK(static_cast<int64_t>(expected.size()) == num_pages(), "page_pool: ", expected.size(),
              " counts for ", num_pages(), " pages");
  std::vector<uint8_t> is_free(references_.size());
  for (const int64_t page : free_) {
    HADAL_CHECK(page >= 0 && page < num_pages(), "page_pool: free list holds ", page);
    HADAL_CHECK(is_free[static_cast<size_t>(page)] == 0, "page_pool: page ", page, " freed twice");
    is_free[static_cast<size_t>(page)] = 1;
  }
  int64_t num_cached = 0;
  for (int64_t page = 0; page < num_pages(); ++page) {
    const auto at = static_cast<size_t>(page);
    HADAL_CHECK(references_[at] == expected[at], "page_pool: page ", page, " has ", references_[at],
                " references, its holders are ", expected[at]);
    HADAL_CHECK((references_[at] == 0) == (is_free[at] != 0), "page_pool: page ", page, " has ",
                references_[at], " references and is ", is_free[at] != 0 ? "free" : "not free");
    num_cached += cached(page) ? 1 : 0;
  }
  HADAL_CHECK(num_cached == num_cached_, "page_pool: ", num_cached, " cached pages, counted ",
              num_cached_);
}

SlotPool::SlotPool(int64_t num_slots)
    : used_(static_cast<size_t>(num_slots)), free_(descending(num_slots)) {}

std::optional<int64_t> SlotPool::allocate() {
  if (free_.empty()) return std::nullopt;
  const int64_t slot = free_.back();
  free_.pop_back();
  used_[static_cast<size_t>(slot)] = 1;
  return slot;
}

void SlotPool::release(int64_t slot) {
  HADAL_CHECK(slot >= 0 && slot < num_slots() && used_[static_cast<size_t>(slot)] != 0,
              "slot_pool: slot ", slot, " is not in use");
  used_[static_cast<size_t>(slot)] = 0;
  free_.push_back(slot);
}

void SlotPool::check_integrity(std::span<const int64_t> held) const {
  std::vector<uint8_t> used(used_.size());
  for (const int64_t slot : held) {
    HADAL_CHECK(slot >= 0 && slot < num_slots(), "slot_pool: no slot ", slot);
    HADAL_CHECK(used[static_cast<size_t>(slot)] == 0, "slot_pool: slot ", slot, " held twice");
    used[static_cast<size_t>(slot)] = 1;
  }
  HADAL_CHECK(used == used_, "slot_pool: the slots in use are not those held");
  std::vector<uint8_t> is_free(used_.size());
  for (const int64_t slot : free_) {
    HADAL_CHECK(slot >= 0 && slot < num_slots() && is_free[static_cast<size_t>(slot)] == 0 &&
                    used[static_cast<size_t>(slot)] == 0,
                "slot_pool: free list holds ", slot, " wrongly");
    is_free[static_cast<size_t>(slot)] = 1;
  }
  HADAL_CHECK(free_.size() + held.size() == used_.size(), "slot_pool: ", free_.size(), " free and ",
              held.size(), " held of ", used_.size());
}

}  // namespace hadal::engine_core
