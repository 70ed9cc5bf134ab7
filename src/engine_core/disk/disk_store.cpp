#include "engine_core/disk/disk_store.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "engine_core/disk/disk_store_state.h"

namespace hadal::engine_core {
namespace {

using Clock = std::chrono::steady_clock;
using Bytes = std::vector<std::byte>;

/// A page is named and found in the index much faster than it is read.
constexpr int64_t kLookupsPerRead = 64;
constexpr size_t kKeyBytes = 1 + sizeof(PrefixDigest);
constexpr std::array<const char*, kRecordKinds> kKindNames = {"page", "window", "snapshot", "text"};

DiskStoreOptions checked(DiskStoreOptions options) {
  HADAL_INPUT_CHECK(!options.folder.empty(), "disk store: no folder given");
  HADAL_INPUT_CHECK(options.page_tokens > 0, "disk store: pages of ", options.page_tokens,
                    " tokens");
  HADAL_INPUT_CHECK(options.period > 0 && options.period % options.page_tokens == 0,
                    "disk store: a snapshot every ", options.period,
                    " tokens: expected a multiple of the page's ", options.page_tokens);
  HADAL_INPUT_CHECK(options.window_pages > 0, "disk store: a window of ", options.window_pages,
                    " pages");
  HADAL_INPUT_CHECK(options.max_bytes > 0 && options.queue_bytes > 0, "disk store: budgets of ",
                    options.max_bytes, " and ", options.queue_bytes, " bytes");
  return options;
}

}  // namespace

DiskStore::Impl::Impl(DiskStoreOptions options)
    : options_(checked(std::move(options))),
      keys_(options_.identity, options_.page_tokens),
      db_({options_.folder, options_.max_bytes, options_.foreign, options_.env}) {
  open();
  WriteBehind::Options queue;
  queue.queue_bytes = options_.queue_bytes;
  queue.idle_every = std::min(queue.idle_every, options_.retry);
  queue_ = std::make_unique<WriteBehind>(
      queue, [this](std::vector<WriteItem> batch) { write(std::move(batch)); }, [this] { idle(); });
}

DiskStore::Impl::~Impl() {
  queue_.reset();
  write_touched();
}

// --- opening ---

void DiskStore::Impl::open(bool may_write) {
  RecencyIndex index;
  DiskDb::Batch repair, gone;
  std::set<std::string> erased;
  {
    const std::lock_guard lock(mutex_);
    erased = erased_texts_;
  }
  const auto restore = [&](std::string key, std::span<const std::byte> bytes) {
    const std::optional<IndexEntry> entry = parse_index_entry(bytes);
    if (erased.contains(key))
      gone.removals.push_back(std::move(key));
    else if (entry && key.size() == kKeyBytes)
      index.restore(key, *entry);
    else
      repair.removals.push_back(std::move(key));
  };
  const DiskDb::Opened opened = db_.open(restore, may_write);
  if (opened.moved_aside) {
    index.clear();
    repair = gone = {};
  }
  if (!gone.removals.empty() && opened.state == DiskDb::State::kOn) db_.write(gone);
  if (!repair.removals.empty()) {
    log::warn("disk", options_.folder, ": ", repair.removals.size(), " damaged index entries");
    if (opened.state == DiskDb::State::kOn) db_.write(repair);
  }
  const std::lock_guard lock(mutex_);
  // Uses this process has seen stay younger than what it finds.
  index.advance_to(index_.now());
  index_ = std::move(index);
  stats_.state = opened.state;
  stats_.writing = opened.state == DiskDb::State::kOn;
  stats_.damaged += static_cast<int64_t>(repair.removals.size());
  stats_.moved_aside += opened.moved_aside ? 1 : 0;
  if (stats_.writing) return;
  retry_at_ = Clock::now() + options_.retry;
  if (std::exchange(warned_, true)) return;
  log::warn("disk", options_.folder,
            opened.state == DiskDb::State::kOff ? ": going on without the prefix store: "
                                                : ": prefixes are read, but not written: ",
            opened.reason);
}

// --- reading ---

class DiskStore::Impl::Load final : public PrefixLoad {
 public:
  Load(Impl& store, Lookup lookup)
      : store_(store), lookup_(std::move(lookup)), readable_(lookup_.max_pages) {}

