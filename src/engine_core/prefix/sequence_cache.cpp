#include "engine_core/prefix/sequence_cache.h"

#include <algorithm>
#include <exception>

#include "base/check.h"
#include "base/log.h"
#include "base/math.h"

namespace hadal::engine_core {
namespace {

/// Pages saved at once besides those since the last snapshot: what a store refused before.
constexpr int64_t kLateSaves = 8;

}  // namespace

SequenceCache::SequenceCache(CacheMemory& memory,
                             Runner& runner,
                             const Options& options,
                             PrefixStore* store)
    : memory_(memory),
      runner_(runner),
      store_(store),
      page_tokens_(memory.page_tokens()),
      snapshot_interval_(options.snapshot_interval == 0 ? page_tokens_ : options.snapshot_interval),
      keeps_windows_(store != nullptr && store->policy() == WindowPolicy::kFull),
      pages_(memory.num_pages()),
      slots_(memory.num_slots()),
      tree_(page_tokens_, pages_),
      scratch_(static_cast<size_t>(align_up(memory.state_bytes(), memory.page_bytes()))),
      unsaved_(static_cast<size_t>(memory.num_pages())) {
  HADAL_CHECK(snapshot_interval_ > 0 && snapshot_interval_ % page_tokens_ == 0,
              "sequence_cache: snapshots every ", snapshot_interval_, " tokens, pages of ",
              page_tokens_);
  HADAL_CHECK(!keeps_windows_ || memory.window_bytes() > 0,
              "sequence_cache: the store keeps all windows, the memory does not hold them");
  HADAL_CHECK(store == nullptr || store->page_tokens() == page_tokens_, "sequence_cache: pages of ",
              page_tokens_, " tokens, not those of the store");
}

int64_t SequenceCache::next_kept(int64_t pos) const {
  const int64_t interval = keeps_windows_ ? page_tokens_ : snapshot_interval_;
  return (pos / interval + 1) * interval;
}

int64_t SequenceCache::num_pages_for(int64_t num_tokens) const {
  return ceil_div(num_tokens, page_tokens_);
}

PrefixMatch SequenceCache::match(std::span<const int64_t> tokens, bool use_tree) {
  if (use_tree) return tree_.match(tokens, static_cast<int64_t>(tokens.size()) - 1);
  PrefixMatch none;
  none.miss = "off";
  return none;
}

int64_t SequenceCache::pages_taken(const PrefixMatch& match, int64_t num_tokens) const {
  int64_t live = 0;  // shared with a running sequence: they cost nothing
  for (int64_t page = 0; page < match.pos / page_tokens_; ++page) {
    live += pages_.references(match.pages[static_cast<size_t>(page)]) > 1 ? 1 : 0;
  }
  return num_pages_for(num_tokens) - live;
}

std::optional<int64_t> SequenceCache::allocate() {
  for (;;) {
    if (const std::optional<int64_t> page = pages_.allocate()) {
      unsaved_[static_cast<size_t>(*page)] = 1;
      return page;
    }
    if (!tree_.evict()) return std::nullopt;
  }
}

bool SequenceCache::open(std::span<const int64_t> tokens,
                         const PrefixMatch& match,
                         bool use_tree,
                         CachedSequence& sequence,
                         Opened& opened,
                         const CacheKey* key) {
  HADAL_CHECK(sequence.slot < 0, "sequence_cache: opened twice");
  const std::optional<int64_t> slot = slots_.allocate();
  if (!slot) return false;
  if (key != nullptr && key->name.empty()) key = nullptr;
  sequence = {.slot = *slot, .pages = {}, .pos = 0, .use_tree = use_tree, .key = key};
  opened = {.cached_tokens = match.pos, .disk_tokens = 0, .miss = match.miss};
  const auto now = PrefixPins::Clock::now();
  tree_.expire_pins(now);
  if (use_tree) tree_.use(match);
  if (use_tree && key != nullptr) tree_.use_pinned(*key, match, now);
  take_match(match, sequence);
  if (use_tree && store_ != nullptr) begin_load(tokens, match, sequence, opened);
  return true;
}

// The sequence goes on where memory lets it.
void SequenceCache::take_match(const PrefixMatch& match, CachedSequence& sequence) {
  if (match.pos == 0) return;  // a step at position 0 begins with a new state
  std::vector<int64_t> pages(
      match.pages.begin(),
      match.pages.begin() + static_cast<std::ptrdiff_t>(match.pos / page_tokens_));
  if (match.tail_page >= 0) pages.push_back(match.tail_page);
  for (const int64_t page : pages) pages_.share(page);
  for (const int64_t page : sequence.pages) pages_.release(page);
  sequence.pages = std::move(pages);
  const std::span<std::byte> state = state_bytes(match.pos);
  for (size_t i = 0; i < match.snapshot.size(); ++i)
    memory_.read_page(match.snapshot[i], scratch_page(i));
  memory_.load_snapshot(sequence.slot, match.pos, state);
  sequence.pos = match.pos;
}

// Room for the state at `pos`, in a buffer of whole pages.
std::span<std::byte> SequenceCache::state_bytes(int64_t pos) {
  const auto needed = static_cast<size_t>(snapshot_pages(pos) * memory_.page_bytes());
  if (scratch_.size() < needed) scratch_.resize(needed);
  return std::span(scratch_).first(static_cast<size_t>(memory_.snapshot_bytes(pos)));
}

std::span<std::byte> SequenceCache::scratch_page(size_t number) {
  const auto size = static_cast<size_t>(memory_.page_bytes());
  return std::span(scratch_).subspan(number * size, size);
}

int64_t SequenceCache::snapshot_pages(int64_t pos) const {
  return ceil_div(memory_.snapshot_bytes(pos), memory_.page_bytes());
}

// The state at the end of `prefix`, whose full pages are known, goes into pages of its own unless
// what would have to go is worth more. `save`: it is asked for whatever happens. Its bytes, or
// none.
std::span<const std::byte> SequenceCache::keep_state(const CachedSequence& sequence,
                                                     std::span<const int64_t> prefix,
                                                     StateKind kind,
                                                     bool save) {
  const int64_t count = snapshot_pages(std::ssize(prefix));
  const bool pinned = sequence.key != nullptr && kind != StateKind::kPage;
  const bool room = tree_.make_room(prefix, kind, count, pinned);
  if (!room && !save) return {};
  const std::span<std::byte> state = state_bytes(std::ssize(prefix));
  memory_.save_snapshot(sequence.slot, std::ssize(prefix), state);
  if (!room) return state;
  std::vector<int64_t> pages;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    pages.push_back(pages_.allocate().value());
    memory_.write_page(pages.back(), scratch_page(i));
  }
  tree_.keep_state(prefix, sequence.pages, pages, kind);
  return state;
}

