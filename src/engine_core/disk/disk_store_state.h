// Inside the disk store. Included by its own .cpp files only.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine_core/disk/disk_store.h"
#include "engine_core/disk/recency_index.h"
#include "engine_core/disk/write_behind.h"
#include "engine_core/prefix/prefix_key.h"

namespace hadal::engine_core {

inline std::string key_of(RecordKind kind, const PrefixDigest& digest) {
  std::string key(1, static_cast<char>(kind));
  return key.append(reinterpret_cast<const char*>(digest.data()), digest.size());
}

class DiskStore::Impl {
 public:
  explicit Impl(DiskStoreOptions options);
  ~Impl();
  void set_identity(const std::string& identity) { keys_.set_identity(identity); }

  std::unique_ptr<PrefixLoad> begin_load(std::span<const int64_t> tokens,
                                         int64_t from_page,
                                         int64_t max_pos);
  /// False: dropped.
  bool save(RecordKind kind, std::span<const int64_t> tokens, std::span<const std::byte> payload);
  void touch(std::span<const int64_t> tokens);
  bool put_text(const std::string& name, const std::string& text);
  std::optional<std::string> get_text(const std::string& name);
  bool erase_text(const std::string& name);
  void flush() { queue_->flush(); }
  DiskStoreStats stats() const;
  int64_t stored_bytes() const;
  const DiskStoreOptions& options() const { return options_; }

 private:
  class Load;
  /// What the index promises of a prefix; grows page by page.
  struct Lookup {
    std::vector<int64_t> tokens;
    int64_t from_page = 0, max_pages = 0;
    uint64_t use = 0;  ///< all that it names counts as used then; 0: not begun
    std::vector<PrefixDigest> chain;
    int64_t pages = 0;                ///< leading pages that the caller or the disk holds
    std::vector<int64_t> candidates;  ///< pages behind which one may resume, ascending
  };
  bool look_up(Lookup& lookup, int64_t num_pages);
  bool may_resume(const Lookup& lookup, int64_t pages) const;
  bool read_resumption(const Lookup& lookup, int64_t pages, StoredPrefix* found);
  std::optional<std::vector<std::byte>> read(RecordKind kind, const Lookup& lookup, int64_t page);
  void forget(const std::string& key);
  std::optional<std::string> read_text(const std::string& key, const PrefixDigest& digest);

  // On the queue's thread.
  void open(bool may_write = true);
  void use(const std::string& tokens);
  void write(std::vector<WriteItem> batch);
  void idle();
  void evict(DiskDb::Batch* out);
  void write_touched();
  void after_failure(const std::string& reason);

  const DiskStoreOptions options_;
  PrefixKeys keys_;
  DiskDb db_;
  mutable std::mutex mutex_;  // of what follows
  RecencyIndex index_;
  DiskStoreStats stats_;
  bool warned_ = false;  // that writing failed, since it last worked
  std::chrono::steady_clock::time_point retry_at_;
  int64_t evicted_since_compaction_ = 0;
  std::map<std::string, std::string> queued_texts_;  ///< by key: on their way to the disk
  std::set<std::string> erased_texts_;               ///< the disk may still have them
  std::unique_ptr<WriteBehind> queue_;
};

}  // namespace hadal::engine_core