  bool advance(int64_t max_pages, std::vector<Bytes>& pages) override {
    if (!looked_up_) {
      looked_up_ = !store_.look_up(lookup_, max_pages * kLookupsPerRead);
      if (!looked_up_) return true;
    }
    int64_t reads = 0;
    while (!lookup_.candidates.empty()) {
      const int64_t candidate = lookup_.candidates.back();
      if (candidate <= readable_ && !has_state_) {
        if (reads++ >= max_pages) return true;
        has_state_ = store_.read_resumption(lookup_, candidate, &found_);
      }
      while (has_state_ && lookup_.from_page + num_read_ < std::min(candidate, readable_)) {
        if (reads++ >= max_pages) return true;
        const int64_t page = lookup_.from_page + num_read_;
        std::optional<Bytes> bytes = store_.read(RecordKind::kPage, lookup_, page);
        if (!bytes) {
          readable_ = page;
          break;
        }
        pages.push_back(std::move(*bytes));
        ++num_read_;
      }
      if (has_state_ && candidate <= readable_) {
        found_.pos = candidate * store_.options_.page_tokens;
        break;
      }
      has_state_ = false;
      lookup_.candidates.pop_back();
    }
    count();
    return false;
  }

  std::optional<StoredPrefix> take_result() override {
    return found_.pos > 0 ? std::optional(std::move(found_)) : std::nullopt;
  }

 private:
  void count() {
    const std::lock_guard lock(store_.mutex_);
    ++(found_.pos > 0 ? store_.stats_.hits : store_.stats_.misses);
    const int64_t pages = found_.pos / store_.options_.page_tokens - lookup_.from_page;
    store_.stats_.loaded_tokens += std::max(pages, int64_t{0}) * store_.options_.page_tokens;
  }