void SequenceCache::begin_load(std::span<const int64_t> tokens,
                               const PrefixMatch& match,
                               CachedSequence& sequence,
                               Opened& opened) {
  const int64_t max_pos = std::ssize(tokens) - 1, first = sequence.pos / page_tokens_;
  const int64_t num_known = std::max(first, std::ssize(match.pages));
  Load load{.tokens = tokens, .id = ++last_load_};
  try {
    if (max_pos / page_tokens_ * page_tokens_ <= sequence.pos) {
      if (first > 0) store_->touch(tokens.first(static_cast<size_t>(sequence.pos)));
      return;
    }
    load.leader = find_leader(tokens, num_known);
    if (load.leader.second == 0) load.reader = store_->begin_load(tokens, num_known, max_pos);
  } catch (const std::exception& error) {
    log::warn("engine", "prefix store: ", error.what());
    ++counters_.disk_errors;
    opened.miss = "disk error";
    return;
  }
  if (load.reader) {
    // Held, so that making room does not evict them.
    for (int64_t page = first; page < std::ssize(match.pages); ++page) {
      sequence.loaded.push_back(match.pages[static_cast<size_t>(page)]);
      pages_.share(sequence.loaded.back());
    }
  }
  loads_.emplace(sequence.slot, std::move(load));
}

// A load that brings so many of the pages missing here that it pays to wait for its end: at least
// half of its own. Id 0: none.
std::pair<int64_t, uint64_t> SequenceCache::find_leader(std::span<const int64_t> tokens,
                                                        int64_t num_known) const {
  for (const auto& [slot, load] : loads_) {
    if (!load.reader) continue;
    const auto differ = std::ranges::mismatch(load.tokens, tokens).in2;
    const int64_t shared = (differ - tokens.begin()) / page_tokens_ - num_known;
    const int64_t all = (std::ssize(load.tokens) - 1) / page_tokens_ - num_known;
    if (shared > 0 && 2 * shared >= all) return {slot, load.id};
  }
  return {-1, 0};
}

bool SequenceCache::follows(const CachedSequence& sequence) const {
  const auto load = loads_.find(sequence.slot);
  if (load == loads_.end() || load->second.reader) return false;
  const auto leader = loads_.find(load->second.leader.first);
  return leader != loads_.end() && leader->second.id == load->second.leader.second;
}

bool SequenceCache::load(CachedSequence& sequence,
                         std::span<const int64_t> tokens,
                         int64_t max_pages,
                         Opened& opened) {
  Load& load = loads_.at(sequence.slot);
  if (!load.reader) {
    if (follows(sequence)) return false;
    end_load(sequence);
    const PrefixMatch match = tree_.match(tokens, std::ssize(tokens) - 1);
    if (match.pos > sequence.pos) {
      tree_.use(match);
      take_match(match, sequence);
    }
    opened = {.cached_tokens = sequence.pos, .disk_tokens = 0, .miss = match.miss};
    begin_load(tokens, match, sequence, opened);
    return false;
  }
  if (!load.found) {
    std::vector<std::vector<std::byte>> pages;
    try {
      const bool more = load.reader->advance(max_pages, pages);
      if (take_pages(sequence, pages) && more) return false;
      if (!more) load.found = load.reader->take_result();
    } catch (const std::exception& error) {
      log::warn("engine", "prefix store: ", error.what());
      ++counters_.disk_errors;
      opened.miss = "disk error";
      end_load(sequence);
      return false;
    }
    if (!load.found || !accept(sequence, std::ssize(tokens), *load.found)) {
      ++counters_.disk_misses;
      end_load(sequence);
      return false;
    }
    if (load.found->pos <= sequence.pos) {
      end_load(sequence);
      return false;
    }
    load.rebuilt = runner_.rebuild_start(load.found->pos);
  }
  const bool runs = load.found->snapshot.empty() && load.found->windows.empty();
  if (make_state(sequence, tokens)) finish_load(sequence, tokens, opened);
  return runs;
}

// Whether it is what a store should give: pages that were loaded, and a state.
bool SequenceCache::accept(const CachedSequence& sequence,
                           int64_t size,
                           const StoredPrefix& stored) const {
  const int64_t num_pages = sequence.pos / page_tokens_ + std::ssize(sequence.loaded);
  return stored.pos > 0 && stored.pos < size && stored.pos % page_tokens_ == 0 &&
         stored.pos / page_tokens_ <= num_pages && has_state(stored);
}

// False when they are no pages of this memory, or when it has no room for them.
bool SequenceCache::take_pages(CachedSequence& sequence,
                               const std::vector<std::vector<std::byte>>& pages) {
  for (const std::vector<std::byte>& bytes : pages) {
    if (static_cast<int64_t>(bytes.size()) != memory_.page_bytes()) return false;
    const std::optional<int64_t> page = allocate();
    if (!page) return false;
    memory_.write_page(*page, bytes);
    unsaved_[static_cast<size_t>(*page)] = 0;
    sequence.loaded.push_back(*page);
  }
  return true;
}

bool SequenceCache::has_state(const StoredPrefix& stored) const {
  if (!stored.snapshot.empty())
    return static_cast<int64_t>(stored.snapshot.size()) == memory_.snapshot_bytes(stored.pos);
  if (stored.windows.empty()) return runner_.can_rebuild();
  const int64_t needed = std::min(memory_.window_pages(), stored.pos / page_tokens_);
  return static_cast<int64_t>(stored.windows.size()) == needed &&
         std::ranges::all_of(stored.windows, [&](const std::vector<std::byte>& window) {
           return static_cast<int64_t>(window.size()) == memory_.window_bytes();
         });
}