  Impl& store_;
  Lookup lookup_;
  StoredPrefix found_;
  int64_t num_read_ = 0;
  int64_t readable_;  ///< leading pages not known to be bad
  bool looked_up_ = false;
  bool has_state_ = false;  ///< found_ holds what resumes behind the last candidate
};

std::unique_ptr<PrefixLoad> DiskStore::Impl::begin_load(std::span<const int64_t> tokens,
                                                        int64_t from_page,
                                                        int64_t max_pos) {
  HADAL_CHECK(from_page >= 0, "disk_store: load from page ", from_page);
  Lookup lookup;
  lookup.max_pages = std::clamp<int64_t>(max_pos, 0, std::ssize(tokens)) / options_.page_tokens;
  lookup.from_page = from_page;
  const auto whole = tokens.first(static_cast<size_t>(lookup.max_pages * options_.page_tokens));
  lookup.tokens.assign(whole.begin(), whole.end());
  return std::make_unique<Load>(*this, std::move(lookup));
}

void DiskStore::Impl::touch(std::span<const int64_t> tokens) {
  const auto bytes = std::as_bytes(tokens);
  std::string value(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  queue_->push({.key = {}, .value = std::move(value), .kind = WriteItem::Kind::kUse});
}

void DiskStore::Impl::use(const std::string& tokens) {
  Lookup lookup;
  lookup.tokens.resize(tokens.size() / sizeof(int64_t));
  std::memcpy(lookup.tokens.data(), tokens.data(), lookup.tokens.size() * sizeof(int64_t));
  lookup.max_pages = std::ssize(lookup.tokens) / options_.page_tokens;
  while (look_up(lookup, kLookupsPerRead)) continue;
}

/// The next so many pages; false when there are no more.
bool DiskStore::Impl::look_up(Lookup& lookup, int64_t num_pages) {
  const int64_t end = std::min(lookup.max_pages, lookup.pages + num_pages);
  const std::span<const int64_t> tokens(lookup.tokens);
  lookup.chain = keys_.chain(tokens.first(static_cast<size_t>(end * options_.page_tokens)));
  const std::lock_guard lock(mutex_);
  if (stats_.state == DiskDb::State::kOff) return false;
  if (lookup.use == 0) lookup.use = index_.begin_use();
  while (lookup.pages < end) {
    const PrefixDigest& digest = lookup.chain[static_cast<size_t>(lookup.pages)];
    const std::string key = key_of(RecordKind::kPage, digest);
    if (lookup.pages >= lookup.from_page && index_.state(key) != RecencyIndex::State::kStored)
      return false;
    ++lookup.pages;
    index_.touch(key, lookup.use);
    index_.touch(key_of(RecordKind::kWindow, digest), lookup.use);
    index_.touch(key_of(RecordKind::kSnapshot, digest), lookup.use);
    if (may_resume(lookup, lookup.pages)) lookup.candidates.push_back(lookup.pages);
  }
  return end < lookup.max_pages;
}

bool DiskStore::Impl::may_resume(const Lookup& lookup, int64_t pages) const {
  const auto stored = [&](RecordKind kind, int64_t page) {
    return index_.state(key_of(kind, lookup.chain[static_cast<size_t>(page)])) ==
           RecencyIndex::State::kStored;
  };
  switch (options_.policy) {
    case WindowPolicy::kZero:
      return pages > lookup.from_page;
    case WindowPolicy::kPeriodic:
      return pages * options_.page_tokens % options_.period == 0 &&
             stored(RecordKind::kSnapshot, pages - 1);
    case WindowPolicy::kFull:
      for (int64_t page = std::max<int64_t>(0, pages - options_.window_pages); page < pages; ++page)
        if (!stored(RecordKind::kWindow, page)) return false;
      return true;
  }
  return false;
}

/// The snapshot or the windows to resume behind so many pages.
bool DiskStore::Impl::read_resumption(const Lookup& lookup, int64_t pages, StoredPrefix* found) {
  if (options_.policy == WindowPolicy::kPeriodic) {
    std::optional<Bytes> snapshot = read(RecordKind::kSnapshot, lookup, pages - 1);
    if (!snapshot) return false;
    found->snapshot = std::move(*snapshot);
  }
  if (options_.policy == WindowPolicy::kFull) {
    found->windows.clear();
    for (int64_t page = std::max<int64_t>(0, pages - options_.window_pages); page < pages; ++page) {
      std::optional<Bytes> window = read(RecordKind::kWindow, lookup, page);
      if (!window) return false;
      found->windows.push_back(std::move(*window));
    }
  }
  return true;
}

/// The payload of the record that ends with `page`, if it is there and right.
std::optional<Bytes> DiskStore::Impl::read(RecordKind kind, const Lookup& lookup, int64_t page) {
  const PrefixDigest& digest = lookup.chain[static_cast<size_t>(page)];
  const std::string key = key_of(kind, digest);
  const auto ids = std::span(lookup.tokens)
                       .subspan(static_cast<size_t>(page * options_.page_tokens),
                                static_cast<size_t>(options_.page_tokens));
  const int64_t pos = (page + 1) * options_.page_tokens;
  std::optional<Bytes> payload;
  std::string fault;
  const auto check = [&](std::span<const std::byte> bytes) {
    const ParsedRecord parsed = parse_record(bytes);
    fault = parsed.fault;
    if (!parsed.record) return;
    const Record& record = *parsed.record;
    if (record.kind == kind && record.pos == pos && record.digest == digest &&
        same_tokens(record, ids))
      payload.emplace(record.payload.begin(), record.payload.end());
    else
      fault = "of another prefix";
  };
  const DiskDb::Found found = db_.get(key, check, &fault);
  if (payload) {
    const std::lock_guard lock(mutex_);
    DiskStoreStats::Traffic& traffic = stats_.traffic[static_cast<size_t>(kind)];
    ++traffic.read;
    traffic.read_bytes += std::ssize(*payload);
    return payload;
  }
  // What a refused write should have written is not there, or not whole.
  if (found != DiskDb::Found::kNo && db_.failure().empty()) {
    log::warn("disk", options_.folder, ": a ", kKindNames[static_cast<size_t>(kind)],
              " at position ", pos, " is damaged (", fault, "): a miss");
    const std::lock_guard lock(mutex_);
    ++stats_.damaged;
  }
  forget(key);
  return std::nullopt;
}

/// The entry is gone or useless: it makes room for a good one.
void DiskStore::Impl::forget(const std::string& key) {
  {
    const std::lock_guard lock(mutex_);
    index_.erase(key);
    if (!stats_.writing) return;
  }
  queue_->push({.key = key, .value = {}, .kind = WriteItem::Kind::kRemove});
}

// --- writing ---

bool DiskStore::Impl::save(RecordKind kind,
                           std::span<const int64_t> tokens,
                           std::span<const std::byte> payload) {
  const int64_t pos = std::ssize(tokens), page_tokens = options_.page_tokens;
  HADAL_CHECK(pos > 0 && pos % page_tokens == 0, "disk_store: a prefix of ", pos,
              " tokens ends inside a page of ", page_tokens);
  {
    const std::lock_guard lock(mutex_);
    if (!stats_.writing) {
      ++stats_.dropped_off;
      return false;
    }
  }
  PrefixDigest before;
  const PrefixDigest digest = keys_.last(tokens, &before);
  std::string key = key_of(kind, digest);
  const std::string like = key_of(RecordKind::kPage, kind == RecordKind::kPage ? before : digest);
  const int64_t bytes = record_bytes(page_tokens, std::ssize(payload));
  {
    const std::lock_guard lock(mutex_);
    if (index_.state(key) != RecencyIndex::State::kAbsent) return true;
    if (bytes > options_.max_bytes || !queue_->has_room(bytes)) {
      ++stats_.dropped_full;
      return false;
    }
    index_.insert(key, pos, bytes, like);
  }
  std::string record =
      encode_record(kind, pos, digest, tokens.last(static_cast<size_t>(page_tokens)), payload);
  if (queue_->push({.key = key, .value = std::move(record)})) return true;
  const std::lock_guard lock(mutex_);
  index_.erase(key);
  ++stats_.dropped_full;
  return false;
}

void DiskStore::Impl::evict(DiskDb::Batch* out) {
  while (index_.bytes() > options_.max_bytes) {
    const std::string key = index_.victim();
    const int64_t bytes = index_.at(key).bytes;
    if (index_.state(key) == RecencyIndex::State::kStored) out->removals.push_back(key);
    index_.erase(key);
    ++stats_.evicted;
    stats_.evicted_bytes += bytes;
    evicted_since_compaction_ += bytes;
  }
}

void DiskStore::Impl::write(std::vector<WriteItem> items) {
  for (const WriteItem& item : items)
    if (item.kind == WriteItem::Kind::kUse) use(item.value);
  std::erase_if(items, [](const WriteItem& item) { return item.kind == WriteItem::Kind::kUse; });
  if (items.empty()) return;
  DiskDb::Batch batch;
  {
    const std::lock_guard lock(mutex_);
    if (!stats_.writing) {
      for (const WriteItem& item : items) {
        queued_texts_.erase(item.key);
        if (item.kind == WriteItem::Kind::kRemove ||
            index_.state(item.key) != RecencyIndex::State::kQueued)
          continue;
        index_.erase(item.key);
        ++stats_.dropped_off;
      }
      return;
    }
    evict(&batch);
    for (WriteItem& item : items) {
      if (item.kind == WriteItem::Kind::kRemove) {
        batch.removals.push_back(std::move(item.key));
      } else if (index_.state(item.key) != RecencyIndex::State::kAbsent) {
        std::string entry = encode_index_entry(index_.at(item.key));
        batch.puts.push_back({std::move(item.key), std::move(item.value), std::move(entry)});
      } else {
        queued_texts_.erase(item.key);  // evicted or erased meanwhile
      }
    }
  }
  const std::string failure = db_.write(batch);
  if (!failure.empty()) {
    {
      const std::lock_guard lock(mutex_);
      for (const DiskDb::Put& put : batch.puts) {
        index_.erase(put.key);
        queued_texts_.erase(put.key);
      }
    }
    after_failure(failure);
    return;
  }
  bool compact = false;
  {
    const std::lock_guard lock(mutex_);
    for (const DiskDb::Put& put : batch.puts) {
      queued_texts_.erase(put.key);
      if (index_.state(put.key) == RecencyIndex::State::kAbsent)
        continue;  // found damaged meanwhile
      index_.mark_stored(put.key);
      DiskStoreStats::Traffic& traffic = stats_.traffic[static_cast<unsigned char>(put.key[0])];
      const int64_t bytes = std::ssize(put.record);
      ++traffic.written;
      const bool text = put.key[0] == static_cast<char>(RecordKind::kText);
      traffic.written_bytes += bytes - record_bytes(text ? 0 : options_.page_tokens, 0);
      stats_.record_bytes_written += bytes;
    }
    if (!batch.puts.empty() && std::exchange(warned_, false))
      log::info("disk", options_.folder, ": writing again");
    // Removed records keep their space until a compaction sees that they are.
    compact = evicted_since_compaction_ > options_.max_bytes / 8;
    if (compact) evicted_since_compaction_ = 0;
  }
  if (compact) db_.compact();
}

/// The database is opened anew for what can be read of it.
void DiskStore::Impl::after_failure(const std::string& reason) {
  {
    const std::lock_guard lock(mutex_);
    ++stats_.write_errors;
    stats_.writing = false;
    if (!std::exchange(warned_, true))
      log::warn("disk", options_.folder, ": writing stops, to be tried again: ", reason);
  }
  open(/*may_write=*/false);
}

void DiskStore::Impl::idle() {
  bool reopen = false, writing = false;
  {
    const std::lock_guard lock(mutex_);
    writing = stats_.writing;
    reopen = !writing && Clock::now() >= retry_at_;
  }
  // RocksDB writes behind our back, too.
  if (const std::string failure = db_.failure(); writing && !failure.empty()) {
    after_failure(failure);
  } else if (reopen && db_.has_room()) {
    open();
  }
  write_touched();
}

/// Times of use reach the disk now and then: after SIGKILL they are a second old.
void DiskStore::Impl::write_touched() {
  constexpr size_t kAtOnce = 4096;
  while (true) {
    DiskDb::Batch batch;
    {
      const std::lock_guard lock(mutex_);
      if (!stats_.writing) return;
      for (auto& [key, entry] : index_.take_touched(kAtOnce))
        batch.index_only.emplace_back(std::move(key), encode_index_entry(entry));
    }
    if (batch.index_only.empty()) return;
    if (const std::string failure = db_.write(batch); !failure.empty()) after_failure(failure);
  }
}

DiskStoreStats DiskStore::Impl::stats() const {
  const std::lock_guard lock(mutex_);
  DiskStoreStats stats = stats_;
  stats.entries = index_.size();
  stats.bytes = index_.bytes();
  return stats;
}

int64_t DiskStore::Impl::stored_bytes() const {
  const std::lock_guard lock(mutex_);
  return index_.bytes();
}

// --- the interface ---

DiskStore::DiskStore(DiskStoreOptions options)
    : impl_(std::make_unique<Impl>(std::move(options))) {}
DiskStore::~DiskStore() = default;

int64_t DiskStore::page_tokens() const { return impl_->options().page_tokens; }

void DiskStore::set_identity(const std::string& identity) { impl_->set_identity(identity); }

std::unique_ptr<PrefixLoad> DiskStore::begin_load(std::span<const int64_t> tokens,
                                                  int64_t from_page,
                                                  int64_t max_pos) {
  return impl_->begin_load(tokens, from_page, max_pos);
}

bool DiskStore::save_page(std::span<const int64_t> prefix_tokens, std::span<const std::byte> page) {
  return impl_->save(RecordKind::kPage, prefix_tokens, page);
}

void DiskStore::save_snapshot(std::span<const int64_t> prefix_tokens,
                              std::span<const std::byte> snapshot) {
  if (wants_snapshot(std::ssize(prefix_tokens)))
    impl_->save(RecordKind::kSnapshot, prefix_tokens, snapshot);
}

void DiskStore::save_window(std::span<const int64_t> prefix_tokens,
                            std::span<const std::byte> window) {
  if (policy() == WindowPolicy::kFull) impl_->save(RecordKind::kWindow, prefix_tokens, window);
}

void DiskStore::touch(std::span<const int64_t> tokens) { impl_->touch(tokens); }

bool DiskStore::put_text(const std::string& name, const std::string& text) {
  return impl_->put_text(name, text);
}
std::optional<std::string> DiskStore::get_text(const std::string& name) {
  return impl_->get_text(name);
}
bool DiskStore::erase_text(const std::string& name) { return impl_->erase_text(name); }

int64_t DiskStore::stored_bytes() const { return impl_->stored_bytes(); }

WindowPolicy DiskStore::policy() const { return impl_->options().policy; }

bool DiskStore::wants_snapshot(int64_t pos) const {
  return policy() == WindowPolicy::kPeriodic && pos > 0 && pos % impl_->options().period == 0;
}

void DiskStore::flush() { impl_->flush(); }
DiskStoreStats DiskStore::stats() const { return impl_->stats(); }

}  // namespace hadal::engine_core