// The state at what was found goes into the slot. False: only a part of it yet.
bool SequenceCache::make_state(const CachedSequence& sequence, std::span<const int64_t> tokens) {
  Load& load = loads_.at(sequence.slot);
  const StoredPrefix& stored = *load.found;
  if (!stored.snapshot.empty()) {
    memory_.load_snapshot(sequence.slot, stored.pos, stored.snapshot);
    return true;
  }
  int64_t pos = stored.pos - std::ssize(stored.windows) * page_tokens_;
  for (const std::vector<std::byte>& window : stored.windows) {
    pos += page_tokens_;
    memory_.load_window(sequence.slot, pos, window);
  }
  if (!stored.windows.empty()) return true;
  std::vector<int64_t> pages(
      sequence.pages.begin(),
      sequence.pages.begin() + static_cast<std::ptrdiff_t>(sequence.pos / page_tokens_));
  pages.insert(pages.end(), sequence.loaded.begin(), sequence.loaded.end());
  pages.resize(static_cast<size_t>(stored.pos / page_tokens_));
  const int64_t count = std::min(page_tokens_, stored.pos - load.rebuilt);
  runner_.rebuild(sequence.slot, tokens.first(static_cast<size_t>(stored.pos)), pages, load.rebuilt,
                  count);
  load.rebuilt += count;
  return load.rebuilt == stored.pos;
}

// What was loaded takes the place of what memory had.
void SequenceCache::finish_load(CachedSequence& sequence,
                                std::span<const int64_t> tokens,
                                Opened& opened) {
  StoredPrefix stored = *std::move(loads_.at(sequence.slot).found);
  const int64_t first = sequence.pos / page_tokens_, num_loaded = stored.pos / page_tokens_ - first;
  opened.cached_tokens = stored.pos;
  opened.disk_tokens = stored.pos - sequence.pos;
  opened.miss = "none";
  ++counters_.disk_hits;
  while (static_cast<int64_t>(sequence.pages.size()) > first) {
    pages_.release(sequence.pages.back());
    sequence.pages.pop_back();
  }
  const auto used = sequence.loaded.begin() + static_cast<std::ptrdiff_t>(num_loaded);
  sequence.pages.insert(sequence.pages.end(), sequence.loaded.begin(), used);
  sequence.loaded.erase(sequence.loaded.begin(), used);
  sequence.pos = stored.pos;
  end_load(sequence);
  const auto prefix = tokens.first(static_cast<size_t>(stored.pos));
  tree_.insert(prefix, sequence.pages);
  if (!tree_.has_state(prefix)) keep_state(sequence, prefix, StateKind::kPage, false);
}

void SequenceCache::end_load(CachedSequence& sequence) {
  for (auto page = sequence.loaded.rbegin(); page != sequence.loaded.rend(); ++page) {
    pages_.release(*page);
  }
  sequence.loaded.clear();
  loads_.erase(sequence.slot);
}

// The page that position pos lies in is written next: it must have no other reader.
bool SequenceCache::own_last_page(CachedSequence& sequence) {
  const auto at = static_cast<size_t>(sequence.pos / page_tokens_);
  if (sequence.pos % page_tokens_ == 0 || at >= sequence.pages.size()) return true;
  const int64_t page = sequence.pages[at];
  if (pages_.references(page) == 1) return true;
  if (const std::optional<int64_t> copy = allocate()) {
    memory_.copy_page(page, *copy);
    pages_.release(page);
    sequence.pages[at] = *copy;
    return true;
  }
  if (pages_.references(page) == 2 && pages_.in_tree(page)) tree_.forget_tail(page);
  return pages_.references(page) == 1;
}

bool SequenceCache::reserve(CachedSequence& sequence, int64_t num_tokens) {
  if (num_tokens > sequence.pos && !own_last_page(sequence)) return false;
  while (static_cast<int64_t>(sequence.pages.size()) < num_pages_for(num_tokens)) {
    const std::optional<int64_t> page = allocate();
    if (!page) return false;
    sequence.pages.push_back(*page);
  }
  return true;
}

std::optional<CachedSequence> SequenceCache::fork(const CachedSequence& sequence) {
  HADAL_CHECK(!loads(sequence), "sequence_cache: a fork of what still loads");
  const std::optional<int64_t> slot = slots_.allocate();
  if (!slot) return std::nullopt;
  CachedSequence other = sequence;
  other.slot = *slot;
  other.pages.resize(static_cast<size_t>(num_pages_for(sequence.pos)));
  for (const int64_t page : other.pages) pages_.share(page);
  const std::span<std::byte> state = state_bytes(sequence.pos);
  memory_.save_snapshot(sequence.slot, sequence.pos, state);
  memory_.load_snapshot(other.slot, sequence.pos, state);
  return other;
}

void SequenceCache::publish(CachedSequence& sequence,
                            std::span<const int64_t> tokens,
                            StateKind kind) {
  // While it loads, memory has given it all it has, and the state may be another already.
  if (!sequence.use_tree || sequence.pos == 0 || loads(sequence)) return;
  const auto prefix = tokens.first(static_cast<size_t>(sequence.pos));
  tree_.insert(prefix, sequence.pages);
  const bool stores =
      store_ != nullptr && sequence.pos % page_tokens_ == 0 && store_->wants_snapshot(sequence.pos);
  std::span<const std::byte> state;
  if (!tree_.has_state(prefix)) state = keep_state(sequence, prefix, kind, stores);
  if (sequence.key != nullptr && kind != StateKind::kPage)
    tree_.pin(*sequence.key, prefix, kind == StateKind::kEnd ? Pin::kEnd : Pin::kPrompt,
              PrefixPins::Clock::now());
  if (store_ != nullptr) store_new(sequence, prefix, stores ? state : std::span<const std::byte>());
}

void SequenceCache::store_new(const CachedSequence& sequence,
                              std::span<const int64_t> tokens,
                              std::span<const std::byte> snapshot) {
  try {
    std::vector<std::byte> bytes(static_cast<size_t>(memory_.page_bytes()));
    int64_t left = snapshot_interval_ / page_tokens_ + kLateSaves;
    for (int64_t page = 0; page < sequence.pos / page_tokens_ && left > 0; ++page) {
      const int64_t number = sequence.pages[static_cast<size_t>(page)];
      uint8_t& unsaved = unsaved_[static_cast<size_t>(number)];
      if (unsaved == 0) continue;
      memory_.read_page(number, bytes);
      const auto prefix = tokens.first(static_cast<size_t>((page + 1) * page_tokens_));
      if (!store_->save_page(prefix, bytes)) break;  // later ones are of no use without it
      unsaved = 0;
      --left;
    }
    if (!snapshot.empty()) store_->save_snapshot(tokens, snapshot);
  } catch (const std::exception& error) {
    log::warn("engine", "prefix store: ", error.what());
    ++counters_.disk_errors;
  }
}

void SequenceCache::store_window(const CachedSequence& sequence, std::span<const int64_t> tokens) {
  if (!keeps_windows_ || !sequence.use_tree || sequence.pos == 0 ||
      sequence.pos % page_tokens_ != 0) {
    return;
  }
  try {
    std::vector<std::byte> bytes(static_cast<size_t>(memory_.window_bytes()));
    memory_.save_window(sequence.slot, sequence.pos, bytes);
    store_->save_window(tokens.first(static_cast<size_t>(sequence.pos)), bytes);
  } catch (const std::exception& error) {
    log::warn("engine", "prefix store: ", error.what());
    ++counters_.disk_errors;
  }
}

void SequenceCache::close(CachedSequence& sequence) {
  if (sequence.slot < 0) return;
  end_load(sequence);
  // Last pages first: handed out again in order.
  for (auto page = sequence.pages.rbegin(); page != sequence.pages.rend(); ++page) {
    pages_.release(*page);
  }
  slots_.release(sequence.slot);
  sequence = {};
}

int64_t SequenceCache::book_bytes(int64_t page_tokens) {
  return PrefixTree::node_bytes(page_tokens) + static_cast<int64_t>(2 * sizeof(int64_t) + 2);
}

int64_t SequenceCache::bytes_in_use() const {
  return pages_.num_in_use() * memory_.page_bytes() +
         (slots_.num_slots() - slots_.num_free()) * memory_.state_bytes();
}

void SequenceCache::check_integrity(std::span<const CachedSequence* const> open) const {
  std::vector<int64_t> expected(static_cast<size_t>(pages_.num_pages()));
  std::vector<int64_t> slots;
  for (const CachedSequence* sequence : open) {
    for (const int64_t page : sequence->pages) ++expected.at(static_cast<size_t>(page));
    for (const int64_t page : sequence->loaded) ++expected.at(static_cast<size_t>(page));
    HADAL_CHECK(sequence->loaded.empty() || loads(*sequence), "sequence_cache: nothing loads");
    slots.push_back(sequence->slot);
    HADAL_CHECK(static_cast<int64_t>(sequence->pages.size()) >= num_pages_for(sequence->pos),
                "sequence_cache: ", sequence->pages.size(), " pages for ", sequence->pos,
                " tokens");
  }
  tree_.check_integrity(expected);
  pages_.check_integrity(expected);
  slots_.check_integrity(slots);
}

}  // namespace hadal::engine_core
